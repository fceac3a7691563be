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

Precision = Literal["highest", "high", "medium"]

MAX_DIM = 256
EXPONENT_BITS = tl.constexpr(0x7F800000)  # of a float32: clearing the others leaves a power of two
LARGEST = tl.constexpr(2.0**13)  # a scaled element is below twice that, well within float16


@triton.jit
def scale_of(largest):
    """The power of two that brings `largest` (any shape, float32) to between 2^13 and 2^14."""
    bits = tl.maximum(largest, 1e-30).to(tl.int32, bitcast=True) & EXPONENT_BITS
    return bits.to(tl.float32, bitcast=True) / LARGEST


@triton.jit
def nearest_kernel(
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
    z_stride_dim,
    dim,
    SPLIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CODES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """One block of rows of one head against all its codes.

    z (H, N, D) any strides · mean (H, BLOCK_DIM) · codes (H, parts, padded_codes, BLOCK_DIM) float16
    · bias (H, padded_codes) · code_scale (H) · indices (H, N) int64
    """
    head = tl.program_id(1).to(tl.int64)
    # (BLOCK_ROWS), (BLOCK_DIM), (BLOCK_CODES)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_DIM)
    lane = tl.arange(0, BLOCK_CODES)

    # (BLOCK_ROWS, BLOCK_DIM)
    z = tl.load(
        z_pointer + head * z_stride_head + row[:, None] * z_stride_row + column * z_stride_dim,
        mask=(row[:, None] < rows) & (column < dim),
        other=0.0,
    ).to(tl.float32)
    z -= tl.load(mean_pointer + head * BLOCK_DIM + column)
    # (BLOCK_ROWS)
    z_scale = scale_of(tl.max(tl.abs(z), 1))
    # (BLOCK_ROWS, BLOCK_DIM)
    z = z / z_scale[:, None]
    z_high = z.to(tl.float16)
    z_low = (z - z_high.to(tl.float32)).to(tl.float16)
    # (BLOCK_ROWS)
    scale = z_scale * tl.load(code_scale_pointer + head)

    parts: tl.constexpr = 2 if SPLIT else 1
    codes_pointer += head * parts * padded_codes * BLOCK_DIM
    bias_pointer += head * padded_codes
    # (BLOCK_ROWS, BLOCK_CODES): each lane remembers its own best and the block it came from, so
    # that no reduction across lanes stands inside the loop.
    best = tl.full([BLOCK_ROWS, BLOCK_CODES], float("-inf"), tl.float32)
    best_start = tl.zeros([BLOCK_ROWS, BLOCK_CODES], tl.int32)
    for start in range(0, padded_codes, BLOCK_CODES):
        # (BLOCK_DIM, BLOCK_CODES)
        offsets = column[:, None] + (start + lane) * BLOCK_DIM
        codes_high = tl.load(codes_pointer + offsets)
        # (BLOCK_ROWS, BLOCK_CODES)
        product = tl.dot(z_high, codes_high)
        if SPLIT:
            codes_low = tl.load(codes_pointer + padded_codes * BLOCK_DIM + offsets)
            product = tl.dot(z_high, codes_low, product)
            product = tl.dot(z_low, codes_high, product)
        score = tl.fma(product, scale[:, None], tl.load(bias_pointer + start + lane)[None, :])
        # Strictly better only: the lowest index wins a tie, and a NaN never wins.
        better = score > best
        best = tl.where(better, score, best)
        best_start = tl.where(better, start, best_start)

    # (BLOCK_ROWS): of the lanes that hold the row's best, the lowest index.
    candidate = tl.where(best == tl.max(best, 1)[:, None], best_start + lane, padded_codes)
    tl.store(indices_pointer + head * rows + row, tl.min(candidate, 1).to(tl.int64), row < rows)


class Tile(NamedTuple):
    """The shape of one program, and how it runs."""

    rows: int
    codes: int
    warps: int
    stages: int


def tile(block_dim: int, split: bool, capability: tuple[int, int]) -> Tile:
    """The tile for a padded dimension; every choice is spill-free (`python -m bench compile`)."""
    return Tile(64, 64, 4, 2)


def nearest(z: Tensor, codebook: Tensor, precision: Precision = "highest") -> Tensor:
    """Index of the nearest code, (H, N) int64; the lowest index wins a tie.

    z (H, N, D) and codebook (H, K, D): float32, bfloat16 or float16, any strides, D ≤ 256. When
    both are 16 bits their products are exact as they are; otherwise "highest" and "high" give the
    accuracy of float32 and "medium" rounds both to float16.
    """
    heads, rows, dim = z.shape
    split = torch.float32 in (z.dtype, codebook.dtype) and precision != "medium"
    block_dim = max(16, triton.next_power_of_2(dim))
    shape = tile(block_dim, split, capability(z.device))
    codes = prepare_codes(codebook, z.dtype, split, block_dim, shape.codes)
    indices = z.new_empty((heads, rows), dtype=torch.int64)
    if rows:
        nearest_kernel[(triton.cdiv(rows, shape.rows), heads)](
            *(z, *codes, indices, rows, codes.bias.shape[1], *z.stride(), dim),
            SPLIT=split,
            BLOCK_ROWS=shape.rows,
            BLOCK_CODES=shape.codes,
            BLOCK_DIM=block_dim,
            num_warps=shape.warps,
            num_stages=shape.stages,
        )
    return indices


class Codes(NamedTuple):
    """A codebook ready for the kernel, in the order of its arguments."""

    mean: Tensor  # (H, block_dim) float32, what was subtracted
    parts: Tensor  # (H, 1 or 2, padded K, block_dim) float16
    bias: Tensor  # (H, padded K) float32, −½‖c‖², −∞ for a row of padding
    scale: Tensor  # (H) float32, a power of two: c = mean + scale · Σ parts


def prepare_codes(
    codebook: Tensor, z_dtype: torch.dtype, split: bool, block_dim: int, block_codes: int
) -> Codes:
    """Centre, scale, round and pad a codebook (H, K, D). A few small launches, no synchronisation.

    The bias comes from the rounded codes: the nearest of them is exact, whatever was rounded.
    """
    heads, codes, dim = codebook.shape
    padding = (0, block_dim - dim, 0, -codes % block_codes)
    values = codebook.float()
    mean = values.mean(1)
    if torch.float32 not in (z_dtype, codebook.dtype):
        mean.zero_()  # centred they would have to be rounded again
    values = values - mean[:, None]
    largest = values.abs().amax((1, 2)).clamp(min=1e-30)
    scale = (largest.view(torch.int32) & EXPONENT_BITS.value).view(torch.float32) / LARGEST.value
    values = values / scale[:, None, None]
    high = values.half()
    parts = [high, (values - high).half()] if split else [high]
    rounded = sum(part.float() for part in parts) * scale[:, None, None]
    bias = rounded.square().sum(2) * -0.5
    return Codes(
        pad(mean, padding[:2]),
        pad(torch.stack(parts, 1), padding),
        pad(bias, padding[2:], value=-torch.inf),
        scale,
    )


def capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU; the interpreter stands in for the smallest supported one."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
