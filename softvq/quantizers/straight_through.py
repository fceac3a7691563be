"""The nearest code, and the gradients that reach its latent in its place."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from softvq.functional import nearest_indices
from softvq.losses import in_float32


class NearestCodes(NamedTuple):
    """What `nearest_straight_through` returns; (...) are the leading dimensions of z."""

    quantized: Tensor  # (..., D), dtype of z: the code's value, a gradient for z
    indices: Tensor  #   (...) int64


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, codes: Tensor) -> Tensor:
        return codes.to(z.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(z, codes)
        return codes.to(z.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        z, codes = (in_float32(x.detach()) for x in ctx.saved_tensors)
        g = in_float32(grad)
        z_length, length = (x.norm(dim=-1, keepdim=True) for x in (z, codes))
        start, end = z / z_length, codes / length
        middle = normalize(start + end, dim=-1)
        # Rᵀg, where R = I − 2·middle·middleᵀ + 2·end·startᵀ turns start into end
        turned = g - 2 * _dot(g, middle) * middle + 2 * _dot(g, end) * start
        turns = (length > 0) & (z_length > 0)
        return torch.where(turns, length / z_length * turned, g).to(grad.dtype), None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def straight_through(z: Tensor, codes: Tensor, rotated: bool = False) -> Tensor:
    """The codes, bit by bit, in the dtype of z; their gradient goes to z, unchanged.

    z + sg[codes − z] has the same gradient, but its value is rounded twice.
    van den Oord et al. 2017, "Neural discrete representation learning", section 3.2.

    With `rotated` each row's gradient is that of code = (‖code‖/‖z‖)·R·z, R the rotation from z to
    the code in their plane, both factors constants: it has the angle to z that it had to the code.
    Fifty et al. 2024, "Restructuring vector quantization with the rotation trick", section 4. Rows
    of length 0, of z or codes, get it unchanged.
    """
    return (_Rotated if rotated else _StraightThrough).apply(z, codes)


def nearest_straight_through(z: Tensor, codebook: Tensor, rotated: bool = False) -> NearestCodes:
    """z (..., D) and codebook (K, D), or (..., H, D) and (H, K, D), to the nearest codes."""
    indices = nearest_indices(z, codebook)
    codes = codes_at(codebook.detach(), indices)
    return NearestCodes(straight_through(z, codes, rotated), indices)


def codes_at(codebook: Tensor, indices: Tensor) -> Tensor:
    """Codes (..., D) of indices (...) in (K, D); (..., H, D) of (..., H) in (H, K, D)."""
    if codebook.dim() == 2:
        return codebook[indices]
    # Of transposed indices come codes whose strides torch.compile does not foresee.
    return codebook[torch.arange(len(codebook), device=indices.device), indices.contiguous()]
