"""Autoencoders without codes: AE, VAE and conditional VAE."""

import torch
from torch import Tensor

from softvq.models.encoder_decoder import EncoderDecoder
from softvq.models.outputs import Evaluation, TrainingStep


class Autoencoder(EncoderDecoder):
    """Encoder → μ, log σ² → z → decoder; with a KL weight of zero, encoder → z → decoder.

    The variational one is Kingma and Welling 2014, "Auto-encoding variational Bayes"; with classes
    the conditional one of Sohn et al. 2015, "Learning structured output representation using deep
    conditional generative models": encoder and decoder both see the label.
    """

    absent_losses = ("reconstruction_quantizing",)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> TrainingStep:
        """The losses of a batch (B, C, H, W) in [0, 1] with labels (B,) int64."""
        latents = self.encode(images, labels)
        parts, loss = self.reconstruction_losses(self.decode(latents.z, labels), images)
        kl = self.kl(latents)
        loss = loss + self.weights.kl * sum(kl.values())
        return TrainingStep({"loss": loss, **parts, **kl}, {}, {})

    @torch.no_grad()
    def evaluate(self, images: Tensor, labels: Tensor | None = None) -> Evaluation:
        """The reconstruction and statistics of a batch (B, C, H, W) in [0, 1], in eval mode."""
        latents = self.encode(images, labels)
        output = self.decode(latents.mean, labels)
        return Evaluation({"reconstruction_error": output}, self.kl(latents), {})

    @torch.no_grad()
    def sample(self, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images (count, C, H, W) decoded from z ~ N(0, 1), of the classes `labels` (count,) int64.

        That is the prior of a variational model. A deterministic one has none: its latents share
        only the prior's mean and variance. A model without classes counts the labels only.
        """
        z = torch.randn(len(labels), *self.latent_shape, generator=generator, device=labels.device)
        return self.decode(z.to(next(self.decoder.parameters()).dtype), labels)
