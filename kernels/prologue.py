"""The codebook as the kernels read it: centred, rounded, split, padded, with its norms."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from softvq.kernels import tiles
from softvq.kernels.primitives import PADDING_NORM, load_rows, round_to, split

_CODES = 32  # codes per program

TRITON_DTYPE = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}


class Arithmetic(NamedTuple):
    """How the products of one call are computed."""

    operand: torch.dtype  # of the products; float32 means three tf32 products
    split_latents: bool  # the score product takes z as a high and a low part
    split_codebook: bool  # and the codes likewise
    centre: bool  # subtract the codebook's mean first


def arithmetic(z: Tensor, codebook: Tensor, precision: str) -> Arithmetic:
    """The arithmetic for these dtypes; `precision` speaks for float32 latents only.

    Centring 16-bit latents would round them again, where their products are exact as they are.
    """
    if z.dtype == torch.float32:
        if precision == "highest":
            return Arithmetic(torch.float32, False, False, True)
        high = precision == "high"
        return Arithmetic(torch.bfloat16, high, high, True)
    return Arithmetic(z.dtype, False, codebook.dtype != z.dtype, False)


class PreparedCodebook(NamedTuple):
    """K and D are padded: to a multiple of the largest tile, and to a power of two from 16."""

    high: Tensor  # (H, K, D), operand dtype
    low: Tensor  # (H, K, D), what `high` leaves out; `high` itself when nothing is split
    half_norm: Tensor  # (H, K) float32, ½‖c‖² of the rounded code, or PADDING_NORM
    mean: Tensor  # (H, D) float32, zero without centring


def prepare(codebook: Tensor, how: Arithmetic) -> PreparedCodebook:
    """One small kernel over the codebook (H, K, D)."""
    heads, codes, dim = codebook.shape
    pad = tiles.padded_dim(dim)
    padded_codes = triton.cdiv(codes, tiles.CODE_MULTIPLE) * tiles.CODE_MULTIPLE
    if codebook.stride(2) != 1:
        codebook = codebook.contiguous()
    high = codebook.new_empty((heads, padded_codes, pad), dtype=how.operand)
    low = torch.empty_like(high) if how.split_codebook else high
    half_norm = codebook.new_empty((heads, padded_codes), dtype=torch.float32)
    mean = codebook.new_zeros((heads, pad), dtype=torch.float32)
    if how.centre:
        mean[:, :dim] = codebook.mean(1, dtype=torch.float32)
    _prepare_kernel[(padded_codes // _CODES, heads)](
        *(codebook, mean, high, low, half_norm),
        *(codebook.stride(0), codebook.stride(1), codes, padded_codes),
        SPLIT=how.split_codebook,
        DIM=dim,
        PAD=pad,
        CODES=_CODES,
    )
    return PreparedCodebook(high, low, half_norm, mean)


@triton.jit
def _prepare_kernel(
    codebook_pointer,
    mean_pointer,
    high_pointer,
    low_pointer,
    half_norm_pointer,
    head_stride,
    code_stride,
    codes,
    padded_codes,
    SPLIT: tl.constexpr,
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
    code -= tl.load(mean_pointer + head * PAD + dims)[None, :]
    code = tl.where((offsets < codes)[:, None], code, 0.0)
    if SPLIT:
        high, low = split(code, high_pointer.dtype.element_ty)
        tl.store(low_pointer + out, low)
        code = high.to(tl.float32) + low.to(tl.float32)
    else:
        high = round_to(code, high_pointer.dtype.element_ty)
        code = high.to(tl.float32)
    tl.store(high_pointer + out, high)
    # The norm of what is multiplied, not of what was given: rounding then moves a code a little
    # instead of tilting its scores.
    half_norm = tl.where(offsets < codes, 0.5 * tl.sum(code * code, 1), PADDING_NORM)
    tl.store(half_norm_pointer + head * padded_codes + offsets, half_norm)
