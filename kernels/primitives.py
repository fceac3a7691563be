"""Pieces that several Triton kernels share: casts, products, scores, loads, the online softmax.

Triton's interpreter runs the same code on a CPU, but it truncates when it casts to bfloat16 and
multiplies bfloat16 bit patterns as integers. `round_to` and `dot` give it the compiled meaning.
"""

import triton
import triton.language as tl

INTERPRETING = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# ½‖c‖² of a code that only fills up a tile: its weight is 2^−huge = 0. Finite, because the entropy
# multiplies weight and score, and 0·inf is not 0. Scaled by 2·log2(e)/T it stays finite for
# T > 1e-7.
PADDING_NORM = tl.constexpr(1e30)
# Where a running maximum starts: below every score, and finite for the same reason.
LOWEST = tl.constexpr(-1e38)


@triton.jit
def round_to(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Cast float32 to `dtype`, to the nearest value."""
    if INTERPRETING and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, accumulator: tl.tensor) -> tl.tensor:
    """a·b + accumulator in float32; float32 operands are split into three tf32 products.

    A matrix unit rounds a·b and (bᵀ·aᵀ)ᵀ alike, and the kernels rely on it where T is tiny; BLAS
    does not, so the interpreter sums in float64.
    """
    if INTERPRETING:
        exact = tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64)
        return exact.to(tl.float32) + accumulator
    if a.dtype == tl.float32:
        return tl.dot(a, b, accumulator, input_precision="tf32x3")
    return tl.dot(a, b, accumulator)


@triton.jit
def split(x: tl.tensor, dtype: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """x ≈ high + low, both of `dtype`."""
    high = round_to(x, dtype)
    return high, round_to(x - high.to(tl.float32), dtype)


@triton.jit
def load_rows(
    pointer: tl.tensor,
    stride: tl.tensor,
    rows_left: tl.tensor,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
) -> tl.tensor:
    """Rows 0 … ROWS−1 of a matrix with unit column stride; zero past `rows_left` and past DIM."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, PAD)
    mask = (rows < rows_left)[:, None]
    if PAD > DIM:
        mask = mask & (columns < DIM)[None, :]
    # [ROWS, PAD]
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(
    pointer: tl.tensor,
    stride: tl.tensor,
    rows_left: tl.tensor,
    x: tl.tensor,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
) -> None:
    """The counterpart of `load_rows`."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, PAD)
    mask = (rows < rows_left)[:, None]
    if PAD > DIM:
        mask = mask & (columns < DIM)[None, :]
    x = round_to(x, pointer.dtype.element_ty)
    tl.store(pointer + rows[:, None] * stride + columns[None, :], x, mask=mask)


@triton.jit
def load_codes(pointer: tl.tensor, CODES: tl.constexpr, PAD: tl.constexpr) -> tl.tensor:
    """CODES rows of a prepared codebook: padded, so without a mask. [CODES, PAD]"""
    codes = tl.arange(0, CODES)
    return tl.load(pointer + codes[:, None] * PAD + tl.arange(0, PAD)[None, :])


@triton.jit
def split_latents(
    z: tl.tensor,
    mean_pointer: tl.tensor,
    CENTRE: tl.constexpr,
    SPLIT: tl.constexpr,
    DTYPE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Latents as operands of the score product: (high, low) of dtype DTYPE.

    z [ROWS, PAD] minus the codebook's mean where CENTRE; `low` repeats `high` unless SPLIT.
    """
    if CENTRE:
        z = z - tl.load(mean_pointer + tl.arange(0, z.shape[1]))[None, :]
    if SPLIT:
        return split(z, DTYPE)
    if z.dtype != DTYPE:
        z = round_to(z, DTYPE)
    return z, z


@triton.jit
def exact_best(scores: tl.tensor, CODES: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Largest of each row of scores [ROWS, CODES], and the first column that reaches it."""
    best = tl.max(scores, 1)
    column = tl.where(scores == best[:, None], tl.arange(0, CODES)[None, :], CODES)
    return best, tl.min(column, 1)


@triton.jit
def packed_best(
    scores: tl.tensor, ROWS: tl.constexpr, CODES: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """`exact_best` up to 2⁻¹⁹ relative, for scores below zero, in fewer instructions.

    The lowest bits of a score make room for the index of its group of eight columns, and one
    maximum finds both; of negative numbers the one with the lower index is the larger. Eight, since
    these columns lie in the lanes of a matrix unit's result: what is left is little.
    """
    GROUPS: tl.constexpr = CODES // 8
    # [ROWS, GROUPS, 8]
    bits = tl.reshape(scores.to(tl.int32, bitcast=True), [ROWS, GROUPS, 8])
    bits = (bits & -GROUPS) | tl.arange(0, GROUPS)[None, :, None]
    # [ROWS, 8]
    best_of_lane = tl.max(bits.to(tl.float32, bitcast=True), 1)
    # [ROWS]
    best = tl.max(best_of_lane, 1)
    lane = tl.where(best_of_lane == best[:, None], tl.arange(0, 8)[None, :], 8)
    bits = best.to(tl.int32, bitcast=True)
    column = (bits & (GROUPS - 1)) * 8 + tl.min(lane, 1)
    # Cleared bits round towards zero: no score is above this.
    return (bits & -GROUPS).to(tl.float32, bitcast=True), column


@triton.jit
def online_softmax(
    scores: tl.tensor,
    new_maximum: tl.tensor,
    scale: tl.tensor,
    maximum: tl.tensor,
    total: tl.tensor,
    weighted: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Fold a tile of scores into the running softmax of its rows, in base 2.

    scores [ROWS, CODES], to be multiplied by `scale`. All of shape [ROWS]: the scaled `maximum`
    before this tile and with it, `total` = Σ 2^(scaled − maximum) and
    `weighted` = Σ 2^(scaled − maximum)·(scaled − maximum).
    Returns the tile's weights [ROWS, CODES], the factor [ROWS] that brings earlier sums to the new
    maximum, and the three updated statistics.
    """
    # [ROWS, CODES]
    relative = tl.fma(scores, scale, -new_maximum[:, None])
    weights = tl.exp2(relative)
    shift = maximum - new_maximum
    factor = tl.exp2(shift)
    # The entropy's sum moves with the maximum it is relative to.
    weighted = factor * tl.fma(total, shift, weighted) + tl.sum(weights * relative, 1)
    total = tl.fma(total, factor, tl.sum(weights, 1))
    return weights, factor, new_maximum, total, weighted
