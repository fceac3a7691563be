"""The soft forward: one pass over the codes for every output of a block of rows."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from softvq.kernels import tiles
from softvq.kernels.arithmetic import Arithmetic
from softvq.kernels.lanes import best_quad, lane_order, lane_sum, nearest_of_quad
from softvq.kernels.memory import load_centre, store_rows, tile_start
from softvq.kernels.operands import load_codes, load_operand, score_product
from softvq.kernels.primitives import (
    LN_2,
    LOG2_E,
    LOWEST,
    WEIGHT_SCALE,
    add_product,
    relative_scores,
    rounded_product,
    weights_operand,
)
from softvq.kernels.prologue import PreparedCodebook


class SoftForward(NamedTuple):
    """What a launch leaves; `quantized` is None when only the statistics were asked for."""

    quantized: Tensor | None  # (H, N, D), dtype of z
    indices: Tensor  # (H, N) int64
    log_partition: Tensor  # (H, N) float32
    entropy: Tensor  # (H, N) float32
    row_state: Tensor  # (2, H, N) float32: the best score, and 1/Σ weights


def launch(
    z: Tensor,
    prepared: PreparedCodebook,
    codes: int,
    temperature: Tensor,
    how: Arithmetic,
    quantize: bool,
) -> SoftForward:
    """z (H, N, D) with unit stride along D; `quantize=False` skips the second product."""
    heads, rows, _ = z.shape
    row = z.new_empty((heads, rows), dtype=torch.float32)
    out = SoftForward(
        z.new_empty(z.shape) if quantize else None,
        torch.empty_like(row, dtype=torch.int64),
        row,
        torch.empty_like(row),
        z.new_empty((2, heads, rows), dtype=torch.float32),
    )

    def run(tile: tiles.Tile):
        # The first part leaves what belongs to rows, the others nothing but their columns of q.
        columns = SoftForward(out.quantized, None, None, None, None)
        compiled = [
            _forward_kernel[(triton.cdiv(rows, tile.rows), heads)](
                *(z, *prepared, temperature, *(out if part == 0 else columns)),
                *(z.stride(0), z.stride(1), rows, codes, prepared.high.shape[1]),
                **tiles.constants(tile, part, how, z),
            )
            for part in range(tile.parts if quantize else 1)
        ]
        return compiled, out

    if rows:
        run(tiles.choose("forward", how, z, prepared.high.shape[1], run, quantize))
    return out


@triton.jit
def _forward_kernel(
    z_pointer,
    high_pointer,
    low_pointer,
    half_norm_pointer,
    centre_pointer,
    scale_pointer,
    temperature_pointer,
    quantized_pointer,
    indices_pointer,  # from here to row_state, None where another launch leaves them
    log_partition_pointer,
    entropy_pointer,
    row_state_pointer,
    head_stride,
    row_stride: tl.constexpr,
    rows,
    codes,
    padded_codes,
    SPLIT_LATENTS: tl.constexpr,
    SPLIT_ALL: tl.constexpr,
    WHOLE_TILES: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: ROWS latents of one head against all codes."""
    start = tile_start(tl.program_id(0) * ROWS, rows, ROWS, WHOLE_TILES)
    rows_left = ROWS if WHOLE_TILES else rows - start
    repeated = (tl.program_id(0) * ROWS - start).to(tl.int32)
    head = tl.program_id(1).to(tl.int64)
    inverse_temperature = 1.0 / tl.load(temperature_pointer).to(tl.float32)
    OPERAND: tl.constexpr = high_pointer.dtype.element_ty
    SPLIT_CODEBOOK: tl.constexpr = low_pointer is not None
    WIDTH: tl.constexpr = PAD // PARTS
    FIRST: tl.constexpr = PART * WIDTH
    unit = 1.0  # of the prepared codes
    high_pointer += head * padded_codes * PAD
    half_norm_pointer += head * padded_codes
    if low_pointer is not None:
        low_pointer += head * padded_codes * PAD
    if centre_pointer is not None:
        centre_pointer += head * PAD
    if scale_pointer is not None:
        unit = tl.load(scale_pointer + head)
    scale = 2.0 * LOG2_E * inverse_temperature * unit * unit

    # of each part [ROWS, WIDTH]
    z_pointer += head * head_stride + start * row_stride
    z_high, z_low, z_scale, _ = load_operand(
        *(z_pointer, row_stride, rows_left, centre_pointer),
        *(SPLIT_LATENTS, OPERAND, ROWS, DIM, PAD, PARTS),
    )
    best = tl.full([ROWS], LOWEST, tl.float32)
    reference = tl.full([ROWS], LOWEST, tl.float32)  # best·scale
    # [ROWS, 8], by lane
    total = tl.zeros([ROWS, 8], tl.float32)
    weighted = tl.zeros([ROWS, 8], tl.float32)
    lane_best = tl.full([ROWS, 8], LOWEST, tl.float32)
    best_block = tl.zeros([ROWS, 8], tl.int32)
    # [ROWS, WIDTH]
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    order = lane_order(CODES)
    for first in tl.range(0, padded_codes, CODES, num_stages=STAGES, disable_licm=PARTS > 1):
        # of each part [CODES, WIDTH]
        code, code_low = load_codes(high_pointer, low_pointer, first, order, PAD, PARTS)
        # [CODES]
        half_norm = tl.load(half_norm_pointer + first + order)
        # [ROWS, CODES]
        zeros = tl.zeros([ROWS, CODES], tl.float32)
        product = score_product(z_high, z_low, code, code_low, zeros, SPLIT_LATENTS, SPLIT_CODEBOOK)
        scores = tl.fma(product, (z_scale / unit)[:, None], -half_norm[None, :])
        # [ROWS, 8]; the strict comparison keeps the lowest index of a tie
        tile_best, block = best_quad(scores)
        best_block = tl.where(tile_best > lane_best, first + block, best_block)
        lane_best = tl.maximum(lane_best, tile_best)

        # [ROWS]; zero where the best stays: what is left of it would add up from tile to tile
        new_best = tl.max(lane_best, 1)
        if OPERAND == tl.float16:
            shift = tl.maximum((best - new_best) * scale, LOWEST)
        else:
            new_reference = rounded_product(new_best, scale)
            shift = reference - new_reference
            reference = new_reference
        factor = tl.exp2(shift)
        best = new_best
        # [ROWS, CODES]
        relative = relative_scores(scores, best[:, None], scale, OPERAND)
        weights = tl.exp2(relative)
        # The entropy's sum moves with the maximum it is relative to.
        weighted = tl.fma(total, shift[:, None], weighted)
        weighted = tl.fma(weighted, factor[:, None], lane_sum(weights * relative))
        total = tl.fma(total, factor[:, None], lane_sum(weights))
        if quantized_pointer is not None:
            weights, weights_low = weights_operand(weights, WEIGHT_SCALE, SPLIT_ALL, OPERAND)
            sums = add_product(
                sums, factor[:, None], weights, weights_low, code[PART], code_low[PART], SPLIT_ALL
            )

    # [ROWS]: the lanes meet
    total, weighted = tl.sum(total, 1), tl.sum(weighted, 1)
    row = head * rows + start
    if quantized_pointer is not None:
        # [ROWS, WIDTH]
        quantized = sums / total[:, None]
        if OPERAND == tl.float16:
            quantized *= unit / WEIGHT_SCALE
        if centre_pointer is not None:
            quantized += load_centre(centre_pointer + FIRST, WIDTH, LAST=True)
        store_rows(
            quantized_pointer + row * DIM + FIRST,
            DIM,
            repeated,
            rows_left,
            quantized,
            ROWS,
            DIM - FIRST,
            WIDTH,
        )

    if indices_pointer is not None:
        index, squared_distance = nearest_of_quad(
            *(z_pointer, row_stride, rows_left, lane_best, best_block),
            *(high_pointer, low_pointer, centre_pointer, unit, codes, DIM, PAD),
        )
        log_total = tl.log2(total)
        # The best score is the nearest code's.
        residue = relative_scores(best, best, scale, OPERAND)
        log_partition = LN_2 * (log_total - residue) - squared_distance * inverse_temperature
        entropy = LN_2 * (log_total - weighted / total)
        offsets = tl.arange(0, ROWS)
        mask = (offsets >= repeated) & (offsets < rows_left)
        tl.store(log_partition_pointer + row + offsets, log_partition, mask=mask)
        tl.store(entropy_pointer + row + offsets, entropy, mask=mask)
        tl.store(indices_pointer + row + offsets, index.to(tl.int64), mask=mask)
        tl.store(row_state_pointer + row + offsets, best, mask=mask)
        heads = tl.num_programs(1).to(tl.int64)
        tl.store(row_state_pointer + heads * rows + row + offsets, 1.0 / total, mask=mask)
