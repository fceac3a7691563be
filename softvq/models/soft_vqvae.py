"""The Soft VQ-VAE."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from softvq import losses
from softvq.functional import soft_quantize
from softvq.models.networks import (
    ConvDecoder,
    ConvEncoder,
    DenseDecoder,
    DenseEncoder,
    Grid,
    Shape,
)
from softvq.quantizers import SoftVQ

Architecture = Literal["conv", "dense"]
DecoderInput = Literal["latent", "quantized"]
Codes = Literal["nearest", "soft"]


@dataclass(frozen=True)
class LossWeights:
    """Weights of the four losses. A weight of zero also leaves the term's work out."""

    reconstruction: float = 1e4  # ‖X−X̂‖², scaled up: the KL sums over dimensions, this is a mean
    quantizing: float = 1.0  # the quantizer's loss on sg[z]
    kl: float = 1.0  # zero also makes the encoder deterministic: z = μ
    reconstruction_quantizing: float = 0.0  # ‖X−Decoder(sg[codes])‖², of the reconstruction's scale


class Latents(NamedTuple):
    """What the encoder says of a batch, all (B, h, w, D); z is sampled while training."""

    z: Tensor
    mean: Tensor
    logvar: Tensor | None  # None for a deterministic encoder


class TrainingStep(NamedTuple):
    """What one batch says to the optimizer and to whoever steers the codebook."""

    losses: dict[str, Tensor]  # 0-d, named as the metrics are; "loss" is the weighted sum
    latents: Tensor  # (B, h, w, D), what the quantizer read, detached
    indices: Tensor  # (B, h, w) int64


class Evaluation(NamedTuple):
    """A batch seen in every way the metrics and pictures need."""

    reconstruction: Tensor  #         (B, C, H, W), the model's own output
    soft_reconstruction: Tensor  #    (B, C, H, W), the decoder fed q_soft
    nearest_reconstruction: Tensor  # (B, C, H, W), the decoder fed the nearest code
    indices: Tensor  #                (B, h, w) int64
    quantizing_error: Tensor  #       0-d, mean of (z − q_soft)²
    max_probability: Tensor  #        0-d, mean probability of the nearest code
    kl: Tensor  #                     0-d, zero for a deterministic encoder


class SoftVQVAE(nn.Module):
    """Encoder → μ, log σ² → z; a soft quantizer beside or before the decoder.

    Args:
        image_shape: (C, H, W), any size.
        latent_grid: (h, w) latent vectors per image, each of latent_dim features.
        quantizer: a SoftVQ of dimension latent_dim.
        decoder_input: "latent": the decoder reads z and the quantizer stands beside it, reading
            sg[z] (the original Soft VQ-VAE). "quantized": the decoder reads the quantizer's output,
            which passes its gradient on to the encoder.
        reconstruction_loss: "squared" or "absolute" differences, for training only.
        quantized_codes: what the reconstruction-quantizing loss feeds the decoder.
        hidden: layer sizes of the dense networks. width, residual_blocks: of the conv networks.
    """

    def __init__(
        self,
        image_shape: Shape,
        latent_grid: Grid,
        quantizer: SoftVQ,
        *,
        architecture: Architecture = "conv",
        decoder_input: DecoderInput = "latent",
        weights: LossWeights = LossWeights(),
        reconstruction_loss: str = "squared",
        quantized_codes: Codes = "nearest",
        hidden: tuple[int, ...] = (256, 64),
        width: int = 32,
        residual_blocks: int = 1,
    ):
        super().__init__()
        latent_dim = quantizer.codebook_dim
        self.image_shape = image_shape
        self.weights = weights
        self.decoder_input = decoder_input
        self.reconstruction_loss = reconstruction_loss
        self.quantized_codes = quantized_codes
        self.variational = weights.kl > 0
        features = 2 * latent_dim if self.variational else latent_dim
        if architecture == "conv":
            size = (width, residual_blocks)
            self.encoder = ConvEncoder(image_shape, latent_grid, features, *size)
            self.decoder = ConvDecoder(image_shape, latent_grid, latent_dim, *size)
        else:
            self.encoder = DenseEncoder(image_shape, latent_grid, features, hidden)
            self.decoder = DenseDecoder(image_shape, latent_grid, latent_dim, hidden)
        self.quantizer = quantizer
        # Nothing else would hold the scale of a latent that no KL sees: growing it makes any
        # temperature cold.
        self.standardise = (
            nn.Identity() if self.variational else nn.BatchNorm1d(latent_dim, affine=False)
        )

    def encode(self, images: Tensor) -> Latents:
        """Images (B, C, H, W) in [0, 1] → latents (B, h, w, D)."""
        features = self.encoder(images)
        if not self.variational:
            z = self.standardise(features.flatten(0, 2)).view(features.shape)
            return Latents(z, z, None)
        mean, logvar = features.chunk(2, -1)
        z = mean + (0.5 * logvar).exp() * torch.randn_like(mean) if self.training else mean
        return Latents(z, mean, logvar)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents or codes (B, h, w, D) → images (B, C, H, W) in [0, 1]."""
        return self.decoder(latents)

    def encode_indices(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] → nearest codes (B, h, w) int64."""
        return self.quantizer.quantize(self.encode(images).mean).indices

    def decode_indices(self, indices: Tensor) -> Tensor:
        """Codes (B, h, w) int64 → images (B, C, H, W) in [0, 1]."""
        return self.decode(self.quantizer.get_codes_from_indices(indices))

    def forward(self, images: Tensor) -> TrainingStep:
        """The losses of a batch (B, C, H, W) in [0, 1]."""
        latents = self.encode(images)
        if self.decoder_input == "latent":
            # The mean, not the sample: what a code has to stand for when the model is used.
            read = latents.mean.detach()
            quantized, indices, quantizer_loss = self.quantizer(read)
            decoded = latents.z
        else:
            read = latents.z
            quantized, indices, quantizer_loss = self.quantizer(read)
            decoded = quantized

        codes = None
        if self.weights.reconstruction_quantizing > 0:
            nearest = self.quantized_codes == "nearest"
            codes = self.quantizer.get_codes_from_indices(indices) if nearest else quantized
        output, code_output = self._decode_together(decoded, codes)

        parts = {
            "reconstruction_error": losses.reconstruction_error(output, images),
            "quantizing_error": losses.quantizing_error(read.detach(), quantized.detach()),
        }
        reconstruction = losses.reconstruction_error(output, images, self.reconstruction_loss)
        loss = (
            self.weights.reconstruction * reconstruction + self.weights.quantizing * quantizer_loss
        )
        if latents.logvar is not None:
            parts["kl"] = losses.kl_divergence(latents.mean, latents.logvar)
            loss = loss + self.weights.kl * parts["kl"]
        if code_output is not None:
            term = losses.reconstruction_error(code_output, images, self.reconstruction_loss)
            weight = self.weights.reconstruction_quantizing * self.weights.reconstruction
            loss = loss + weight * term
        return TrainingStep({"loss": loss, **parts}, read.detach(), indices)

    def _decode_together(
        self, latents: Tensor, codes: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Decode latents and sg[codes] in one pass, so that batch norm sees both kinds at once.

        Through its statistics, and only through them, the codes' loss then reaches the latents.
        """
        if codes is None:
            return self.decode(latents), None
        output, code_output = self.decode(torch.cat([latents, codes.detach()])).chunk(2)
        return output, code_output

    @torch.no_grad()
    def evaluate(self, images: Tensor) -> Evaluation:
        """All reconstructions and statistics of a batch (B, C, H, W) in [0, 1], in eval mode."""
        latents = self.encode(images)
        z, codebook = latents.mean, self.quantizer.codebook
        temperature = self.quantizer.temperature
        soft = soft_quantize(z, codebook, temperature)
        nearest = self.quantizer.get_codes_from_indices(soft.indices)
        soft_output, nearest_output = self.decode(soft.quantized), self.decode(nearest)
        if self.decoder_input == "latent":
            output = self.decode(z)
        else:
            hard = self.quantizer.estimator == "straight_through"
            output = nearest_output if hard else soft_output
        best_score = -(z - nearest).square().sum(-1) / temperature
        return Evaluation(
            output,
            soft_output,
            nearest_output,
            soft.indices,
            losses.quantizing_error(z, soft.quantized),
            # Two large numbers when T is small: their difference may round to above zero.
            (best_score - soft.log_partition).clamp(max=0).exp().mean(),
            z.new_zeros(())
            if latents.logvar is None
            else losses.kl_divergence(latents.mean, latents.logvar),
        )
