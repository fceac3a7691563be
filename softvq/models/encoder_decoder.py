"""Encoder and decoder around a latent, with or without codes between them."""

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from softvq import losses
from softvq.models.base import ImageModel
from softvq.models.checks import check_images, check_labels
from softvq.models.networks import Grid, Networks, Shape
from softvq.models.outputs import Latents, LossWeights


class EncoderDecoder(ImageModel):
    """Images → encoder → μ, log σ² → z; latents → decoder → images.

    With a KL weight of zero the encoder is deterministic, z = μ, and z is standardised.

    Args:
        image_shape: (C, H, W), any size.
        latent_grid: (h, w) latent vectors per image, each of latent_dim features.
        networks: the kind and size of encoder and decoder.
        weights: of the losses.
        reconstruction_loss: "squared" or "absolute" differences, for training only.
        classes: of the labels that encoder and decoder see; 0: they see none.
    """

    def __init__(
        self,
        image_shape: Shape,
        latent_grid: Grid,
        latent_dim: int,
        *,
        networks: Networks = Networks(),
        weights: LossWeights = LossWeights(),
        reconstruction_loss: losses.Difference = "squared",
        classes: int = 0,
    ):
        super().__init__(image_shape, weights, reconstruction_loss)
        self.latent_shape = (*latent_grid, latent_dim)
        self.classes = classes
        self.variational = weights.kl > 0
        features = 2 * latent_dim if self.variational else latent_dim
        channels, height, width = image_shape
        self.encoder = networks.encoder((channels + classes, height, width), latent_grid, features)
        self.decoder = networks.decoder(image_shape, latent_grid, latent_dim + classes)
        # Nothing else would hold the scale of a latent that no KL sees; a code's temperature and a
        # sample from the prior both need one.
        self.standardise = (
            nn.Identity() if self.variational else nn.BatchNorm1d(latent_dim, affine=False)
        )

    def encode(self, images: Tensor, labels: Tensor | None = None) -> Latents:
        """Images (B, C, H, W) in [0, 1], labels (B,) integers → latents (B, h, w, D).

        Raises TypeError or ValueError where they are not that, or labels are missing.
        """
        check_images(images, self.image_shape)
        if self.classes:
            # (B, classes, H, W): each image's class is a map of ones.
            maps = self._one_hot(labels, images)[..., None, None].expand(-1, -1, *images.shape[2:])
            images = torch.cat([images, maps], 1)
        features = self.encoder(images)
        if not self.variational:
            z = self.standardise(features.flatten(0, 2)).view(features.shape)
            return Latents(z, z, None)
        mean, logvar = features.chunk(2, -1)
        z = mean + (0.5 * logvar).exp() * torch.randn_like(mean) if self.training else mean
        return Latents(z, mean, logvar)

    def kl(self, latents: Latents) -> dict[str, Tensor]:
        """The divergence from the prior, nats an image, (), by its name; nothing without a σ."""
        if latents.logvar is None:
            return {}
        return {"kl": losses.kl_divergence(latents.mean, latents.logvar)}

    def decode(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Latents or codes (B, h, w, D), labels (B,) integers → images (B, C, H, W) in [0, 1].

        Raises TypeError or ValueError where labels are not that, or missing.
        """
        if self.classes:
            # (B, h, w, classes)
            ones = self._one_hot(labels, latents)[:, None, None].expand(*latents.shape[:3], -1)
            latents = torch.cat([latents, ones], -1)
        return losses.in_float32(self.decoder(latents)).sigmoid()

    def _one_hot(self, labels: Tensor | None, like: Tensor) -> Tensor:
        if labels is None:
            raise ValueError(f"labels: a model of {self.classes} classes needs them, got None")
        check_labels(labels, 0, self.classes, len(like))
        return one_hot(labels.long(), self.classes).to(like.dtype)
