"""The best code of a tile of scores, in as few instructions as an index can be had for.

A tile of scores lies in the threads as a matrix unit leaves it: eight lanes, and the columns l,
l+8, l+16 … of lane l in the same threads. What stays within a lane costs no exchange between
threads, so every reduction over the columns keeps one value a lane, [ROWS, 8], until the end.
"""

import triton
import triton.language as tl

from softvq.kernels.memory import squared_distances


@triton.jit
def lane_order(CODES: tl.constexpr) -> tl.tensor:
    """The order of a tile's codes that gives four consecutive ones, a quad, to one lane. [CODES]"""
    column = tl.arange(0, CODES)
    return column // 32 * 32 + column % 8 * 4 + column % 32 // 8


@triton.jit
def lane_sum(x: tl.tensor) -> tl.tensor:
    """Sum over the columns of each lane: [ROWS, CODES] → [ROWS, 8]."""
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // 8, 8]), 1)


@triton.jit
def best_quad(scores: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Of scores [ROWS, CODES] in lane order: each lane's best, and the lowest block of 32 codes
    whose quad in this lane holds it, as its first code; both [ROWS, 8].

    To look for the quad only, and inside it at the very end, saves half the comparisons.
    """
    QUADS: tl.constexpr = scores.shape[1] // 32
    # [ROWS, QUADS, 8]
    quads = tl.max(tl.reshape(scores, [scores.shape[0], QUADS, 4, 8]), 2)
    # [ROWS, 8]
    best = tl.max(quads, 1)
    block = 32 * tl.arange(0, QUADS)[None, :, None]
    return best, tl.min(tl.where(quads == best[:, None, :], block, 32 * QUADS), 1)


@triton.jit
def nearest_of_quad(
    z_pointer: tl.tensor,
    row_stride: tl.tensor,
    rows_left: tl.tensor,
    best: tl.tensor,
    block: tl.tensor,
    high_pointer: tl.tensor,
    low_pointer: tl.tensor | None,
    centre_pointer: tl.tensor | None,
    unit: tl.tensor,
    codes: tl.tensor,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Index of each row's nearest code, the lowest of a tie, and its squared distance, [ROWS].

    best and block [ROWS, 8] of `best_quad` over all tiles; codes are `unit` times what is stored.
    """
    is_best = best == tl.max(best, 1)[:, None]
    quad = block + 4 * tl.arange(0, 8)[None, :]
    # A row of NaN has no best code; its index must be one that can be gathered.
    last = codes - 1
    quad = tl.min(tl.where(is_best, quad, last // 4 * 4), 1)
    # [ROWS, 4]
    index = quad[:, None] + tl.arange(0, 4)[None, :]
    distances = squared_distances(
        *(z_pointer, row_stride, rows_left, index),
        *(high_pointer, low_pointer, centre_pointer, unit, DIM, PAD),
    )
    # Padding is no code, however near.
    distances = tl.where(index < codes, distances, float("inf"))
    # [ROWS]
    nearest = tl.min(distances, 1)
    return tl.min(tl.where(distances == nearest[:, None], index, last), 1), nearest
