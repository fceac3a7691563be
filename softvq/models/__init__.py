"""Autoencoders."""

from softvq.models.pixelcnn import CodeLevel, CodePrior, PixelCNN
from softvq.models.soft_vqvae import SoftVQVAE

__all__ = ["CodeLevel", "CodePrior", "PixelCNN", "SoftVQVAE"]
