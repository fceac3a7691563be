"""Autoencoders."""

from softvq.models.soft_vqvae import SoftVQVAE

__all__ = ["SoftVQVAE"]
