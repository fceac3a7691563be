"""What the kernels multiply: rows and codes as operands, in parts of their columns.

One program of a kernel with PARTS > 1 has the scores of whole rows and codes, but owns only one
part of the columns of its output: the sums of 256 columns and what else a program needs are more
than its registers hold. A matrix in parts is a tuple of tiles. Each part of the output repeats the
products of the scores. Then nothing is hoisted out of a loop either (`disable_licm`), or the
addresses of so many tiles would fill the registers.
"""

import triton
import triton.language as tl

from softvq.kernels.memory import load_centre, load_columns, load_rows
from softvq.kernels.primitives import as_operand, dot, scale_of


@triton.jit
def load_codes(
    high_pointer: tl.tensor,
    low_pointer: tl.tensor | None,
    first: tl.tensor,
    codes: tl.tensor,
    PAD: tl.constexpr,
    PARTS: tl.constexpr,
) -> tuple[tl.tuple, tl.tuple]:
    """Codes first + codes [CODES] of a prepared codebook, high and low part by part.

    It is padded, hence no mask; `low` repeats `high` where there is none.
    """
    high, low = (), ()
    for part in tl.static_range(PARTS):
        # [CODES, PAD / PARTS]
        columns = part * (PAD // PARTS) + tl.arange(0, PAD // PARTS)
        offsets = codes[:, None] * PAD + columns[None, :]
        code = tl.load(high_pointer + first * PAD + offsets)
        high += (code,)
        if low_pointer is not None:
            code = tl.load(low_pointer + first * PAD + offsets)
        low += (code,)
    return high, low


@triton.jit
def load_operand(
    pointer: tl.tensor,
    stride: tl.tensor,
    rows_left: tl.tensor,
    centre_pointer: tl.tensor | None,
    SPLIT: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    PARTS: tl.constexpr,
) -> tuple[tl.tuple, tl.tuple, tl.tensor, tl.tensor]:
    """Rows, as `load_rows` finds them, ready to be multiplied: x − centre = scale · (high + low).

    high and low, part by part, are of DTYPE, and `low` repeats `high` unless SPLIT. scale [ROWS] is
    a power of two for float16, and 1 for bfloat16, which needs none. Last, Σ|x − centre| [ROWS].
    """
    WIDTH: tl.constexpr = PAD // PARTS
    # There are no registers for many rows in all their parts at a time.
    TWICE: tl.constexpr = PARTS > 1 and ROWS > 32
    if TWICE:
        largest, total = row_sizes(pointer, stride, rows_left, centre_pointer, ROWS, DIM, PAD)
    whole, high, low = (), (), ()
    for part in tl.static_range(PARTS):
        # [ROWS, WIDTH]
        x = load_rows(pointer + part * WIDTH, stride, rows_left, ROWS, DIM - part * WIDTH, WIDTH)
        if centre_pointer is not None:
            x = x.to(tl.float32) - load_centre(centre_pointer + part * WIDTH, WIDTH)
        if DTYPE == tl.float16:
            x = x.to(tl.float32)
        whole += (x,)
    if not TWICE:
        # [ROWS]
        largest = tl.max(tl.abs(whole[0]), 1)
        for part in tl.static_range(1, PARTS):
            largest = tl.maximum(largest, tl.max(tl.abs(whole[part]), 1))
    scale = tl.full([ROWS], 1.0, tl.float32)
    if DTYPE == tl.float16:
        scale = scale_of(largest)
    for part in tl.static_range(PARTS):
        # [ROWS, WIDTH]
        x = whole[part]
        if DTYPE == tl.float16:
            x /= scale[:, None]
        x_high, x_low = as_operand(x, SPLIT, DTYPE)
        high += (x_high,)
        low += (x_low,)
    if not TWICE:
        # [ROWS]
        total = tl.sum(tl.abs(whole[0].to(tl.float32)), 1)
        for part in tl.static_range(1, PARTS):
            total += tl.sum(tl.abs(whole[part].to(tl.float32)), 1)
    return high, low, scale, total


@triton.jit
def row_sizes(
    pointer: tl.tensor,
    stride: tl.tensor,
    rows_left: tl.tensor,
    centre_pointer: tl.tensor | None,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The largest |x − centre| of each row, and their sum, [ROWS]."""
    WIDTH: tl.constexpr = min(PAD, 32)
    largest = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    offsets = tl.arange(0, ROWS).to(tl.int64)[:, None] * stride
    for first in range(0, PAD, WIDTH):
        # [ROWS, WIDTH]
        size = tl.abs(load_columns(pointer, offsets, rows_left, first, centre_pointer, DIM, WIDTH))
        largest = tl.maximum(largest, tl.max(size, 1))
        total += tl.sum(size, 1)
    return largest, total


@triton.jit
def score_product(
    a: tl.tuple,
    a_low: tl.tuple,
    b: tl.tuple,
    b_low: tl.tuple,
    accumulator: tl.tensor,
    SPLIT_A: tl.constexpr,
    SPLIT_B: tl.constexpr,
    B_FIRST: tl.constexpr = False,
) -> tl.tensor:
    """`split_dot` of a and bᵀ, which are given part by part; the small terms of all parts first.

    Of those, a's come first, or b's: the order of scores is that of the latents, then the codes, in
    every kernel, for a matrix unit rounds another order otherwise.
    """
    PARTS: tl.constexpr = len(a)
    if SPLIT_B and B_FIRST:
        for part in tl.static_range(PARTS):
            accumulator = dot(a[part], b_low[part].T, accumulator)
    if SPLIT_A:
        for part in tl.static_range(PARTS):
            accumulator = dot(a_low[part], b[part].T, accumulator)
    if SPLIT_B and not B_FIRST:
        for part in tl.static_range(PARTS):
            accumulator = dot(a[part], b_low[part].T, accumulator)
    for part in tl.static_range(PARTS):
        accumulator = dot(a[part], b[part].T, accumulator)
    return accumulator
