"""The Soft VQ-VAE."""

from typing import Literal, get_args

import torch
from torch import Tensor

from softvq import losses
from softvq.checks import check_choice
from softvq.models.base import LEVEL
from softvq.models.networks import Grid, Networks, Shape
from softvq.models.outputs import Evaluation, LossWeights, TrainingStep
from softvq.models.vqvae import VQVAE
from softvq.quantizers import SoftVQ

DecoderInput = Literal["latent", "quantized"]
Codes = Literal["nearest", "soft"]


class SoftVQVAE(VQVAE):
    """Encoder → μ, log σ² → z; a soft quantizer beside or before the decoder.

    Args:
        quantizer: a SoftVQ of dimension D.
        decoder_input: "latent": the decoder reads z and the quantizer stands beside it, reading
            sg[z] (the original Soft VQ-VAE); a codebook_dim that needs projections is refused, for
            nothing would train them. "quantized": the decoder reads the quantizer's output, which
            passes its gradient on to the encoder.
        quantized_codes: what the reconstruction-quantizing loss feeds the decoder.
        others: as for EncoderDecoder.

    Raises:
        TypeError: a quantizer that is no SoftVQ.
        ValueError: one that is not channels last, or projects beside the decoder; another word for
            decoder_input or quantized_codes.
    """

    quantizer: SoftVQ
    absent_losses = ()

    def __init__(
        self,
        image_shape: Shape,
        latent_grid: Grid,
        quantizer: SoftVQ,
        *,
        decoder_input: DecoderInput = "latent",
        quantized_codes: Codes = "nearest",
        networks: Networks = Networks(),
        weights: LossWeights = LossWeights(),
        reconstruction_loss: losses.Difference = "squared",
    ):
        check_choice("decoder_input", decoder_input, get_args(DecoderInput))
        check_choice("quantized_codes", quantized_codes, get_args(Codes))
        if not isinstance(quantizer, SoftVQ):
            raise TypeError(f"quantizer must be a SoftVQ, got a {type(quantizer).__name__}")
        inner = quantizer.codebook_dim * quantizer.heads
        if decoder_input == "latent" and inner != quantizer.dim:
            raise ValueError(
                f"quantizer projects {quantizer.dim} features to {inner}, which nothing trains "
                "under decoder_input='latent'; use decoder_input='quantized'"
            )
        super().__init__(
            image_shape,
            latent_grid,
            quantizer,
            networks=networks,
            weights=weights,
            reconstruction_loss=reconstruction_loss,
        )
        self.decoder_input = decoder_input
        self.quantized_codes = quantized_codes

    def forward(self, images: Tensor, labels: Tensor | None = None) -> TrainingStep:
        """The losses of a batch (B, C, H, W) in [0, 1]; labels are not looked at."""
        latents = self.encode(images)
        beside = self.decoder_input == "latent"
        # Beside: the mean, not the sample, is what a code stands for when the model is used.
        read = latents.mean.detach() if beside else latents.z
        quantized, indices, quantizer_loss = self.quantizer(read)

        codes = None
        if self.weights.reconstruction_quantizing > 0:
            nearest = self.quantized_codes == "nearest"
            codes = self.quantizer.get_output_from_indices(indices) if nearest else quantized
        output, code_output = self._decode_together(latents.z if beside else quantized, codes)

        parts, loss = self.reconstruction_losses(output, images)
        parts["quantizing_error"] = losses.quantizing_error(read.detach(), quantized.detach())
        kl = self.kl(latents)
        loss = loss + self.weights.quantizing * quantizer_loss + self.weights.kl * sum(kl.values())
        if code_output is not None:
            _, term = self.reconstruction_losses(code_output, images)
            loss = loss + self.weights.reconstruction_quantizing * term
        return TrainingStep({"loss": loss, **parts, **kl}, {LEVEL: read.detach()}, {LEVEL: indices})

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
    def evaluate(self, images: Tensor, labels: Tensor | None = None) -> Evaluation:
        """All reconstructions and statistics of a batch (B, C, H, W) in [0, 1], in eval mode."""
        latents = self.encode(images)
        z = latents.mean
        soft = self.quantizer.assign(z)
        nearest = self.quantizer.get_output_from_indices(soft.indices)
        soft_output, nearest_output = self.decode(soft.quantized), self.decode(nearest)
        if self.decoder_input == "latent":
            output = self.decode(z)
        else:
            hard = self.quantizer.estimator == "straight_through"
            output = nearest_output if hard else soft_output
        values = {
            "quantizing_error": losses.quantizing_error(z, soft.quantized),
            "max_probability": soft.max_probability.mean(),
            **self.kl(latents),
        }
        outputs = {
            "reconstruction_error": output,
            "reconstruction_quantizing_error": soft_output,
            "reconstruction_hard_error": nearest_output,
        }
        return Evaluation(outputs, values, {LEVEL: soft.indices})
