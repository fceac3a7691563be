"""The half of the backward that belongs to rows: dz, dT, and the shift that dC needs from each row.

It repeats the forward's scores. e_nk here still lacks the factor 1/Σ weights, which is the same for
a whole row and joins at the end.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from softvq.kernels import tiles
from softvq.kernels.arithmetic import Arithmetic
from softvq.kernels.memory import row_dots, squared_distances, store_with_terms, tile_start
from softvq.kernels.operands import load_codes, load_operand, score_product
from softvq.kernels.primitives import (
    LARGEST,
    LN_2,
    LOG2_E,
    add_product,
    dot,
    relative_scores,
    scale_of,
    weights_operand,
)
from softvq.kernels.prologue import PreparedCodebook


class RowGradients(NamedTuple):
    """What a launch leaves; None for what was not asked for."""

    grad_z: Tensor | None  # (H, N, D), dtype of z
    grad_temperature: Tensor | None  # (), float32
    row_shift: Tensor  # (H, N) float32, (2/T)(δ − λ)
    largest: Tensor | None  # (H) float32, of the terms of dC, where they have to be scaled


def launch(
    z: Tensor,
    prepared: PreparedCodebook,
    temperature: Tensor,
    quantized: Tensor,
    indices: Tensor,
    row_state: Tensor,
    grad_quantized: Tensor | None,
    grad_log_partition: Tensor | None,
    grad_entropy: Tensor | None,
    code_gradient: Tensor | None,
    how: Arithmetic,
    needs_z: bool,
    needs_temperature: bool,
    detach_log_partition: bool,
) -> RowGradients:
    """z and grad_quantized (H, N, D) with unit stride along D; quantized (H, N, D) and gradients of
    rows (H, N) contiguous; indices and row_state the forward's; code_gradient (H, padded K) is υ/N.
    """
    (heads, rows, _), padded_codes = z.shape, prepared.high.shape[1]
    log_partition_moves_z = grad_log_partition is not None and not detach_log_partition
    row_shift = z.new_empty((heads, rows), dtype=torch.float32)
    grad_z = z.new_empty(z.shape) if needs_z else None
    largest_usage = None
    if prepared.scale is not None and code_gradient is not None:
        largest_usage = code_gradient.abs().amax(1)
    strides = (0, 0) if grad_quantized is None else grad_quantized.stride()[:2]

    def run(tile: tiles.Tile):
        blocks = triton.cdiv(rows, tile.rows)
        # One more block than there are, so that an empty batch has a sum and a maximum too.
        by_block = {"size": (heads, blocks + 1), "dtype": torch.float32}
        grad_temperature = z.new_zeros(**by_block) if needs_temperature else None
        largest = None if prepared.scale is None else z.new_zeros(**by_block)
        of_rows = (grad_temperature, row_shift, largest)
        # The first part leaves them; the others have nothing but their columns of dz.
        compiled = [
            _row_gradients_kernel[(blocks, heads)](
                *(z, *prepared, temperature, quantized, indices, row_state),
                *(grad_quantized, grad_log_partition, grad_entropy, code_gradient, largest_usage),
                *(grad_z, *(of_rows if part == 0 else (None,) * 3)),
                *(*z.stride()[:2], *strides, rows, padded_codes),
                LOG_PARTITION_MOVES_Z=log_partition_moves_z,
                **tiles.constants(tile, part, how, z),
            )
            for part in range(tile.parts if needs_z else 1)
            if rows
        ]
        return compiled, RowGradients(
            grad_z,
            None if grad_temperature is None else grad_temperature.sum(),
            row_shift,
            None if largest is None else largest.amax(1),
        )

    incoming = (grad_quantized, grad_log_partition, grad_entropy, code_gradient)
    parts = [*(x is not None for x in incoming), needs_z, needs_temperature]
    of_softmax = grad_entropy is not None or code_gradient is not None
    more = needs_temperature or of_softmax or log_partition_moves_z
    kernel = "row_gradients, all" if more else "row_gradients"
    return run(tiles.choose(kernel, how, z, padded_codes, run, *parts))[1]


@triton.jit
def _row_gradients_kernel(
    z_pointer,
    high_pointer,
    low_pointer,
    half_norm_pointer,
    centre_pointer,
    scale_pointer,
    temperature_pointer,
    quantized_pointer,
    indices_pointer,
    row_state_pointer,
    grad_quantized_pointer,  # from here to largest, None switches the part off
    grad_log_partition_pointer,
    grad_entropy_pointer,
    code_gradient_pointer,
    largest_usage_pointer,
    grad_z_pointer,
    grad_temperature_pointer,
    row_shift_pointer,
    largest_pointer,
    head_stride,
    row_stride: tl.constexpr,
    grad_head_stride,
    grad_row_stride: tl.constexpr,
    rows,
    padded_codes,
    LOG_PARTITION_MOVES_Z: tl.constexpr,
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
    block = head * (tl.num_programs(0) + 1) + tl.program_id(0)
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
    if code_gradient_pointer is not None:
        code_gradient_pointer += head * padded_codes
    scale = 2.0 * LOG2_E * inverse_temperature * unit * unit
    offsets = tl.arange(0, ROWS)
    mask = offsets < rows_left
    own = mask & (offsets >= repeated)
    row = head * rows + start + offsets

    # of each part [ROWS, WIDTH]
    z_pointer += head * head_stride + start * row_stride
    z_high, z_low, z_scale, _ = load_operand(
        *(z_pointer, row_stride, rows_left, centre_pointer),
        *(SPLIT_LATENTS, OPERAND, ROWS, DIM, PAD, PARTS),
    )
    quantized_pointer += (head * rows + start) * DIM
    # [ROWS]; past the end every weight is 0, and finite the score it is multiplied with
    best = tl.load(row_state_pointer + row, mask=mask, other=tl.minimum(1e37 / scale, 1e37))
    heads = tl.num_programs(1).to(tl.int64)
    inverse_total = tl.load(row_state_pointer + heads * rows + row, mask=mask, other=0.0)
    delta = tl.zeros([ROWS], tl.float32)
    # No weighted |a_nk − δ_n| is above it.
    bound = tl.zeros([ROWS], tl.float32)
    if grad_quantized_pointer is not None:
        grad_quantized_pointer += head * grad_head_stride + start * grad_row_stride
        delta = row_dots(
            *(grad_quantized_pointer, grad_row_stride, quantized_pointer, DIM, centre_pointer),
            *(rows_left, ROWS, DIM, PAD),
        )
        # of each part [ROWS, WIDTH]
        grad_high, grad_low, grad_scale, grad_total = load_operand(
            *(grad_quantized_pointer, grad_row_stride, rows_left, None),
            *(SPLIT_ALL, OPERAND, ROWS, DIM, PAD, PARTS),
        )
        bound += 4.0 * LARGEST * unit * grad_total
    if grad_entropy_pointer is not None:
        entropy_factor = LN_2 * tl.load(grad_entropy_pointer + row, mask=mask, other=0.0)
        bound += tl.abs(entropy_factor)  # x·2^x is above −0.54
    if largest_usage_pointer is not None:
        bound += tl.load(largest_usage_pointer + head)
    # What brings it into the range of float16.
    operand_scale = scale_of(bound)

    # sigma: what Σ_k e_nk is left with, because delta comes from a rounded q or lacks a part
    sigma = tl.zeros([ROWS], tl.float32)
    # Σ_k e·score and Σ_k weight·score, for dT
    gradient_score = tl.zeros([ROWS], tl.float32)
    mean_score = tl.zeros([ROWS], tl.float32)
    largest = tl.zeros([ROWS], tl.float32)
    # [ROWS, WIDTH]
    pull = tl.zeros([ROWS, WIDTH], tl.float32)
    tile_codes = tl.arange(0, CODES)
    for first in tl.range(0, padded_codes, CODES, num_stages=STAGES, disable_licm=PARTS > 1):
        # of each part [CODES, WIDTH]
        code, code_low = load_codes(high_pointer, low_pointer, first, tile_codes, PAD, PARTS)
        # [CODES]
        half_norm = tl.load(half_norm_pointer + first + tile_codes)
        # [ROWS, CODES]
        zeros = tl.zeros([ROWS, CODES], tl.float32)
        product = score_product(z_high, z_low, code, code_low, zeros, SPLIT_LATENTS, SPLIT_CODEBOOK)
        score = tl.fma(product, (z_scale / unit)[:, None], -half_norm[None, :])
        relative = relative_scores(score, best[:, None], scale, OPERAND)
        weights = tl.exp2(relative)

        # [ROWS, CODES]: a_nk − δ_n
        rise = zeros
        if grad_quantized_pointer is not None:
            along = score_product(grad_high, grad_low, code, code_low, zeros, SPLIT_ALL, SPLIT_ALL)
            rise = along * (grad_scale * unit)[:, None]
        if code_gradient_pointer is not None:
            rise += tl.load(code_gradient_pointer + first + tile_codes)[None, :]
        if grad_entropy_pointer is not None:
            rise = tl.fma(relative, -entropy_factor[:, None], rise)
        gradient = weights * (rise - delta[:, None])
        sigma += tl.sum(gradient, 1)
        if grad_temperature_pointer is not None:
            gradient_score += tl.sum(gradient * relative, 1)
            mean_score += tl.sum(weights * relative, 1)
        if largest_pointer is not None:
            largest = tl.maximum(largest, tl.max(tl.abs(gradient), 1))
        if grad_z_pointer is not None:
            gradient, gradient_low = weights_operand(
                gradient, (1.0 / operand_scale)[:, None], SPLIT_ALL, OPERAND
            )
            if z_pointer.dtype.element_ty == tl.bfloat16:
                pull = dot(gradient, code[PART], pull)
            else:
                one = tl.full([1, 1], 1.0, tl.float32)
                pull = add_product(
                    pull, one, gradient, gradient_low, code[PART], code_low[PART], SPLIT_ALL
                )

    sigma *= inverse_total
    shift = delta + sigma
    if grad_log_partition_pointer is not None:
        grad_log_partition = tl.load(grad_log_partition_pointer + row, mask=mask, other=0.0)
        shift -= grad_log_partition
    if row_shift_pointer is not None:
        tl.store(row_shift_pointer + row, 2.0 * inverse_temperature * shift, mask=own)

    if largest_pointer is not None:
        # [ROWS]: dC adds up p·g and e·z; no p or e has a larger factor before the scaled g or z
        largest = largest * inverse_total + tl.abs(sigma)
        if grad_log_partition_pointer is not None:
            largest += tl.abs(grad_log_partition)
        largest *= 2.0 * inverse_temperature * z_scale
        if grad_quantized_pointer is not None:
            largest = tl.maximum(largest, grad_scale)
        tl.store(largest_pointer + block, tl.max(tl.where(mask, largest, 0.0)))
    if grad_temperature_pointer is not None:
        mean_score *= inverse_total
        change = LN_2 * (gradient_score * inverse_total - sigma * mean_score)
        if grad_log_partition_pointer is not None:
            index = tl.load(indices_pointer + row, mask=mask, other=0).to(tl.int32)
            # [ROWS, 1]
            distance = squared_distances(
                *(z_pointer, row_stride, rows_left, index[:, None]),
                *(high_pointer, low_pointer, centre_pointer, unit, DIM, PAD),
            )
            nearest_score = -inverse_temperature * tl.sum(distance, 1)
            change += grad_log_partition * (nearest_score + LN_2 * mean_score)
        change = -inverse_temperature * tl.sum(tl.where(own, change, 0.0))
        tl.store(grad_temperature_pointer + block, change)
    if grad_z_pointer is not None:
        factor = 2.0 * inverse_temperature * inverse_total
        if OPERAND == tl.float16:
            factor *= operand_scale * unit
        along_quantized = -2.0 * inverse_temperature * sigma
        along_z = 0.0
        if LOG_PARTITION_MOVES_Z:
            along_z = -2.0 * inverse_temperature * grad_log_partition
            along_quantized -= along_z
        if centre_pointer is not None:
            centre_pointer += FIRST
        store_with_terms(
            *(grad_z_pointer + (head * rows + start) * DIM + FIRST, DIM, repeated, rows_left),
            *(pull * factor[:, None], along_quantized, quantized_pointer + FIRST, DIM),
            *(along_z, z_pointer + FIRST, row_stride, centre_pointer),
            *(ROWS, DIM - FIRST, WIDTH, True, LOG_PARTITION_MOVES_Z),
        )
