"""Soft quantisation with a codebook that is split over the processes of a group.

A part r of the codes, alone, gives each latent q_r, log_partition l_r and entropy H_r. Together,
with l = log Σ_r exp(l_r) and the part's share of the probability w_r = exp(l_r − l):
q = Σ_r w_r q_r and H = Σ_r w_r (H_r − log w_r). So N·(D + 5) numbers are exchanged, never N×K.
"""

from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup, ReduceOp

from softvq.functional import SoftQuantized, soft_quantize
from softvq.kernels.dtypes import accumulation_dtype


def split_soft_quantize(
    z: Tensor,
    codebook_shard: Tensor,
    temperature: float | Tensor,
    group: ProcessGroup | None = None,
) -> SoftQuantized:
    """`softvq.soft_quantize` with the codebook whose parts the ranks of the group hold.

    Every rank has the same latents, computes the same loss of what is returned, and gets the whole
    gradient of z and of the temperature, but only its own codes' gradient of the codebook. So z
    and everything before it must not be averaged over the group again.

    Args:
        z: (..., D), the same on every rank.
        codebook_shard: (K_r, D); the whole codebook is these parts in the order of ranks. K_r may
            differ from rank to rank.
        temperature: as in `softvq.soft_quantize`, the same on every rank.
        group: None for all processes.
    Returns:
        the same on every rank; indices are those of the whole codebook.
    Raises:
        TypeError, ValueError: as `softvq.soft_quantize`; and ValueError for a shard not (K_r, D).
    """
    if codebook_shard.dim() != 2:
        raise ValueError(f"codebook_shard must be (K, D), got {tuple(codebook_shard.shape)}")
    z = _ToParts.apply(z, group)
    if isinstance(temperature, Tensor):
        temperature = _ToParts.apply(temperature, group)
    part = soft_quantize(z, codebook_shard, temperature)

    largest = _reduced(part.log_partition.detach(), ReduceOp.MAX, group)
    total = _FromParts.apply((part.log_partition - largest).exp(), group)
    log_partition = largest + total.log()
    log_share = part.log_partition - _ToParts.apply(log_partition, group)
    # (..., D + 1) in the precision of the log-partition
    values = torch.cat([part.quantized, (part.entropy - log_share)[..., None]], -1)
    values = _FromParts.apply(log_share.exp()[..., None] * values, group)
    return SoftQuantized(
        values[..., :-1].to(z.dtype),
        _nearest(z.detach(), codebook_shard.detach(), part.indices, group),
        log_partition,
        values[..., -1],
    )


def _nearest(z: Tensor, shard: Tensor, indices: Tensor, group: ProcessGroup | None) -> Tensor:
    """The nearest code of all parts, given each part's nearest one; the lowest index wins a tie."""
    difference = z.to(accumulation_dtype(z, shard)) - shard[indices]
    distance = difference.square().sum(-1)
    sizes = indices.new_zeros(distributed.get_world_size(group))
    rank = distributed.get_rank(group)
    sizes[rank] = len(shard)
    offset = _reduced(sizes, ReduceOp.SUM, group)[:rank].sum()
    is_nearest = distance <= _reduced(distance, ReduceOp.MIN, group)
    beyond = torch.iinfo(torch.int64).max
    return _reduced((offset + indices).where(is_nearest, beyond), ReduceOp.MIN, group)


def _reduced(x: Tensor, operation: Any, group: ProcessGroup | None) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(x, operation, group)
    return x


class _ToParts(torch.autograd.Function):
    """What all ranks have alike goes into each rank's own part; the parts' gradients add up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _reduced(grad, ReduceOp.SUM, ctx.group), None


class _FromParts(torch.autograd.Function):
    """The sum of the parts, which all ranks then have alike; so have they its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        return _reduced(x, ReduceOp.SUM, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
