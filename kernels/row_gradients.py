"""The half of the backward that belongs to rows: dz, dT, and the shift that dC needs from each row.

It repeats the forward's scores. e_nk here still lacks the factor 1/Σ weights, which is the same for
a whole row and joins at the end.
"""

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
    load_codes,
    load_rows,
    round_to,
    split_latents,
    store_rows,
)
from softvq.kernels.prologue import TRITON_DTYPE, Arithmetic, PreparedCodebook


def launch(
    z: Tensor,
    prepared: PreparedCodebook,
    temperature: Tensor,
    quantized: Tensor,
    row_state: Tensor,
    grad_quantized: Tensor | None,
    grad_log_partition: Tensor | None,
    grad_entropy: Tensor | None,
    code_gradient: Tensor | None,
    how: Arithmetic,
    needs_z: bool,
    needs_temperature: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """grad z (H, N, D), grad T (), and (2/T)(δ − λ) of each row (H, N).

    z, quantized and grad_quantized (H, N, D) with unit stride along D; gradients of rows (H, N)
    contiguous; code_gradient (H, padded K) is υ/N.
    """
    heads, rows, dim = z.shape
    parts = 2 if how.split_codebook else 1
    memory = tiles.shared_memory_limit(z.device)
    tile = tiles.choose("row_gradients", how.operand, dim, parts, memory)
    blocks = triton.cdiv(rows, tile.rows)
    row_shift = z.new_empty((heads, rows), dtype=torch.float32)
    grad_z = z.new_empty(z.shape) if needs_z else None
    partial = z.new_empty((heads, blocks), dtype=torch.float32) if needs_temperature else None
    strides = (0, 0) if grad_quantized is None else grad_quantized.stride()[:2]
    if rows:
        _row_gradients_kernel[(blocks, heads)](
            *(z, *prepared, temperature, quantized, row_state),
            *(grad_quantized, grad_log_partition, grad_entropy, code_gradient),
            *(grad_z, partial, row_shift),
            *(*z.stride()[:2], *quantized.stride()[:2], *strides, rows, prepared.high.shape[1]),
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
    return grad_z, None if partial is None else partial.sum(), row_shift


@triton.jit
def _row_gradients_kernel(
    z_pointer,
    high_pointer,
    low_pointer,
    half_norm_pointer,
    mean_pointer,
    temperature_pointer,
    quantized_pointer,
    row_state_pointer,
    grad_quantized_pointer,  # from here to row_shift, None switches the part off
    grad_log_partition_pointer,
    grad_entropy_pointer,
    code_gradient_pointer,
    grad_z_pointer,
    grad_temperature_pointer,
    row_shift_pointer,
    head_stride,
    row_stride,
    quantized_head_stride,
    quantized_row_stride,
    grad_head_stride,
    grad_row_stride,
    rows,
    padded_codes,
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
    offsets = tl.arange(0, ROWS)
    mask = offsets < rows_left
    row = head * rows + start + offsets

    # [ROWS, PAD]
    z = load_rows(z_pointer + head * head_stride + start * row_stride, row_stride, rows_left,
                  ROWS, DIM, PAD)  # fmt: skip
    z_high, z_low = split_latents(z, mean_pointer, CENTRE, SPLIT_LATENTS, OPERAND)
    quantized_pointer += head * quantized_head_stride + start * quantized_row_stride
    # [ROWS]; past the end every weight is 0, and finite the score it is multiplied with
    maximum = tl.load(row_state_pointer + row, mask=mask, other=-LOWEST)
    heads = tl.num_programs(1).to(tl.int64)
    inverse_total = tl.load(row_state_pointer + heads * rows + row, mask=mask, other=0.0)
    delta = tl.zeros([ROWS], tl.float32)
    if grad_quantized_pointer is not None:
        # [ROWS, PAD]
        grad = load_rows(
            grad_quantized_pointer + head * grad_head_stride + start * grad_row_stride,
            grad_row_stride, rows_left, ROWS, DIM, PAD)  # fmt: skip
        if grad.dtype != OPERAND:
            grad = round_to(grad, OPERAND)
        quantized = load_rows(quantized_pointer, quantized_row_stride, rows_left, ROWS, DIM, PAD)
        quantized = quantized.to(tl.float32) - tl.load(mean_pointer + tl.arange(0, PAD))[None, :]
        delta = tl.sum(grad.to(tl.float32) * quantized, 1)
    if grad_entropy_pointer is not None:
        entropy_factor = LN_2 * tl.load(grad_entropy_pointer + row, mask=mask, other=0.0)

    # sigma: what Σ_k e_nk is left with, because delta comes from a rounded q or lacks a part
    sigma = tl.zeros([ROWS], tl.float32)
    # Σ_k e·score and Σ_k weight·score, for dT
    gradient_score = tl.zeros([ROWS], tl.float32)
    mean_score = tl.zeros([ROWS], tl.float32)
    # [ROWS, PAD]
    pull = tl.zeros([ROWS, PAD], tl.float32)
    for first in tl.range(0, padded_codes, CODES, num_stages=STAGES):
        # [CODES, PAD]
        code = load_codes(high_pointer + first * PAD, CODES, PAD)
        # [CODES]
        half_norm = tl.load(half_norm_pointer + first + tl.arange(0, CODES))
        # [ROWS, CODES]
        product = dot(z_high, code.T, tl.zeros([ROWS, CODES], tl.float32))
        if SPLIT_CODEBOOK:
            code_low = load_codes(low_pointer + first * PAD, CODES, PAD)
            product = dot(z_high, code_low.T, product)
        if SPLIT_LATENTS:
            product = dot(z_low, code.T, product)
        relative = tl.fma(product - half_norm[None, :], scale, -maximum[:, None])
        weights = tl.exp2(relative)

        # [ROWS, CODES]: a_nk − δ_n
        rise = tl.zeros([ROWS, CODES], tl.float32)
        if grad_quantized_pointer is not None:
            rise = dot(grad, code.T, rise)
        if code_gradient_pointer is not None:
            codes = head * padded_codes + first + tl.arange(0, CODES)
            rise += tl.load(code_gradient_pointer + codes)[None, :]
        if grad_entropy_pointer is not None:
            rise = tl.fma(relative, -entropy_factor[:, None], rise)
        gradient = weights * (rise - delta[:, None])
        sigma += tl.sum(gradient, 1)
        if grad_temperature_pointer is not None:
            gradient_score += tl.sum(gradient * relative, 1)
            mean_score += tl.sum(weights * relative, 1)
        if grad_z_pointer is not None:
            pull = dot(round_to(gradient, OPERAND), code, pull)

    sigma *= inverse_total
    shift = delta + sigma
    if grad_log_partition_pointer is not None:
        grad_log_partition = tl.load(grad_log_partition_pointer + row, mask=mask, other=0.0)
        shift -= grad_log_partition
    tl.store(row_shift_pointer + row, 2.0 * inverse_temperature * shift, mask=mask)

    # [ROWS, PAD], the latents as the products saw them
    z = z_high.to(tl.float32)
    if SPLIT_LATENTS:
        z += z_low.to(tl.float32)
    if grad_temperature_pointer is not None:
        mean_score *= inverse_total
        change = LN_2 * (gradient_score * inverse_total - sigma * mean_score)
        if grad_log_partition_pointer is not None:
            best = LN_2 * maximum - tl.sum(z * z, 1) * inverse_temperature
            change += grad_log_partition * (best + LN_2 * mean_score)
        change = -inverse_temperature * tl.sum(tl.where(mask, change, 0.0))
        blocks = tl.num_programs(0)
        tl.store(grad_temperature_pointer + head * blocks + tl.program_id(0), change)
    if grad_z_pointer is not None:
        quantized = load_rows(quantized_pointer, quantized_row_stride, rows_left, ROWS, DIM, PAD)
        quantized = quantized.to(tl.float32) - tl.load(mean_pointer + tl.arange(0, PAD))[None, :]
        pull = pull * inverse_total[:, None] - sigma[:, None] * quantized
        if grad_log_partition_pointer is not None:
            pull += grad_log_partition[:, None] * (quantized - z)
        grad_z_pointer += (head * rows + start) * DIM
        store_rows(grad_z_pointer, DIM, rows_left, 2.0 * inverse_temperature * pull, ROWS, DIM, PAD)
