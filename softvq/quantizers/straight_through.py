"""The nearest code with the gradient of the latent."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from softvq.functional import nearest_indices


class NearestCodes(NamedTuple):
    """What `nearest_straight_through` returns; (...) are the leading dimensions of z."""

    quantized: Tensor  # (..., D), dtype of z: the code's value, the gradient of z
    indices: Tensor  #   (...) int64


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, codes: Tensor) -> Tensor:
        return codes.to(z.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def straight_through(z: Tensor, codes: Tensor) -> Tensor:
    """The codes, bit by bit, in the dtype of z; their gradient goes to z, unchanged.

    z + sg[codes − z] has the same gradient, but its value is rounded twice.
    van den Oord et al. 2017, "Neural discrete representation learning", section 3.2.
    """
    return _StraightThrough.apply(z, codes)


def nearest_straight_through(z: Tensor, codebook: Tensor) -> NearestCodes:
    """z (..., D) and codebook (K, D), or (..., H, D) and (H, K, D), to the nearest codes."""
    indices = nearest_indices(z, codebook)
    return NearestCodes(straight_through(z, codes_at(codebook.detach(), indices)), indices)


def codes_at(codebook: Tensor, indices: Tensor) -> Tensor:
    """Codes (..., D) of indices (...) in (K, D); (..., H, D) of (..., H) in (H, K, D)."""
    if codebook.dim() == 2:
        return codebook[indices]
    # Of transposed indices come codes whose strides torch.compile does not foresee.
    return codebook[torch.arange(len(codebook), device=indices.device), indices.contiguous()]
