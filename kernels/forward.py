"""The soft forward: one pass over the codes for every output of a block of rows."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from softvq.kernels import tiles
from softvq.kernels.primitives import (
    LN_2,
    LOG2_E,
    LOWEST,
    dot,
    exact_best,
    load_codes,
    load_rows,
    online_softmax,
    packed_best,
    round_to,
    split_latents,
    store_rows,
)
from softvq.kernels.prologue import TRITON_DTYPE, Arithmetic, PreparedCodebook


class SoftForward(NamedTuple):
    """What a launch leaves; `quantized` is None when only the statistics were asked for."""

    quantized: Tensor | None  # (H, N, D), dtype of z
    indices: Tensor  # (H, N) int64
    log_partition: Tensor  # (H, N) float32
    entropy: Tensor  # (H, N) float32
    row_state: Tensor  # (2, H, N) float32: largest score in base 2, and 1/Σ weights


def launch(
    z: Tensor,
    prepared: PreparedCodebook,
    codes: int,
    temperature: Tensor,
    how: Arithmetic,
    quantize: bool,
) -> SoftForward:
    """z (H, N, D) with unit stride along D; `quantize=False` skips the second product."""
    heads, rows, dim = z.shape
    row = z.new_empty((heads, rows), dtype=torch.float32)
    out = SoftForward(
        z.new_empty(z.shape) if quantize else None,
        torch.empty_like(row, dtype=torch.int64),
        row,
        torch.empty_like(row),
        z.new_empty((2, heads, rows), dtype=torch.float32),
    )
    parts = 2 if how.split_codebook else 1
    tile = tiles.choose("forward", how.operand, dim, parts, tiles.shared_memory_limit(z.device))
    if rows:
        _forward_kernel[(triton.cdiv(rows, tile.rows), heads)](
            *(z, *prepared, temperature, *out),
            *(z.stride(0), z.stride(1), rows, codes, prepared.high.shape[1]),
            QUANTIZE=quantize,
            # Wider rows leave no registers for it, and their products take longer anyway.
            PACKED=how.operand.itemsize == 2 and not how.centre and dim <= 128,
            CENTRE=how.centre,
            SPLIT_LATENTS=how.split_latents,
            SPLIT_CODEBOOK=how.split_codebook,
            OPERAND=TRITON_DTYPE[how.operand],
            DIM=dim,
            PAD=tiles.padded_dim(dim),
            ROWS=tile.rows,
            CODES=tile.codes,
            STAGES=tile.stages,
            num_warps=tile.warps,
        )
    return out


@triton.jit
def _forward_kernel(
    z_pointer,
    high_pointer,
    low_pointer,
    half_norm_pointer,
    mean_pointer,
    temperature_pointer,
    quantized_pointer,
    indices_pointer,
    log_partition_pointer,
    entropy_pointer,
    row_state_pointer,
    head_stride,
    row_stride,
    rows,
    codes,
    padded_codes,
    QUANTIZE: tl.constexpr,
    PACKED: tl.constexpr,
    CENTRE: tl.constexpr,
    SPLIT_LATENTS: tl.constexpr,
    SPLIT_CODEBOOK: tl.constexpr,
    OPERAND: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: ROWS latents of one head against all codes."""
    start = tl.program_id(0).to(tl.int64) * ROWS
    head = tl.program_id(1).to(tl.int64)
    rows_left = rows - start
    inverse_temperature = 1.0 / tl.load(temperature_pointer).to(tl.float32)
    scale = 2.0 * LOG2_E * inverse_temperature
    high_pointer += head * padded_codes * PAD
    low_pointer += head * padded_codes * PAD
    half_norm_pointer += head * padded_codes
    mean_pointer += head * PAD

    # [ROWS, PAD]
    z = load_rows(z_pointer + head * head_stride + start * row_stride, row_stride, rows_left,
                  ROWS, DIM, PAD)  # fmt: skip
    z_high, z_low = split_latents(z, mean_pointer, CENTRE, SPLIT_LATENTS, OPERAND)
    # [ROWS, PAD], the latents as the products see them
    z = z_high.to(tl.float32)
    if SPLIT_LATENTS:
        z += z_low.to(tl.float32)
    # [ROWS]
    squared_norm = tl.sum(z * z, 1)
    # Packing an index needs scores below zero: −½‖z−c‖², and a little for the rounding of zero.
    row_offset = 0.5001 * squared_norm + 1e-30

    maximum = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    best = tl.full([ROWS], LOWEST, tl.float32)
    best_index = tl.zeros([ROWS], tl.int32)
    # [ROWS, PAD]
    sums = tl.zeros([ROWS, PAD], tl.float32)
    for first in tl.range(0, padded_codes, CODES, num_stages=STAGES):
        # [CODES, PAD]
        code = load_codes(high_pointer + first * PAD, CODES, PAD)
        # [CODES]
        half_norm = tl.load(half_norm_pointer + first + tl.arange(0, CODES))
        # [ROWS, CODES]
        if PACKED:
            base = -half_norm[None, :] - row_offset[:, None]
        else:
            base = tl.zeros([ROWS, CODES], tl.float32)
        scores = dot(z_high, code.T, base)
        if SPLIT_CODEBOOK:
            code_low = load_codes(low_pointer + first * PAD, CODES, PAD)
            scores = dot(z_high, code_low.T, scores)
        if SPLIT_LATENTS:
            scores = dot(z_low, code.T, scores)
        # [ROWS]; the strict comparison keeps the lowest index of a tie
        if PACKED:
            tile_best, column = packed_best(scores, ROWS, CODES)
        else:
            scores -= half_norm[None, :]
            tile_best, column = exact_best(scores, CODES)
        best_index = tl.where(tile_best > best, first + column, best_index)
        best = tl.maximum(best, tile_best)

        weights, factor, maximum, total, weighted = online_softmax(
            scores, best * scale, scale, maximum, total, weighted
        )
        if QUANTIZE:
            sums = dot(round_to(weights, OPERAND), code, sums * factor[:, None])

    offsets = tl.arange(0, ROWS)
    mask = offsets < rows_left
    row = head * rows + start
    # A row of NaN has no best code; keep its index one that can be gathered.
    best_index = tl.minimum(best_index, codes - 1)
    if PACKED:
        # Packed bits err by 2⁻¹⁹ of the score; where that alone makes every weight vanish, the
        # best code is all there is.
        lost = total < 1e-30
        total = tl.where(lost, 1.0, total)
        maximum += row_offset * scale
        if QUANTIZE:
            nearest = best_index[:, None] * PAD + tl.arange(0, PAD)[None, :]
            nearest = tl.load(high_pointer + nearest, mask=lost[:, None], other=0.0)
            sums = tl.where(lost[:, None], nearest.to(tl.float32), sums)
    log_total = tl.log2(total)
    log_partition = LN_2 * (maximum + log_total) - squared_norm * inverse_temperature
    tl.store(log_partition_pointer + row + offsets, log_partition, mask=mask)
    entropy = LN_2 * (log_total - weighted / total)
    tl.store(entropy_pointer + row + offsets, entropy, mask=mask)
    tl.store(indices_pointer + row + offsets, best_index.to(tl.int64), mask=mask)
    tl.store(row_state_pointer + row + offsets, maximum, mask=mask)
    heads = tl.num_programs(1).to(tl.int64)
    tl.store(row_state_pointer + heads * rows + row + offsets, 1.0 / total, mask=mask)
    if QUANTIZE:
        quantized = sums / total[:, None] + tl.load(mean_pointer + tl.arange(0, PAD))[None, :]
        store_rows(quantized_pointer + row * DIM, DIM, rows_left, quantized, ROWS, DIM, PAD)
