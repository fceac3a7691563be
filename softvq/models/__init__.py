"""Autoencoders, and priors over their codes."""

from softvq.models.autoencoder import Autoencoder
from softvq.models.base import LEVEL, CodeLevel, ImageModel, level_suffix
from softvq.models.networks import Networks
from softvq.models.outputs import Evaluation, Latents, LossWeights, TrainingStep
from softvq.models.pixelcnn import PixelCNN
from softvq.models.prior import CodePrior
from softvq.models.soft_vqvae import SoftVQVAE
from softvq.models.vqvae import VQVAE
from softvq.models.vqvae2 import VQVAE2

__all__ = [
    "LEVEL",
    "VQVAE",
    "VQVAE2",
    "Autoencoder",
    "CodeLevel",
    "CodePrior",
    "Evaluation",
    "ImageModel",
    "Latents",
    "LossWeights",
    "Networks",
    "PixelCNN",
    "SoftVQVAE",
    "TrainingStep",
    "level_suffix",
]
