"""Autoencoders."""

from softvq.models.autoencoder import Autoencoder
from softvq.models.base import LEVEL, ImageModel, level_suffix
from softvq.models.networks import Networks
from softvq.models.outputs import Evaluation, Latents, LossWeights, TrainingStep
from softvq.models.soft_vqvae import SoftVQVAE
from softvq.models.vqvae import VQVAE
from softvq.models.vqvae2 import VQVAE2

__all__ = [
    "LEVEL",
    "VQVAE",
    "VQVAE2",
    "Autoencoder",
    "Evaluation",
    "ImageModel",
    "Latents",
    "LossWeights",
    "Networks",
    "SoftVQVAE",
    "TrainingStep",
    "level_suffix",
]
