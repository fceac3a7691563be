"""Sums over the rows, one for each code: dC, Σ p·values, or just Σ p.

A program owns a block of codes and a range of rows; there are far fewer code blocks than
multiprocessors, so the rows are split, each range leaves a partial sum, and the partial sums are
added in a fixed order. The scores are computed transposed, codes by rows: the weights are then the
left operand of the second product as they leave the registers.

A matrix unit cuts off what a sum has more than a float32, and so shrinks it a little with every
product. Gradients of 22 bits do not stand that for long: after a chunk of rows what has come
together is added to the partial sum in memory, and rounded there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from softvq.kernels import tiles
from softvq.kernels.arithmetic import Arithmetic
from softvq.kernels.memory import add_rows, store_with_terms, tile_start
from softvq.kernels.operands import load_codes, load_operand, score_product
from softvq.kernels.primitives import (
    LN_2,
    LOG2_E,
    relative_scores,
    scale_of,
    split_dot,
    weights_operand,
)
from softvq.kernels.prologue import PreparedCodebook

# At most, unless one partial sum alone is larger.
PARTIAL_BYTES = 7 * 2**20
_CHUNK = 128  # rows; a multiple of the tiles'
_PROGRAMS_PER_MULTIPROCESSOR = 2


def launch(
    z: Tensor,
    prepared: PreparedCodebook,
    codes: int,
    temperature: Tensor,
    row_state: Tensor,
    values: Tensor | None,
    how: Arithmetic,
    largest: Tensor | None,
    grad_entropy: Tensor | None = None,
    code_gradient: Tensor | None = None,
    row_shift: Tensor | None = None,
) -> Tensor:
    """float32 sums (H, K, D), or (H, K, 1) = Σ p when neither values nor row_shift are given.

    With row_shift (H, N) the sum is dC and `values` is the gradient of the quantized rows; without
    it the sum is Σ p·values. `largest` (H) is that of the terms, needed where they have to be
    scaled. Layouts as in `row_gradients.launch`.
    """
    heads, rows, dim = z.shape
    padded_codes, pad = prepared.high.shape[1:]
    width = 1 if values is None and row_shift is None else pad
    strides = (0, 0) if values is None else values.stride()[:2]

    def run(tile: tiles.Tile):
        blocks = triton.cdiv(codes, tile.codes)
        splits = _splits(rows, heads, blocks, 4 * heads * padded_codes * width, tile, z.device)
        # In whole tiles, so that only the last range ends inside one.
        rows_per_split = triton.cdiv(triton.cdiv(rows, tile.rows), splits) * tile.rows
        shape = (splits, heads, padded_codes, width)
        chunk = _CHUNK if how.split_all and width > 1 else 0
        partial = (z.new_zeros if chunk else z.new_empty)(shape, dtype=torch.float32)
        compiled = [
            _code_sweep_kernel[(blocks, splits, heads)](
                *(z, *prepared, temperature, row_state),
                *(values, grad_entropy, code_gradient, row_shift, largest, partial),
                *(*z.stride()[:2], *strides, rows, rows_per_split, padded_codes),
                **tiles.constants(tile, part, how, z),
                CHUNK=chunk,
            )
            for part in range(min(width, tile.parts))
        ]
        return compiled, partial[:, :, :codes, : min(width, dim)].sum(0)

    parts = [x is not None for x in (values, grad_entropy, code_gradient, row_shift)]
    more = grad_entropy is not None or code_gradient is not None
    kernel = "code_sweep, all" if more else "code_sweep"
    return run(tiles.choose(kernel, how, z, padded_codes, run, *parts))[1]


def _splits(
    rows: int, heads: int, blocks: int, partial_bytes: int, tile: tiles.Tile, device: torch.device
) -> int:
    """How many ranges the rows are cut into: enough programs, little memory, no empty range."""
    multiprocessors = 4
    if device.type == "cuda":
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = triton.cdiv(_PROGRAMS_PER_MULTIPROCESSOR * multiprocessors, blocks * heads)
    return max(1, min(wanted, triton.cdiv(rows, tile.rows), PARTIAL_BYTES // partial_bytes))


@triton.jit
def _code_sweep_kernel(
    z_pointer,
    high_pointer,
    low_pointer,
    half_norm_pointer,
    mean_pointer,
    scale_pointer,
    temperature_pointer,
    row_state_pointer,
    values_pointer,  # from here to largest, None switches the part off
    grad_entropy_pointer,
    code_gradient_pointer,
    row_shift_pointer,
    largest_pointer,
    partial_pointer,
    head_stride,
    row_stride: tl.constexpr,
    values_head_stride,
    values_row_stride: tl.constexpr,
    rows,
    rows_per_split,
    padded_codes,
    SPLIT_LATENTS: tl.constexpr,
    SPLIT_ALL: tl.constexpr,
    WHOLE_TILES: tl.constexpr,  # there are at least ROWS rows
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    STAGES: tl.constexpr,
    CHUNK: tl.constexpr,  # rows, or 0 for no chunks
):
    """One program: CODES codes of one head against one range of rows."""
    first = tl.program_id(0) * CODES
    split_index = tl.program_id(1)
    head = tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(2).to(tl.int64)
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
    if mean_pointer is not None:
        mean_pointer += head * PAD
    if scale_pointer is not None:
        unit = tl.load(scale_pointer + head)
    scale = 2.0 * LOG2_E * inverse_temperature * unit * unit

    codes = tl.arange(0, CODES)
    # of each part [CODES, WIDTH]
    code, code_low = load_codes(high_pointer, low_pointer, first, codes, PAD, PARTS)
    # [CODES]
    half_norm = tl.load(half_norm_pointer + first + codes)
    if code_gradient_pointer is not None:
        code_gradient_pointer += head * padded_codes + first
        code_gradient = 2.0 * inverse_temperature * tl.load(code_gradient_pointer + codes)
    operand_scale = 1.0  # what brings the terms into the range of float16
    if largest_pointer is not None:
        operand_scale = scale_of(tl.load(largest_pointer + head))

    # Σ_n over this range: of e or else p, [CODES]; of p·g and e·z, [CODES, WIDTH]
    column = tl.zeros([CODES], tl.float32)
    sums = tl.zeros([CODES, WIDTH], tl.float32)
    begin = split_index.to(tl.int64) * rows_per_split
    end = tl.minimum(begin + rows_per_split, rows)
    out = (split_index * heads + head) * padded_codes + first
    sums_pointer = partial_pointer + out * PAD + FIRST
    z_pointer += head * head_stride
    row_state_pointer += head * rows
    if row_shift_pointer is not None:
        row_shift_pointer += head * rows
    if grad_entropy_pointer is not None:
        grad_entropy_pointer += head * rows
    if values_pointer is not None:
        values_pointer += head * values_head_stride
    length = (end - begin).to(tl.int32)
    for done in tl.range(0, length, ROWS, num_stages=STAGES, disable_licm=PARTS > 1):
        start = begin + done
        first_row = tile_start(start, rows, ROWS, WHOLE_TILES)
        row = first_row + tl.arange(0, ROWS)
        mask = (row >= start) & (row < end)
        rows_left = ROWS if WHOLE_TILES else rows
        # of each part [ROWS, WIDTH]
        z_high, z_low, z_scale, _ = load_operand(
            *(z_pointer + first_row * row_stride, row_stride, rows_left, mean_pointer),
            *(SPLIT_LATENTS, OPERAND, ROWS, DIM, PAD, PARTS),
        )
        # [ROWS]; where nothing counts every weight is 0, and finite the score it is multiplied with
        best = tl.load(row_state_pointer + row, mask=mask, other=tl.minimum(1e37 / scale, 1e37))
        inverse_total = tl.load(row_state_pointer + heads * rows + row, mask=mask, other=0.0)
        # [CODES, ROWS]
        zeros = tl.zeros([CODES, ROWS], tl.float32)
        product = score_product(
            *(code, code_low, z_high, z_low, zeros, SPLIT_CODEBOOK, SPLIT_LATENTS, True)
        )
        score = tl.fma(product, (z_scale / unit)[None, :], -half_norm[:, None])
        relative = relative_scores(score, best[None, :], scale, OPERAND)
        p = tl.exp2(relative) * inverse_total[None, :]

        if values_pointer is not None:
            # of each part [ROWS, WIDTH]
            value, value_low, value_scale, _ = load_operand(
                *(values_pointer + first_row * values_row_stride, values_row_stride, rows_left),
                *(None, SPLIT_ALL, OPERAND, ROWS, DIM, PAD, PARTS),
            )
            factor = (value_scale / operand_scale)[None, :]
            p_high, p_low = weights_operand(p, factor, SPLIT_ALL, OPERAND)
            sums = split_dot(
                p_high, p_low, value[PART], value_low[PART], sums, SPLIT_ALL, SPLIT_ALL
            )
        if row_shift_pointer is not None:
            # [CODES, ROWS]: (2/T)(a_nk − δ_n + λ_n), the factor costs nothing inside the fma
            row_shift = tl.load(row_shift_pointer + row, mask=mask, other=0.0)
            rise = -row_shift[None, :]
            if values_pointer is not None:
                along = score_product(code, code_low, value, value_low, zeros, SPLIT_ALL, SPLIT_ALL)
                factor = 2.0 * inverse_temperature * unit * value_scale
                rise = tl.fma(along, factor[None, :], rise)
            if code_gradient_pointer is not None:
                rise += code_gradient[:, None]
            if grad_entropy_pointer is not None:
                grad_entropy = tl.load(grad_entropy_pointer + row, mask=mask, other=0.0)
                factor = -2.0 * LN_2 * inverse_temperature * grad_entropy
                rise = tl.fma(relative, factor[None, :], rise)
            gradient = p * rise
            column += tl.sum(gradient, 1)
            factor = (z_scale / operand_scale)[None, :]
            gradient, gradient_low = weights_operand(gradient, factor, SPLIT_ALL, OPERAND)
            sums = split_dot(
                gradient, gradient_low, z_high[PART], z_low[PART], sums, SPLIT_ALL, SPLIT_ALL
            )
        elif values_pointer is None:
            column += tl.sum(p, 1)
        # Not after the last product: for sm_100, sums that no other follows are not zeroed.
        if CHUNK > 0 and (done + ROWS) % CHUNK == 0 and done + ROWS < length:
            # [CODES, WIDTH]
            add_rows(sums_pointer, PAD, sums * operand_scale, CODES, WIDTH)
            sums = tl.zeros([CODES, WIDTH], tl.float32)

    if row_shift_pointer is None and values_pointer is None:
        tl.store(partial_pointer + out + codes, column)
    else:
        column *= -unit
        MOVES: tl.constexpr = row_shift_pointer is not None
        high_pointer += first * PAD + FIRST
        if SPLIT_CODEBOOK:
            low_pointer += first * PAD + FIRST
        store_with_terms(
            *(sums_pointer, PAD, CODES, sums * operand_scale),
            *(column, high_pointer, PAD, column, low_pointer, PAD, None, CODES, WIDTH, WIDTH),
            *(MOVES, MOVES and SPLIT_CODEBOOK, CHUNK > 0),
        )
