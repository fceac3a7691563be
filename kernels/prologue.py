"""The codebook as the kernels read it: centred, scaled, rounded, split, padded, with its norms."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from softvq.kernels import tiles
from softvq.kernels.arithmetic import Arithmetic
from softvq.kernels.centre import centre_of
from softvq.kernels.memory import load_rows
from softvq.kernels.primitives import PADDING_NORM, scale_of, split

_CODES = 16  # codes per program


class PreparedCodebook(NamedTuple):
    """c = centre + scale · (high + low). K and D are padded: to a multiple of the largest tile, and
    to a power of two from 16. None for what this arithmetic leaves out.
    """

    high: Tensor  # (H, K, D), operand dtype
    low: Tensor | None  # (H, K, D)
    half_norm: Tensor  # (H, K) float32, ½‖high + low‖², or that of padding
    centre: Tensor | None  # (H, D) float32, as padded
    scale: Tensor | None  # (H) float32, a power of two


def prepare(
    codebook: Tensor, how: Arithmetic, temperature: Tensor | None = None
) -> PreparedCodebook:
    """Small kernels over the codebook (H, K, D), and reductions of it where it is scaled.

    The temperature () is the softmax's, if there is to be one.
    """
    heads, codes, dim = codebook.shape
    pad = tiles.padded_dim(dim)
    padded_codes = triton.cdiv(codes, tiles.CODE_MULTIPLE) * tiles.CODE_MULTIPLE
    if codebook.stride(2) != 1:
        codebook = codebook.contiguous()
    centre = scale = None
    if how.centre:
        centre = codebook.new_zeros((heads, pad), dtype=torch.float32)
        centre[:, :dim] = centre_of(codebook)[:, 0]
    if how.operand == torch.float16:
        scale = codebook.new_empty(heads, dtype=torch.float32)
        _scale_kernel[(heads,)](
            *(codebook.amin(1), codebook.amax(1), centre, temperature, scale), DIM=dim, PAD=pad
        )
    high = codebook.new_empty((heads, padded_codes, pad), dtype=how.operand)
    low = torch.empty_like(high) if how.split_codebook else None
    half_norm = codebook.new_empty((heads, padded_codes), dtype=torch.float32)
    _prepare_kernel[(padded_codes // _CODES, heads)](
        *(codebook, centre, scale, temperature, high, low, half_norm),
        *(codebook.stride(0), codebook.stride(1), codes, padded_codes),
        DIM=dim,
        PAD=pad,
        CODES=_CODES,
        num_warps=max(4, pad // 32),
        enable_fp_fusion=True,
    )
    return PreparedCodebook(high, low, half_norm, centre, scale)


@triton.jit
def _scale_kernel(
    lowest_pointer,
    highest_pointer,
    centre_pointer,
    temperature_pointer,
    scale_pointer,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
):
    """One head: from the least and greatest codes by coordinate, the power of two that brings the
    largest element to between 2^13 and 2^14.
    """
    head = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, PAD)
    offsets = head * DIM + dims
    inside = dims < DIM
    # [PAD]
    lowest = tl.load(lowest_pointer + offsets, mask=inside, other=0.0).to(tl.float32)
    highest = tl.load(highest_pointer + offsets, mask=inside, other=0.0).to(tl.float32)
    if centre_pointer is not None:
        centre = tl.load(centre_pointer + head * PAD + dims)
        lowest -= centre
        highest -= centre
    # Below it the square of the scale, times the norm of padding, would weigh nothing beside T.
    least = 1e-6
    if temperature_pointer is not None:
        temperature = tl.load(temperature_pointer).to(tl.float32)
        least = tl.maximum(1e-13 * tl.sqrt(temperature), least)
    largest = tl.max(tl.maximum(highest, -lowest), 0)
    tl.store(scale_pointer + head, scale_of(tl.maximum(largest, least)))


@triton.jit
def _prepare_kernel(
    codebook_pointer,
    centre_pointer,
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
    if centre_pointer is not None:
        code -= tl.load(centre_pointer + head * PAD + dims)[None, :]
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
