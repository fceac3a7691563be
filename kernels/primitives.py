"""Pieces that several Triton kernels share: casts, products, loads, scores, distances.

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
# Where a best score starts: below every other, and finite for the same reason.
LOWEST = tl.constexpr(-1e38)
# Float16 operands are scaled so that the largest element is at least this and less than twice it:
# twelve bits below it a high and a low part still hold the 22 bits of both.
LARGEST = tl.constexpr(2.0**13)
# What brings weights from 0 to 1 into that range.
WEIGHT_SCALE = tl.constexpr(2.0**14)


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
    """a·b + accumulator in float32.

    A matrix unit rounds a·b and (bᵀ·aᵀ)ᵀ alike, and the kernels rely on it where T is tiny; BLAS
    does not, so the interpreter sums in float64.
    """
    if INTERPRETING:
        exact = tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64)
        return exact.to(tl.float32) + accumulator
    return tl.dot(a, b, accumulator)


@triton.jit
def split_dot(
    a: tl.tensor,
    a_low: tl.tensor,
    b: tl.tensor,
    b_low: tl.tensor,
    accumulator: tl.tensor,
    SPLIT_A: tl.constexpr,
    SPLIT_B: tl.constexpr,
) -> tl.tensor:
    """(a + a_low)·(b + b_low) + accumulator, without the low·low that float32 would round away.

    The small terms first: they lose nothing then, and hardly depend on which side is a.
    """
    if SPLIT_A:
        accumulator = dot(a_low, b, accumulator)
    if SPLIT_B:
        accumulator = dot(a, b_low, accumulator)
    return dot(a, b, accumulator)


@triton.jit
def add_product(
    sums: tl.tensor,
    factor: tl.tensor,
    a: tl.tensor,
    a_low: tl.tensor,
    b: tl.tensor,
    b_low: tl.tensor,
    SPLIT: tl.constexpr,
) -> tl.tensor:
    """sums·factor + (a + a_low)·(b + b_low), sums [ROWS, PAD], factor [ROWS, 1] or [1, 1].

    Products stay in flight only while nothing else touches what they add to, else each waits for
    the one before: so they get sums of their own. Wide rows have no registers for those.
    """
    if sums.shape[1] > 128:
        return split_dot(a, a_low, b, b_low, sums * factor, SPLIT, SPLIT)
    product = split_dot(a, a_low, b, b_low, tl.zeros(sums.shape, tl.float32), SPLIT, SPLIT)
    return tl.fma(sums, tl.broadcast_to(factor, sums.shape), product)


@triton.jit
def split(x: tl.tensor, dtype: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """x ≈ high + low, both of `dtype`."""
    high = round_to(x, dtype)
    return high, round_to(x - high.to(tl.float32), dtype)


@triton.jit
def scale_of(largest: tl.tensor) -> tl.tensor:
    """The power of two that brings `largest` (any shape, float32) to between 2^13 and 2^14."""
    bits = tl.maximum(largest, 1e-30).to(tl.int32, bitcast=True) & 0x7F800000
    return bits.to(tl.float32, bitcast=True) / LARGEST


@triton.jit
def tile_start(
    first: tl.tensor, rows: tl.tensor, ROWS: tl.constexpr, WHOLE_TILES: tl.constexpr
) -> tl.tensor:
    """Where the tile of rows begins that is due at row `first`, in 64 bits.

    With WHOLE_TILES, where there are at least ROWS rows, the last one begins early enough to be
    whole, so that nothing needs a mask; it then repeats rows of the tile before.
    """
    first = first.to(tl.int64)
    if WHOLE_TILES:
        first = tl.minimum(first, rows - ROWS)
    return first


@triton.jit
def load_rows(
    pointer: tl.tensor,
    stride: tl.tensor,
    rows_left: tl.tensor,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    LAST: tl.constexpr = False,
) -> tl.tensor:
    """Rows 0 … ROWS−1 of a matrix with unit column stride; zero past `rows_left` and past DIM.

    LAST marks the last use of rows that were loaded before: they may leave the cache. It also keeps
    the compiler from holding them, or their addresses, in registers meanwhile.
    """
    policy: tl.constexpr = "evict_first" if LAST else ""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, PAD)
    mask = (rows < rows_left)[:, None]
    if PAD > DIM:
        mask = mask & (columns < DIM)[None, :]
    # [ROWS, PAD]; 64 bits, for a view may have any stride
    offsets = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(pointer + offsets, mask=mask, other=0.0, eviction_policy=policy)


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
def row_dots(
    a_pointer: tl.tensor,
    a_stride: tl.tensor,
    b_pointer: tl.tensor,
    b_stride: tl.tensor,
    mean_pointer: tl.tensor | None,
    rows_left: tl.tensor,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
) -> tl.tensor:
    """Σ_d a·(b − mean) of each row, [ROWS], in float32; a few columns at a time spare registers."""
    CHUNK: tl.constexpr = min(PAD, 64)
    dots = tl.zeros([ROWS], tl.float32)
    rows = tl.arange(0, ROWS)[:, None]
    for first in range(0, PAD, CHUNK):
        # [ROWS, CHUNK]
        columns = (first + tl.arange(0, CHUNK))[None, :]
        mask = (rows < rows_left) & (columns < DIM)
        a = tl.load(a_pointer + rows.to(tl.int64) * a_stride + columns, mask=mask, other=0.0)
        b = tl.load(b_pointer + rows.to(tl.int64) * b_stride + columns, mask=mask, other=0.0)
        b = b.to(tl.float32)
        if mean_pointer is not None:
            b -= tl.load(mean_pointer + columns)
        dots += tl.sum(a.to(tl.float32) * b, 1)
    return dots


@triton.jit
def load_codes(
    high_pointer: tl.tensor,
    low_pointer: tl.tensor | None,
    first: tl.tensor,
    codes: tl.tensor,
    PAD: tl.constexpr,
    LAST: tl.constexpr = False,
) -> tuple[tl.tensor, tl.tensor]:
    """Codes first + codes [CODES] of a prepared codebook, high and low part, each [CODES, PAD].

    It is padded, hence no mask; `low` repeats `high` where there is none. LAST as in `load_rows`.
    """
    policy: tl.constexpr = "evict_first" if LAST else ""
    offsets = codes[:, None] * PAD + tl.arange(0, PAD)[None, :]
    high = tl.load(high_pointer + first * PAD + offsets, eviction_policy=policy)
    if low_pointer is not None:
        return high, tl.load(low_pointer + first * PAD + offsets, eviction_policy=policy)
    return high, high


@triton.jit
def as_operand(
    x: tl.tensor, mean_pointer: tl.tensor | None, SPLIT: tl.constexpr, DTYPE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Rows ready to be multiplied: x − mean = scale · (high + low).

    x [ROWS, PAD]; high and low are of DTYPE, and `low` repeats `high` unless SPLIT. scale [ROWS] is
    a power of two for float16, and 1 for bfloat16, which needs none.
    """
    scale = tl.full([x.shape[0]], 1.0, tl.float32)
    if mean_pointer is not None:
        x = x.to(tl.float32) - tl.load(mean_pointer + tl.arange(0, x.shape[1]))[None, :]
    if DTYPE == tl.float16:
        x = x.to(tl.float32)
        scale = scale_of(tl.max(tl.abs(x), 1))
        x /= scale[:, None]
    if x.dtype == DTYPE:
        return x, x, scale
    if SPLIT:
        high, low = split(x, DTYPE)
        return high, low, scale
    high = round_to(x.to(tl.float32), DTYPE)
    return high, high, scale


@triton.jit
def weights_operand(
    x: tl.tensor, factor: tl.tensor, SPLIT: tl.constexpr, DTYPE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """x · factor as the left operand of a product, high and low; `low` repeats `high` unless SPLIT.

    The factor brings x to the range of float16; bfloat16 needs none and ignores it.
    """
    if DTYPE == tl.float16:
        x *= factor
    if SPLIT:
        return split(x, DTYPE)
    high = round_to(x, DTYPE)
    return high, high


@triton.jit
def relative_scores(
    scores: tl.tensor, best: tl.tensor, scale: tl.tensor, OPERAND: tl.constexpr
) -> tl.tensor:
    """(score − best)·scale, any shapes that broadcast: what a weight is two to the power of.

    Where T is tiny the fused form leaves a residue, the same for a whole row: it cancels when the
    weights are normalised, but those that must fit into float16 have no room for it.
    """
    if OPERAND == tl.float16:
        return (scores - best) * scale
    return tl.fma(scores, scale, -best * scale)


@triton.jit
def squared_distances(
    z_pointer: tl.tensor,
    row_stride: tl.tensor,
    rows_left: tl.tensor,
    index: tl.tensor,
    high_pointer: tl.tensor,
    low_pointer: tl.tensor | None,
    mean_pointer: tl.tensor | None,
    unit: tl.tensor,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
) -> tl.tensor:
    """‖z_n − c_index‖² of each row, for one prepared code a row: index and result [ROWS].

    From the differences: ‖z‖² − 2z·c + ‖c‖² would cancel. Few columns at a time spare registers.
    """
    CHUNK: tl.constexpr = min(PAD, 64)
    rows = tl.arange(0, index.shape[0])[:, None]
    distances = tl.zeros([index.shape[0]], tl.float32)
    for first in range(0, PAD, CHUNK):
        # [ROWS, CHUNK]
        columns = (first + tl.arange(0, CHUNK))[None, :]
        mask = (rows < rows_left) & (columns < DIM)
        z = tl.load(z_pointer + rows.to(tl.int64) * row_stride + columns, mask=mask, other=0.0)
        code = tl.load(high_pointer + index[:, None] * PAD + columns).to(tl.float32)
        if low_pointer is not None:
            code += tl.load(low_pointer + index[:, None] * PAD + columns).to(tl.float32)
        difference = z.to(tl.float32) - code * unit
        if mean_pointer is not None:
            difference -= tl.load(mean_pointer + columns)
        distances += tl.sum(difference * difference, 1)
    return distances
