"""Sums over the rows, one for each code: dC, Σ p·values, or just Σ p.

A program owns a block of codes and a range of rows; there are far fewer code blocks than
multiprocessors, so the rows are split, each range leaves a partial sum, and the partial sums are
added in a fixed order. The scores are computed transposed, codes by rows: the weights are then the
left operand of the second product as they leave the registers.

A matrix unit cuts off what a sum has more than a float32, and so shrinks it a little with every
product. Gradients of 22 bits do not stand that for long: after a chunk of rows what has come
together is added to the partial sum in memory, and rounded there.
"""

import functools

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

# Partial sums may always take the first; and where there are few rows, of each of which 12 bytes
# are kept for the backward, what these leave of the second.
PARTIAL_BYTES, BACKWARD_BYTES = 8 * 2**20, 20 * 2**20
_CHUNK = 128  # rows; a multiple of the tiles'
# Tiles of a range where probabilities alone are added: nearly equal numbers, one behind the other,
# all round the same way.
_USAGE_TILES = 32


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
    more = grad_entropy is not None or code_gradient is not None
    kernel: tiles.Kernel = "code_sweep, all" if more else "code_sweep"
    processors = 4
    if z.is_cuda:
        processors = torch.cuda.get_device_properties(z.device).multi_processor_count

    def run(tile: tiles.Tile):
        blocks = triton.cdiv(codes, tile.codes)
        row_blocks = triton.cdiv(rows, tile.rows)
        splits = _splits(
            programs=blocks * heads,
            most=row_blocks,
            partial_bytes=4 * heads * padded_codes * width,
            rows=rows * heads,
            together=processors * tiles.resident(kernel, how.operands, dim, tile),
            least=1 if width > 1 else max(1, triton.cdiv(row_blocks, _USAGE_TILES)),
        )
        # In whole tiles, so that only the last range ends inside one.
        rows_per_split = triton.cdiv(row_blocks, splits) * tile.rows
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
    return run(tiles.choose(kernel, how, z, padded_codes, run, *parts))[1]


@functools.lru_cache
def _splits(
    programs: int, most: int, partial_bytes: int, rows: int, together: int, least: int = 1
) -> int:
    """Into how many ranges, at most, the rows are cut, if one takes so many programs: into the
    fewest, from `least` on, that processors which run so many together finish, within a twentieth,
    first.
    """
    memory = max(PARTIAL_BYTES, BACKWARD_BYTES - 12 * rows) // partial_bytes
    most = max(1, min(most, memory, max(least, triton.cdiv(4 * together, programs))))
    choices = range(min(least, most), most + 1)
    times = [triton.cdiv(splits * programs, together) / splits for splits in choices]
    return choices[next(i for i, time in enumerate(times) if time <= 1.05 * min(times))]


@triton.jit
def _code_sweep_kernel(
    z_pointer,
    high_pointer,
    low_pointer,
    half_norm_pointer,
    centre_pointer,
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
    if centre_pointer is not None:
        centre_pointer += head * PAD
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
    offsets = tl.arange(0, ROWS)
    for done in tl.range(0, length, ROWS, num_stages=STAGES, disable_licm=PARTS > 1):
        start = begin + done
        first_row = tile_start(start, rows, ROWS, WHOLE_TILES)
        # [ROWS]; in 32 bits, from the tile's first row on, which alone changes
        repeated = (start - first_row).to(tl.int32)
        mask = (offsets >= repeated) & (offsets < repeated + length - done)
        rows_left = ROWS if WHOLE_TILES else rows
        # of each part [ROWS, WIDTH]
        z_high, z_low, z_scale, _ = load_operand(
            *(z_pointer + first_row * row_stride, row_stride, rows_left, centre_pointer),
            *(SPLIT_LATENTS, OPERAND, ROWS, DIM, PAD, PARTS),
        )
        # [ROWS]; where nothing counts every weight is 0, and finite the score it is multiplied with
        state_pointer = row_state_pointer + first_row
        best = tl.load(state_pointer + offsets, mask=mask, other=tl.minimum(1e37 / scale, 1e37))
        inverse_total = tl.load(state_pointer + heads * rows + offsets, mask=mask, other=0.0)
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
            row_shift = tl.load(row_shift_pointer + first_row + offsets, mask=mask, other=0.0)
            rise = -row_shift[None, :]
            if values_pointer is not None:
                along = score_product(code, code_low, value, value_low, zeros, SPLIT_ALL, SPLIT_ALL)
                factor = 2.0 * inverse_temperature * unit * value_scale
                rise = tl.fma(along, factor[None, :], rise)
            if code_gradient_pointer is not None:
                rise += code_gradient[:, None]
            if grad_entropy_pointer is not None:
                entropy_pointer = grad_entropy_pointer + first_row
                grad_entropy = tl.load(entropy_pointer + offsets, mask=mask, other=0.0)
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

    if CHUNK > 0:
        # What adds the rest may lie in other threads, and the order of a sum decides its bits.
        tl.debug_barrier()
    if row_shift_pointer is None and values_pointer is None:
        tl.store(partial_pointer + out + codes, column)
    else:
        column *= -unit
        MOVES: tl.constexpr = row_shift_pointer is not None
        high_pointer += first * PAD + FIRST
        if SPLIT_CODEBOOK:
            low_pointer += first * PAD + FIRST
        store_with_terms(
            *(sums_pointer, PAD, 0, CODES, sums * operand_scale),
            *(column, high_pointer, PAD, column, low_pointer, PAD, None, CODES, WIDTH, WIDTH),
            *(MOVES, MOVES and SPLIT_CODEBOOK, CHUNK > 0),
        )
