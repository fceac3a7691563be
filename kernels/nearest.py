"""The nearest code of every latent, fused: one matrix product and a running best, no N×K matrix.

`argmin ‖z − c‖²` is `argmax z·c − ½‖c‖²`. Neither a constant per row nor one positive factor per
row moves it, and every trick below is one of the two:

- float32 is centred by the codebook's mean, so that latents far from the origin lose no digits;
- operands are float16 after a division by a power of two, one per row of z and one per codebook,
  that brings the largest element to 2^13. A float32 then is the sum of two float16 to 22 bits
  (three products, the accuracy of float32 at a fifth of its price), and a bfloat16 is one float16
  exactly. The division is undone inside the fused multiply-add that adds the bias anyway.
"""

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from softvq.kernels import tiles
from softvq.kernels.primitives import load_codes, load_rows, split

Precision = Literal["highest", "high", "medium"]

EXPONENT_BITS = tl.constexpr(0x7F800000)  # of a float32: clearing the others leaves a power of two
LARGEST = tl.constexpr(2.0**13)  # a scaled element is below twice that, well within float16


@triton.jit
def scale_of(largest: tl.tensor) -> tl.tensor:
    """The power of two that brings `largest` (any shape, float32) to between 2^13 and 2^14."""
    bits = tl.maximum(largest, 1e-30).to(tl.int32, bitcast=True) & EXPONENT_BITS
    return bits.to(tl.float32, bitcast=True) / LARGEST


@triton.jit
def _nearest_kernel(
    z_pointer,
    mean_pointer,
    codes_pointer,
    bias_pointer,
    code_scale_pointer,
    indices_pointer,
    rows,
    padded_codes,
    z_stride_head,
    z_stride_row,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
):
    """One block of rows of one head against all its codes.

    z (H, N, DIM) with unit column stride · mean (H, PAD) · codes (H, parts, padded_codes, PAD)
    float16 · bias (H, padded_codes) · code_scale (H) · indices (H, N) int64
    """
    # 64 bits: every offset that grows with N or H.
    head = tl.program_id(1).to(tl.int64)
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    z_pointer += head * z_stride_head + first_row * z_stride_row
    indices_pointer += head * rows + first_row
    rows_left = rows - first_row

    # [ROWS, PAD]
    z = load_rows(z_pointer, z_stride_row, rows_left, ROWS, DIM, PAD).to(tl.float32)
    z -= tl.load(mean_pointer + head * PAD + tl.arange(0, PAD))[None, :]
    # [ROWS]
    z_scale = scale_of(tl.max(tl.abs(z), 1))
    # [ROWS, PAD]
    z_high, z_low = split(z / z_scale[:, None], tl.float16)
    # [ROWS]
    scale = z_scale * tl.load(code_scale_pointer + head)

    parts: tl.constexpr = 2 if SPLIT else 1
    codes_pointer += head * parts * padded_codes * PAD
    bias_pointer += head * padded_codes
    # [ROWS, CODES]: each lane remembers its own best and the block it came from, so
    # that no reduction across lanes stands inside the loop.
    best = tl.full([ROWS, CODES], float("-inf"), tl.float32)
    best_start = tl.zeros([ROWS, CODES], tl.int32)
    for start in range(0, padded_codes, CODES):
        # [CODES, PAD]
        codes_high = load_codes(codes_pointer + start * PAD, CODES, PAD)
        # [ROWS, CODES]
        product = tl.dot(z_high, codes_high.T)
        if SPLIT:
            codes_low = load_codes(codes_pointer + (padded_codes + start) * PAD, CODES, PAD)
            product = tl.dot(z_high, codes_low.T, product)
            product = tl.dot(z_low, codes_high.T, product)
        bias = tl.load(bias_pointer + start + tl.arange(0, CODES))
        score = tl.fma(product, scale[:, None], bias[None, :])
        # Strictly better only: the lowest index wins a tie, and a NaN never wins.
        best_start = tl.where(score > best, start, best_start)
        best = tl.maximum(best, score)

    # [ROWS]: of the lanes that hold the row's best, the lowest index.
    holds_best = best == tl.max(best, 1)[:, None]
    index = tl.min(tl.where(holds_best, best_start + tl.arange(0, CODES)[None, :], padded_codes), 1)
    row = tl.arange(0, ROWS)
    tl.store(indices_pointer + row, index.to(tl.int64), mask=row < rows_left)


def nearest(z: Tensor, codebook: Tensor, precision: Precision = "highest") -> Tensor:
    """Index of the nearest code, (H, N) int64; the lowest index wins a tie.

    z (H, N, D) and codebook (H, K, D): float32, bfloat16 or float16, any strides, D ≤ 256. When
    both are 16 bits their products are exact as they are; otherwise "highest" and "high" give the
    accuracy of float32 and "medium" rounds both to float16.
    """
    heads, rows, dim = z.shape
    if z.stride(2) != 1:
        z = z.contiguous()
    split_operands = torch.float32 in (z.dtype, codebook.dtype) and precision != "medium"
    operand = torch.float32 if split_operands else torch.float16  # by its bytes
    limit = tiles.shared_memory_limit(z.device)
    shape = tiles.choose("nearest", "split" if split_operands else "plain", dim, limit)
    codes = prepare_codes(codebook, z.dtype, split_operands)
    indices = z.new_empty((heads, rows), dtype=torch.int64)
    with torch.cuda.device_of(z):
        if rows:
            _nearest_kernel[(triton.cdiv(rows, shape.rows), heads)](
                *(z, *codes, indices, rows, codes.bias.shape[1], z.stride(0), z.stride(1)),
                DIM=dim,
                PAD=tiles.padded_dim(dim),
                SPLIT=split_operands,
                ROWS=shape.rows,
                CODES=shape.codes,
                num_warps=shape.warps,
                num_stages=shape.stages,
            )
    return indices


class Codes(NamedTuple):
    """A codebook ready for the kernel, in the order of its arguments."""

    mean: Tensor  # (H, padded D) float32, what was subtracted
    parts: Tensor  # (H, 1 or 2, padded K, padded D) float16
    bias: Tensor  # (H, padded K) float32, −½‖c‖², −∞ for a row of padding
    scale: Tensor  # (H) float32, a power of two: c = mean + scale · Σ parts


def prepare_codes(codebook: Tensor, z_dtype: torch.dtype, split_operands: bool) -> Codes:
    """Centre, scale, round and pad a codebook (H, K, D). A few small launches, no synchronisation.

    The bias comes from the rounded codes: the nearest of them is exact, whatever was rounded.
    """
    _, codes, dim = codebook.shape
    padding = (0, tiles.padded_dim(dim) - dim, 0, -codes % tiles.CODE_MULTIPLE)
    values = codebook.float()
    mean = values.mean(1)
    if torch.float32 not in (z_dtype, codebook.dtype):
        mean.zero_()  # centred they would have to be rounded again
    values = values - mean[:, None]
    largest = values.abs().amax((1, 2)).clamp(min=1e-30)
    scale = (largest.view(torch.int32) & EXPONENT_BITS.value).view(torch.float32) / LARGEST.value
    values = values / scale[:, None, None]
    high = values.half()
    parts = [high, (values - high).half()] if split_operands else [high]
    rounded = sum(part.float() for part in parts) * scale[:, None, None]
    bias = rounded.square().sum(2) * -0.5
    return Codes(
        pad(mean, padding[:2]),
        pad(torch.stack(parts, 1), padding),
        pad(bias, padding[2:], value=-torch.inf),
        scale,
    )
