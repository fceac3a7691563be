"""Quantizers as modules, with the call of vector-quantize-pytorch."""

from softvq.quantizers.restart import DeadCodeRestart
from softvq.quantizers.soft import SoftVQ, SoftVQLoss

__all__ = ["DeadCodeRestart", "SoftVQ", "SoftVQLoss"]
