"""Metrics counted over a whole split; per-batch averages of usage and perplexity mislead."""

import math
from typing import Any

import torch
from torch import Tensor


def codebook_usage(counts: Tensor, share: float = 0.0) -> float:
    """Fraction of codes that were the nearest one at least once; counts (..., K) int64.

    share: and for at least this part of their even share of the latents.
    """
    least = (share * counts.double().mean(-1, keepdim=True)).clamp(min=1)
    return (counts >= least).double().mean().item()


def perplexity(counts: Tensor) -> float:
    """exp of the entropy of the codes' frequencies; counts (..., K), the mean over heads."""
    p = counts.double() / counts.sum(-1, keepdim=True)
    return torch.special.entr(p).sum(-1).exp().mean().item()


def psnr(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error on [0, 1] pixels."""
    return -10 * math.log10(max(mean_squared_error, 1e-20))


class Mean:
    """Weighted means of named scalars, summed in float64 where they are computed."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weight = 0

    def add(self, values: dict[str, Tensor], weight: int) -> None:
        """Count each 0-d tensor `weight` times; nothing is read back to the host."""
        for name, value in values.items():
            total = self._sums.get(name, 0)
            self._sums[name] = total + value.detach().double() * weight
        self._weight += weight

    def read(self) -> dict[str, float]:
        """The means so far, and start anew."""
        means = {name: (total / self._weight).item() for name, total in self._sums.items()}
        self._sums, self._weight = {}, 0
        return means

    def state_dict(self) -> dict[str, Any]:
        """The sums so far, for a checkpoint."""
        return {"sums": self._sums, "weight": self._weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the sums of `state_dict`."""
        self._sums, self._weight = state["sums"], state["weight"]
