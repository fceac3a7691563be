"""The entropy regulariser of a batch, over all replicas."""

import math

from torch import Tensor

from softvq import losses
from softvq.distributed.collectives import sum_over_replicas
from softvq.functional import usage_and_entropy
from softvq.quantizers.snapshot import snapshot


def batch_regulariser(
    z: Tensor, codebook: Tensor, temperature: float, *, training: bool, sync: bool | None
) -> Tensor:
    """`losses.entropy_regulariser` of latents z (..., D) or (..., H, D), 0-d.

    In training the mean assignment is that of all replicas' rows; evaluation may be the business of
    one replica alone.
    """
    codebook = snapshot(codebook)  # running statistics may move it before the backward pass
    if z.numel():
        usage, entropy = usage_and_entropy(z, codebook, temperature)
    else:  # nothing, but this replica takes part in the sum below and in its backward pass
        usage = 0 * losses.in_float32(codebook).sum(-1) + z.sum()
        entropy = usage.new_zeros(1)
    if training:
        rows = usage.new_full((), math.prod(z.shape[:-1]))
        share = rows / sum_over_replicas(rows, sync).clamp(min=1)
        usage = sum_over_replicas(share * usage, sync)
    return losses.entropy_regulariser(entropy, usage)
