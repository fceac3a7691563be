"""The codebook as the kernels read it: centred, scaled, rounded, split, padded, with its norms."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from softvq.kernels import tiles
from softvq.kernels.arithmetic import Arithmetic
from softvq.kernels.memory import load_rows
from softvq.kernels.primitives import LARGEST, PADDING_NORM, split

_CODES = 16  # codes per program


class PreparedCodebook(NamedTuple):
    """c = mean + scale · (high + low). K and D are padded: to a multiple of the largest tile, and
    to a power of two from 16. None for what this arithmetic leaves out.
    """

    high: Tensor  # (H, K, D), operand dtype
    low: Tensor | None  # (H, K, D)
    half_norm: Tensor  # (H, K) float32, ½‖high + low‖², or that of padding
    mean: Tensor | None  # (H, D) float32, as padded
    scale: Tensor | None  # (H) float32, a power of two


def prepare(
    codebook: Tensor, how: Arithmetic, temperature: Tensor | None = None
) -> PreparedCodebook:
    """One small kernel over the codebook (H, K, D), and reductions of it where it is moved.

    The temperature () is the softmax's, if there is to be one.
    """
    heads, codes, dim = codebook.shape
    pad = tiles.padded_dim(dim)
    padded_codes = triton.cdiv(codes, tiles.CODE_MULTIPLE) * tiles.CODE_MULTIPLE
    if codebook.stride(2) != 1:
        codebook = codebook.contiguous()
    mean = scale = None
    if how.centre:
        mean = codebook.new_zeros((heads, pad), dtype=torch.float32)
        mean[:, :dim] = codebook.mean(1, dtype=torch.float32)
    if how.operand == torch.float16:
        scale = _scale(codebook, None if mean is None else mean[:, :dim])
    high = codebook.new_empty((heads, padded_codes, pad), dtype=how.operand)
    low = torch.empty_like(high) if how.split_codebook else None
    half_norm = codebook.new_empty((heads, padded_codes), dtype=torch.float32)
    _prepare_kernel[(padded_codes // _CODES, heads)](
        *(codebook, mean, scale, temperature, high, low, half_norm),
        *(codebook.stride(0), codebook.stride(1), codes, padded_codes),
        DIM=dim,
        PAD=pad,
        CODES=_CODES,
        num_warps=max(4, pad // 32),
        enable_fp_fusion=True,
    )
    return PreparedCodebook(high, low, half_norm, mean, scale)


def _scale(codebook: Tensor, mean: Tensor | None) -> Tensor:
    """The power of two (H) that brings the codes' largest element to between 2^13 and 2^14."""
    lowest, highest = codebook.amin(1).float(), codebook.amax(1).float()
    if mean is not None:
        lowest, highest = lowest - mean, highest - mean
    largest = torch.maximum(highest, -lowest).amax(1)
    # Below it the square of the scale, times PADDING_NORM, would weigh nothing.
    bits = largest.clamp(min=1e-6).view(torch.int32) & 0x7F800000
    return bits.view(torch.float32) / LARGEST.value


@triton.jit
def _prepare_kernel(
    codebook_pointer,
    mean_pointer,
    scale_pointer,
    temperature_pointer,
    high_pointer,
    low_pointer,
    half_norm_pointer,
    head_stride,
    code_stride,
    codes,
    padded_codes,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    CODES: tl.constexpr,
):
    start = tl.program_id(0) * CODES
    head = tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, PAD)
    offsets = start + tl.arange(0, CODES)
    out = (head * padded_codes + offsets[:, None]) * PAD + dims[None, :]

    source = codebook_pointer + head * head_stride + start.to(tl.int64) * code_stride
    # [CODES, PAD]
    code = load_rows(source, code_stride, codes - start, CODES, DIM, PAD).to(tl.float32)
    if mean_pointer is not None:
        code -= tl.load(mean_pointer + head * PAD + dims)[None, :]
        code = tl.where((offsets < codes)[:, None], code, 0.0)
    padding_norm = PADDING_NORM
    if temperature_pointer is not None:
        padding_norm *= tl.minimum(tl.load(temperature_pointer).to(tl.float32), 1.0)
    if scale_pointer is not None:
        scale = tl.load(scale_pointer + head)
        code /= scale
        padding_norm = tl.minimum(padding_norm / (scale * scale), 1e37)
    high, low = split(code, high_pointer.dtype.element_ty)
    tl.store(high_pointer + out, high)
    code = high.to(tl.float32)
    if low_pointer is not None:
        tl.store(low_pointer + out, low)
        code += low.to(tl.float32)
    # The norm of what is multiplied, not of what was given: rounding then moves a code a little
    # instead of tilting its scores.
    half_norm = tl.where(offsets < codes, 0.5 * tl.sum(code * code, 1), padding_norm)
    tl.store(half_norm_pointer + head * padded_codes + offsets, half_norm)
