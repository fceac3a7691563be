"""Arithmetic that several Triton kernels share: casts, products, operands, scores.

Triton's interpreter runs the same code on a CPU, but it truncates when it casts to bfloat16 and
multiplies bfloat16 bit patterns as integers. `round_to` and `dot` give it the compiled meaning.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETING = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# ½‖c‖² of a code that only fills up a tile: its weight is 2^−huge = 0. Times T where T < 1, so that
# what is divided by T stays finite: the entropy multiplies weight and score, and 0·inf is not 0.
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
def as_operand(
    x: tl.tensor, SPLIT: tl.constexpr, DTYPE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """x as a matrix unit takes it, high and low; `low` repeats `high` unless SPLIT."""
    if x.dtype == DTYPE:
        return x, x
    if SPLIT:
        return split(x, DTYPE)
    high = round_to(x.to(tl.float32), DTYPE)
    return high, high


@triton.jit
def weights_operand(
    x: tl.tensor, factor: tl.tensor, SPLIT: tl.constexpr, DTYPE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """x · factor as the left operand of a product, high and low; `low` repeats `high` unless SPLIT.

    The factor brings x to the range of float16; bfloat16 needs none and ignores it.
    """
    if DTYPE == tl.float16:
        x *= factor
    return as_operand(x, SPLIT, DTYPE)


@triton.jit
def rounded_product(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """a·b as a float32, also where a sum follows that the compiler would fuse it with."""
    if INTERPRETING:
        return a * b
    return libdevice.mul_rn(a, b)


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
