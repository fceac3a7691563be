"""The soft quantizer."""

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from softvq import losses
from softvq.functional import Estimator, SoftQuantized, soft_quantize

CodebookLoss = Literal["free_energy", "quantizing_error", "detached_quantizing_error", "likelihood"]


class SoftVQLoss(NamedTuple):
    """Parts of what SoftVQ computed, 0-d tensors."""

    codebook: Tensor  # the loss chosen by codebook_loss, once, whatever commitment_weight is
    entropy: Tensor  # mean entropy of the assignments in nats; a statistic, not in the loss


class SoftVQ(nn.Module):
    """Soft vector quantisation: q = softmax(−‖z−c‖²/T) · C.

    Args:
        dim: features of the input.
        codebook_size: K.
        codebook_dim: D of a code; other than dim / heads, a linear layer leads in and one out.
        heads: independent codebooks, each quantising its own D features.
        temperature: T, the divisor of the squared distance summed over D. (The original Soft
            VQ-VAE divides the mean distance: its T is D times larger.) A 0-d buffer,
            `temperature`, that schedules may fill; with learn_temperature a parameter.
        learn_temperature: learn log T; only with codebook_loss="likelihood", since every other
            loss falls for ever as T grows.
        estimator: "soft" or "straight_through" (value of the nearest code, soft gradient).
        codebook_loss: what trains the codes on the latents: "free_energy" (soft k-means),
            "quantizing_error" ‖z−q‖² with its full gradient, "detached_quantizing_error" with
            constant probabilities (the original rule; no gradient then passes through q to x), or
            "likelihood" of the Gaussian mixture.
        commitment_weight: how much of that loss's gradient reaches the latents; 0 leaves them
            alone (the loss reads sg[z]).
        channel_last: input (B, ..., dim); otherwise (B, dim, ...).
        accept_image_fmap: input (B, dim, H, W), indices (B, H, W).
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
        channel_last: bool = True,
        accept_image_fmap: bool = False,
    ):
        super().__init__()
        sizes = {"dim": dim, "codebook_size": codebook_size, "heads": heads}
        for name, value in (sizes | {"codebook_dim": codebook_dim}).items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if codebook_dim is None and dim % heads:
            raise ValueError(f"dim {dim} does not divide into {heads} heads; give codebook_dim")
        for name, value, names in (
            ("estimator", estimator, get_args(Estimator)),
            ("codebook_loss", codebook_loss, get_args(CodebookLoss)),
        ):
            if value not in names:
                raise ValueError(f"{name} must be one of {', '.join(names)}; got {value!r}")
        if not 0 <= commitment_weight < math.inf:
            raise ValueError(
                f"commitment_weight must be a finite number from 0 up, got {commitment_weight}"
            )
        if learn_temperature and codebook_loss != "likelihood":
            raise ValueError(
                "learn_temperature needs codebook_loss='likelihood': under "
                f"{codebook_loss!r} the temperature would grow without end"
            )
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature must be a finite number above 0, got {temperature}")
        self.codebook_dim = dim // heads if codebook_dim is None else codebook_dim
        self.codebook_size = codebook_size
        self.heads = heads
        self.estimator = estimator
        self.codebook_loss = codebook_loss
        self.commitment_weight = commitment_weight
        self.channel_last = channel_last and not accept_image_fmap

        inner = self.codebook_dim * heads
        self.project_in = nn.Linear(dim, inner) if inner != dim else nn.Identity()
        self.project_out = nn.Linear(inner, dim) if inner != dim else nn.Identity()
        self.codebook_parameter = nn.Parameter(torch.randn(heads, codebook_size, self.codebook_dim))
        log_temperature = torch.tensor(math.log(temperature))
        if learn_temperature:
            self.log_temperature = nn.Parameter(log_temperature)
        else:
            self.register_buffer("log_temperature", log_temperature)

    @property
    def codebook(self) -> Tensor:
        """(K, D), or (heads, K, D) with several heads."""
        return self.codebook_parameter[0] if self.heads == 1 else self.codebook_parameter

    @property
    def temperature(self) -> Tensor:
        """T, a 0-d tensor."""
        return self.log_temperature.exp()

    @torch.no_grad()
    def set_temperature(self, temperature: float | Tensor) -> None:
        """Set T in place, without a host synchronisation when it is a tensor."""
        if isinstance(temperature, Tensor):
            self.log_temperature.copy_(temperature.log())
        else:
            self.log_temperature.fill_(math.log(temperature))

    def forward(
        self, x: Tensor, *, return_loss_breakdown: bool = False
    ) -> tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, SoftVQLoss]:
        """Quantise x (B, ..., dim), or (B, dim, ...) without channel_last.

        Returns quantized (as x), indices (B, ...) int64, with heads (B, ..., heads), and the loss;
        with return_loss_breakdown also a SoftVQLoss.
        """
        x = x if self.channel_last else x.movedim(1, -1)
        z = self.project_in(x)
        z = z if self.heads == 1 else z.unflatten(-1, (self.heads, self.codebook_dim))
        out = self.quantize(z)
        loss = self._loss(z, out)
        quantized = out.quantized if self.heads == 1 else out.quantized.flatten(-2)
        quantized = self._to_input_layout(self.project_out(quantized))
        if return_loss_breakdown:
            return quantized, out.indices, loss, SoftVQLoss(loss, out.entropy.mean())
        return quantized, out.indices, loss

    def _loss(self, z: Tensor, out: SoftQuantized) -> Tensor:
        detached = self.codebook_loss == "detached_quantizing_error"
        if z.requires_grad and self.commitment_weight != 1:
            # The value of z, and a share of its gradient.
            z = z.detach() + self.commitment_weight * (z - z.detach())
            out = out if detached else self.quantize(z)
        match self.codebook_loss:
            case "free_energy":
                return losses.free_energy(out.log_partition, self.temperature, self.codebook_dim)
            case "likelihood":
                return losses.mixture_negative_log_likelihood(
                    out.log_partition, self.temperature, self.codebook_dim, self.codebook_size
                )
        return losses.quantizing_error(z, out.quantized)

    def quantize(self, z: Tensor) -> SoftQuantized:
        """`soft_quantize` of projected latents (..., D) or (..., heads, D), this layer's way."""
        return soft_quantize(
            z,
            self.codebook,
            self.temperature,
            estimator=self.estimator,
            detach_probabilities=self.codebook_loss == "detached_quantizing_error",
        )

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes (..., D) of indices (...); with heads (..., heads, D) of (..., heads)."""
        if self.heads == 1:
            return self.codebook[indices]
        return self.codebook[torch.arange(self.heads, device=indices.device), indices]

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What forward would return for these nearest codes: projected, in the input's layout."""
        codes = self.get_codes_from_indices(indices)
        codes = codes if self.heads == 1 else codes.flatten(-2)
        return self._to_input_layout(self.project_out(codes))

    def _to_input_layout(self, x: Tensor) -> Tensor:
        return x if self.channel_last else x.movedim(-1, 1)
