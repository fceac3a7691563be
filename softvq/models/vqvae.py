"""The VQ-VAE, with any quantizer."""

import torch
from torch import Tensor

from softvq import losses
from softvq.models.base import LEVEL
from softvq.models.checks import check_codes, check_layout
from softvq.models.encoder_decoder import EncoderDecoder
from softvq.models.networks import Grid, Networks, Shape
from softvq.models.outputs import Evaluation, LossWeights, TrainingStep
from softvq.quantizers import Quantizer


class VQVAE(EncoderDecoder):
    """Encoder → z → quantizer → decoder. van den Oord et al. 2017, with any quantizer.

    The decoder reads what the quantizer returns, and the quantizer decides which gradient goes on
    to the encoder. Latents are standardised before they are quantised.

    Args:
        quantizer: of dimension D, channels last; VQ is the paper's own, EMAVQ that of its appendix.
        others: as for EncoderDecoder.

    Raises TypeError or ValueError of a quantizer that is none, or not channels last.
    """

    def __init__(
        self,
        image_shape: Shape,
        latent_grid: Grid,
        quantizer: Quantizer,
        *,
        networks: Networks = Networks(),
        weights: LossWeights = LossWeights(kl=0.0),
        reconstruction_loss: losses.Difference = "squared",
    ):
        check_layout(quantizer=quantizer)
        super().__init__(
            image_shape,
            latent_grid,
            quantizer.dim,
            networks=networks,
            weights=weights,
            reconstruction_loss=reconstruction_loss,
        )
        self.quantizer = quantizer

    @property
    def quantizers(self) -> dict[str, Quantizer]:
        """The quantizers by level, coarsest first."""
        return {LEVEL: self.quantizer}

    @property
    def grids(self) -> dict[str, Grid]:
        """(h, w) of each level's codes."""
        return {LEVEL: self.latent_shape[:2]}

    def encode_indices(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, C, H, W) in [0, 1] → nearest codes (B, h, w) int64 by level, in eval mode."""
        return {LEVEL: self.quantizer(self.encode(images).mean)[1]}

    def decode_indices(self, indices: dict[str, Tensor]) -> Tensor:
        """Codes (B, h, w) integers by level → images (B, C, H, W) in [0, 1].

        Raises TypeError or ValueError where codes are not that, or of other levels or grids.
        """
        check_codes("indices", indices, self.grids)
        return self.decode(self.quantizer.get_output_from_indices(indices[LEVEL]))

    def forward(self, images: Tensor, labels: Tensor | None = None) -> TrainingStep:
        """The losses of a batch (B, C, H, W) in [0, 1]; labels are not looked at."""
        z = self.encode(images).z
        quantized, indices, quantizer_loss = self.quantizer(z)
        parts, loss = self.reconstruction_losses(self.decode(quantized), images)
        parts["quantizing_error"] = losses.quantizing_error(z.detach(), quantized.detach())
        loss = loss + self.weights.quantizing * quantizer_loss
        return TrainingStep({"loss": loss, **parts}, {LEVEL: z.detach()}, {LEVEL: indices})

    @torch.no_grad()
    def evaluate(self, images: Tensor, labels: Tensor | None = None) -> Evaluation:
        """The reconstruction and statistics of a batch (B, C, H, W) in [0, 1], in eval mode."""
        z = self.encode(images).mean
        quantized, indices, _ = self.quantizer(z)
        output = self.decode(quantized)
        return Evaluation(
            {"reconstruction_error": output, "reconstruction_hard_error": output},
            {"quantizing_error": losses.quantizing_error(z, quantized)},
            {LEVEL: indices},
        )
