"""The quantizer with sampled codes."""

from functools import partial
from typing import NamedTuple, Unpack

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from softvq import losses
from softvq.checks import check_temperatures, check_weights
from softvq.functional import soft_quantize, temperature_tensor
from softvq.kernels import reference
from softvq.kernels.products import without_autocast
from softvq.quantizers.straight_through import (
    codes_at,
    nearest_straight_through,
    straight_through,
)
from softvq.quantizers.temperature import TemperedQuantizer
from softvq.quantizers.types import QuantizerOptions

# Rows × codes that are sampled at once, 64 MB in float32. What is larger than 32 MB glibc returns
# when it is freed; smaller blocks fragmented its heap until it was larger than all of N×K.
BLOCK_ELEMENTS = 2**24


class GumbelQuantized(NamedTuple):
    """What `GumbelVQ.quantize` returns; (...) are the leading dimensions of z."""

    quantized: Tensor  # (..., D), dtype of z
    indices: Tensor  #   (...) int64: what was sampled if the value is a code's, else the nearest


class GumbelVQLoss(NamedTuple):
    """Parts of what GumbelVQ computed, 0-d tensors, unweighted."""

    kl: Tensor  #                  KL(p ‖ uniform) in nats per index; zero with kl_weight=0
    entropy_regulariser: Tensor  # zero with entropy_weight=0


class GumbelVQ(TemperedQuantizer):
    """A random code, relaxed so that gradients pass.

    A latent chooses code k with probability p_k ∝ exp(−‖z−c_k‖²/L), L = logits_temperature. In
    training, with Gumbel noise g_k, the output is softmax((log p + g)/T) · C: Jang et al. 2017 and
    Maddison et al. 2017. As T falls it becomes a sample from p. In evaluation it is the nearest
    code, with a straight-through gradient. loss = kl_weight · KL(p ‖ uniform), a mean over indices.

    No N×K tensor is held: rows are sampled in blocks of at most max(K, 2²⁴) rows × codes and, where
    there are several, again for the backward pass. Four such blocks live at a time: 256 MB in
    float32 up to K = 16 million, whatever the number of rows.

    Args:
        dim, codebook_size, codebook_dim, heads, **options: see `Quantizer`.
        temperature: T of the relaxation; read as `temperature`, changed by `set_temperature`.
        logits_temperature: L, the divisor of the squared distance summed over D.
        straight_through: in training the value is that of the sampled code, argmax (log p + g),
            and the gradient that of the relaxation.
        kl_weight: of the KL divergence in the loss; 0 also leaves its work out.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        heads: int = 1,
        temperature: float = 1.0,
        *,
        logits_temperature: float = 1.0,
        straight_through: bool = False,
        kl_weight: float = 5e-4,
        **options: Unpack[QuantizerOptions],
    ):
        super().__init__(
            *(dim, codebook_size, codebook_dim, heads), temperature=temperature, **options
        )
        check_temperatures(logits_temperature=logits_temperature)
        check_weights(kl_weight=kl_weight)
        self.logits_temperature = logits_temperature
        self.straight_through = straight_through
        self.kl_weight = kl_weight
        self.codebook_parameter = nn.Parameter(self._first_codes())

    @property
    def _logits_temperature(self) -> Tensor:
        """L, a 0-d tensor."""
        name = "logits_temperature"
        log = self.log_temperature
        return temperature_tensor(self.logits_temperature, log.device, log.dtype, name)

    def quantize(self, z: Tensor) -> GumbelQuantized:
        """Sample for latents (..., D), with heads (..., heads, D); in evaluation the nearest."""
        if not self.training:
            return GumbelQuantized(*nearest_straight_through(z, self.codebook))
        codebook = self.codebook
        rows = self._by_codebook(z)
        block_rows = max(1, BLOCK_ELEMENTS // (self.codebooks * self.codebook_size))
        blocks = rows.split(block_rows, 1)
        sample = _relaxed_sample
        if len(blocks) > 1:  # one alone is kept: a CUDA graph cannot draw its noise again
            sample = partial(checkpoint, _relaxed_sample, use_reentrant=False)
        options = (self.temperature, self._logits_temperature, self.straight_through)
        samples = [
            sample(block, codebook.view_as(self._stored_codes), *options) for block in blocks
        ]
        relaxed, indices = (
            torch.cat(parts, 1).transpose(0, 1) for parts in zip(*samples, strict=True)
        )
        relaxed, indices = relaxed.reshape(z.shape), indices.reshape(z.shape[:-1])
        if self.straight_through:
            relaxed = straight_through(relaxed, codes_at(codebook.detach(), indices))
        return GumbelQuantized(relaxed, indices)

    def _loss(
        self, z: Tensor, out: GumbelQuantized, entropy_regulariser: Tensor
    ) -> tuple[Tensor, GumbelVQLoss]:
        kl = torch.zeros((), device=z.device)
        if self.kl_weight:
            entropy = soft_quantize(z, self.codebook, self._logits_temperature).entropy
            kl = losses.kl_to_uniform(entropy, self.codebook_size)
        return self.kl_weight * kl, GumbelVQLoss(kl, entropy_regulariser)


def _relaxed_sample(
    z: Tensor, codebook: Tensor, temperature: Tensor, logits_temperature: Tensor, sampled: bool
) -> tuple[Tensor, Tensor]:
    """softmax((log p + g)/T) · C and an index: the sample's, or the nearest code's.

    z (H, n, D), codebook (H, K, D) → (H, n, D) in the dtype of z, (H, n) int64.
    """
    with without_autocast(z.device.type):
        # log p + a constant of the row, which no softmax sees.
        logits = reference.scores(z, codebook, logits_temperature)
        noisy = logits - torch.empty_like(logits).exponential_().log()
        relaxed = (noisy / temperature.to(noisy.dtype)).softmax(-1) @ codebook.to(noisy.dtype)
    return relaxed.to(z.dtype), (noisy if sampled else logits).argmax(-1)
