"""The two-level VQ-VAE-2."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from softvq import losses
from softvq.models.base import ImageModel
from softvq.models.checks import check_codes, check_images, check_layout
from softvq.models.networks import Grid, Networks, Shape, halved
from softvq.models.outputs import Evaluation, LossWeights, TrainingStep
from softvq.quantizers import Quantizer

TOP, BOTTOM = "top", "bottom"


class Level(NamedTuple):
    """One level of a batch: what its quantizer read and what it returned."""

    z: Tensor  #         (B, h, w, D)
    quantized: Tensor  # (B, h, w, D)
    indices: Tensor  #   (B, h, w) int64
    loss: Tensor  #      0-d


class VQVAE2(ImageModel):
    """Codes on two grids, the fine one conditioned on the coarse one.

    Razavi et al. 2019, "Generating diverse high-fidelity images with VQ-VAE-2", figure 2a and
    algorithm 1: the bottom features go on to the top encoder; the top codes, decoded to the bottom
    grid, join the bottom features before those are quantised; the decoder reads both codes.

    Args:
        latent_grid: (h, w) of the bottom codes; the top grid is half of it, rounded up.
        top, bottom: the quantizers, both of one dimension D, channels last. The paper's are EMAVQ.
        networks: the kind and size of encoders and decoders.
        others: as for EncoderDecoder.

    Raises TypeError or ValueError of quantizers that are none, of two dimensions, or not channels
    last.
    """

    def __init__(
        self,
        image_shape: Shape,
        latent_grid: Grid,
        top: Quantizer,
        bottom: Quantizer,
        *,
        networks: Networks = Networks(),
        weights: LossWeights = LossWeights(kl=0.0),
        reconstruction_loss: losses.Difference = "squared",
    ):
        check_layout(top=top, bottom=bottom)
        if top.dim != bottom.dim:
            raise ValueError(f"top and bottom must have one dim, got {top.dim} and {bottom.dim}")
        super().__init__(image_shape, weights, reconstruction_loss)
        dim, features = bottom.dim, 2 * networks.width
        maps = (features, *latent_grid)  # the bottom features, as a picture
        self.latent_grid, self.top_grid = tuple(latent_grid), halved(latent_grid)
        self.encoder = networks.encoder(image_shape, latent_grid, features)
        self.top_encoder = networks.encoder(maps, self.top_grid, dim)
        self.top_decoder = networks.decoder(maps, self.top_grid, dim)
        self.join = nn.Linear(2 * features, dim)
        self.decoder = networks.decoder(image_shape, latent_grid, 2 * dim)
        self.top, self.bottom = top, bottom
        self.standardise = nn.ModuleDict(
            {
                "features": nn.BatchNorm2d(features, affine=False),
                TOP: nn.BatchNorm1d(dim, affine=False),
                BOTTOM: nn.BatchNorm1d(dim, affine=False),
            }
        )

    @property
    def quantizers(self) -> dict[str, Quantizer]:
        """The quantizers by level, coarsest first."""
        return {TOP: self.top, BOTTOM: self.bottom}

    @property
    def grids(self) -> dict[str, Grid]:
        """(h, w) of each level's codes."""
        return {TOP: self.top_grid, BOTTOM: self.latent_grid}

    def decode(self, top: Tensor, bottom: Tensor) -> Tensor:
        """Codes top (B, h', w', D) and bottom (B, h, w, D) → images (B, C, H, W) in [0, 1]."""
        # (B, h, w, D)
        top = interpolate(top.permute(0, 3, 1, 2), self.latent_grid).permute(0, 2, 3, 1)
        return losses.in_float32(self.decoder(torch.cat([top, bottom], -1))).sigmoid()

    def encode_indices(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, C, H, W) in [0, 1] → nearest codes (B, h, w) int64 by level, in eval mode."""
        return {name: level.indices for name, level in self._quantise(images).items()}

    def decode_indices(self, indices: dict[str, Tensor]) -> Tensor:
        """Codes (B, h, w) integers by level → images (B, C, H, W) in [0, 1].

        Raises TypeError or ValueError where codes are not that, or of other levels or grids.
        """
        check_codes("indices", indices, self.grids)
        codes = {
            level: quantizer.get_output_from_indices(indices[level])
            for level, quantizer in self.quantizers.items()
        }
        return self.decode(codes[TOP], codes[BOTTOM])

    def _quantise(self, images: Tensor) -> dict[str, Level]:
        check_images(images, self.image_shape)
        # (B, features, h, w)
        features = self.standardise["features"](self.encoder(images).permute(0, 3, 1, 2))
        z_top = self._standardised(TOP, self.top_encoder(features))
        top = Level(z_top, *self.top(z_top))
        decoded = self.top_decoder(top.quantized)  # (B, features, h, w)
        joined = self.join(torch.cat([features, decoded], 1).permute(0, 2, 3, 1))
        z_bottom = self._standardised(BOTTOM, joined)
        return {TOP: top, BOTTOM: Level(z_bottom, *self.bottom(z_bottom))}

    def _standardised(self, level: str, z: Tensor) -> Tensor:
        return self.standardise[level](z.flatten(0, 2)).view(z.shape)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> TrainingStep:
        """The losses of a batch (B, C, H, W) in [0, 1]; labels are not looked at."""
        levels = self._quantise(images)
        output = self.decode(levels[TOP].quantized, levels[BOTTOM].quantized)
        parts, loss = self.reconstruction_losses(output, images)
        parts |= _quantizing_errors(levels)
        loss = loss + self.weights.quantizing * sum(level.loss for level in levels.values())
        return TrainingStep(
            {"loss": loss, **parts},
            {name: level.z.detach() for name, level in levels.items()},
            {name: level.indices for name, level in levels.items()},
        )

    @torch.no_grad()
    def evaluate(self, images: Tensor, labels: Tensor | None = None) -> Evaluation:
        """The reconstruction and statistics of a batch (B, C, H, W) in [0, 1], in eval mode."""
        levels = self._quantise(images)
        output = self.decode(levels[TOP].quantized, levels[BOTTOM].quantized)
        return Evaluation(
            {"reconstruction_error": output, "reconstruction_hard_error": output},
            _quantizing_errors(levels),
            {name: level.indices for name, level in levels.items()},
        )


def _quantizing_errors(levels: dict[str, Level]) -> dict[str, Tensor]:
    return {
        f"quantizing_error_{name}": losses.quantizing_error(
            level.z.detach(), level.quantized.detach()
        )
        for name, level in levels.items()
    }
