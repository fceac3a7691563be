"""Quantizers as modules, with the call of vector-quantize-pytorch."""

from softvq.quantizers.annealing import Annealing
from softvq.quantizers.base import Quantizer
from softvq.quantizers.ema import EMAVQ, EMAVQLoss
from softvq.quantizers.gumbel import GumbelVQ, GumbelVQLoss
from softvq.quantizers.hard import VQ, VQLoss
from softvq.quantizers.restart import DeadCodeRestart
from softvq.quantizers.soft import SoftVQ, SoftVQLoss

__all__ = [
    "EMAVQ",
    "VQ",
    "Annealing",
    "DeadCodeRestart",
    "EMAVQLoss",
    "GumbelVQ",
    "GumbelVQLoss",
    "Quantizer",
    "SoftVQ",
    "SoftVQLoss",
    "VQLoss",
]
