"""The soft quantizer."""

from typing import Literal, NamedTuple, Unpack, get_args

import torch
from torch import Tensor, nn

from softvq import losses
from softvq.checks import check_choice, check_weights
from softvq.functional import Estimator, SoftQuantized, soft_quantize
from softvq.quantizers.straight_through import codes_at
from softvq.quantizers.temperature import TemperedQuantizer
from softvq.quantizers.types import QuantizerOptions

CodebookLoss = Literal["free_energy", "quantizing_error", "detached_quantizing_error", "likelihood"]


class SoftVQLoss(NamedTuple):
    """Parts of what SoftVQ computed, 0-d tensors, unweighted."""

    codebook: Tensor  # the loss chosen by codebook_loss, once, whatever commitment_weight is
    entropy: Tensor  # mean entropy of the assignments in nats; a statistic, not in the loss
    entropy_regulariser: Tensor  # zero with entropy_weight=0


class SoftAssignment(NamedTuple):
    """What `SoftVQ.assign` returns; (B, ...) are the positions, with heads (B, ..., heads)."""

    quantized: Tensor  #       as x: the soft mixture, whatever the estimator
    indices: Tensor  #         (B, ...) int64, the nearest codes
    max_probability: Tensor  # (B, ...), that of the nearest code


class SoftVQ(TemperedQuantizer):
    """Soft vector quantisation: q = softmax(−‖z−c‖²/T) · C.

    Args:
        dim, codebook_size, codebook_dim, heads, **options: see `Quantizer`.
        temperature: T, the divisor of the squared distance summed over D. (The original Soft
            VQ-VAE divides the mean distance: its temperature times D is T.) To be read as
            `temperature` and changed by `set_temperature`.
        learn_temperature: learn log T; only with codebook_loss="likelihood", since every other
            loss falls for ever as T grows.
        estimator: "soft" or "straight_through" (value of the nearest code, soft gradient).
        codebook_loss: what trains the codes on the latents: "free_energy" (soft k-means),
            "quantizing_error" ‖z−q‖² with its full gradient, "detached_quantizing_error" with
            constant probabilities (the original rule; no gradient then passes through q to x), or
            "likelihood" of the Gaussian mixture.
        commitment_weight: how much of that loss's gradient reaches the latents; 0 leaves them
            alone (the loss reads sg[z]).

    Raises what `Quantizer` does; ValueError: learn_temperature under another codebook_loss.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        heads: int = 1,
        temperature: float = 1.0,
        *,
        learn_temperature: bool = False,
        estimator: Estimator = "soft",
        codebook_loss: CodebookLoss = "free_energy",
        commitment_weight: float = 0.0,
        **options: Unpack[QuantizerOptions],
    ):
        check_choice("estimator", estimator, get_args(Estimator))
        check_choice("codebook_loss", codebook_loss, get_args(CodebookLoss))
        check_weights(commitment_weight=commitment_weight)
        if learn_temperature and codebook_loss != "likelihood":
            raise ValueError(
                "learn_temperature needs codebook_loss='likelihood': under "
                f"{codebook_loss!r} the temperature would grow without end"
            )
        super().__init__(
            *(dim, codebook_size, codebook_dim, heads),
            temperature=temperature,
            learn=learn_temperature,
            **options,
        )
        self.estimator = estimator
        self.codebook_loss = codebook_loss
        self.commitment_weight = commitment_weight
        self.codebook_parameter = nn.Parameter(self._first_codes())

    def quantize(self, z: Tensor) -> SoftQuantized:
        """`soft_quantize` of latents (..., D), with heads (..., heads, D), this layer's way."""
        return soft_quantize(
            z,
            self.codebook,
            self.temperature,
            estimator=self.estimator,
            detach_probabilities=self.codebook_loss == "detached_quantizing_error",
            detach_log_partition=self.commitment_weight != 1,
        )

    @torch.no_grad()
    def assign(self, x: Tensor) -> SoftAssignment:
        """How x (B, ..., dim), or (B, dim, ...) without channel_last, is assigned to the codes."""
        z = self.latents(x)
        soft = soft_quantize(z, self.codebook, self.temperature)
        nearest = codes_at(self.codebook, soft.indices)
        best_score = -(losses.in_float32(z) - nearest).square().sum(-1) / self.temperature
        # Two large numbers when T is small: their difference may round to above zero.
        max_probability = (best_score - soft.log_partition).clamp(max=0).exp()
        quantized = self._to_input_layout(self._outputs(soft.quantized))
        return SoftAssignment(quantized, soft.indices, max_probability)

    def _loss(
        self, z: Tensor, out: SoftQuantized, entropy_regulariser: Tensor
    ) -> tuple[Tensor, SoftVQLoss]:
        loss = self._codebook_loss(z, out)
        return loss, SoftVQLoss(loss, out.entropy.mean(), entropy_regulariser)

    def _codebook_loss(self, z: Tensor, out: SoftQuantized) -> Tensor:
        match self.codebook_loss:
            case "free_energy":
                loss = losses.free_energy(out.log_partition, self.temperature, self.codebook_dim)
                return loss + self._commitment(z, out)
            case "likelihood":
                loss = losses.mixture_negative_log_likelihood(
                    out.log_partition, self.temperature, self.codebook_dim, self.codebook_size
                )
                return loss + self._commitment(z, out) / self.temperature.detach()
        if z.requires_grad and self.commitment_weight != 1:
            # The value of z, and a share of its gradient.
            z = z.detach() + self.commitment_weight * (z - z.detach())
            if self.codebook_loss == "quantizing_error":
                out = self.quantize(z)
        return losses.quantizing_error(z, out.quantized)

    def _commitment(self, z: Tensor, out: SoftQuantized) -> Tensor | float:
        """Zero, with a share of the free energy's gradient in z, which is that of ‖z − sg[q]‖²."""
        if self.commitment_weight in (0, 1) or not z.requires_grad:
            return 0.0  # `quantize` gave z nothing, or all
        soft = out.quantized.detach()
        if self.estimator == "straight_through":
            with torch.no_grad():
                soft = soft_quantize(z, self.codebook, self.temperature).quantized
        error = losses.quantizing_error(z, soft)
        return self.commitment_weight * (error - error.detach())
