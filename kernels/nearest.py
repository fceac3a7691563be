"""The nearest code of every latent, fused: one matrix product and a running best, no N×K matrix.

`argmin ‖z − c‖²` is `argmax z·c − ½‖c‖²`. Operands are always float16, scaled by powers of two: a
float32 is the sum of two of them to 22 bits (three products, the accuracy of float32 at a fifth of
its price), and a bfloat16 is one of them exactly.
"""

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from softvq.kernels import tiles
from softvq.kernels.arithmetic import Arithmetic
from softvq.kernels.lanes import best_quad, lane_order, nearest_of_quad
from softvq.kernels.memory import tile_start
from softvq.kernels.operands import load_codes, load_operand, score_product
from softvq.kernels.primitives import LOWEST
from softvq.kernels.prologue import prepare

Precision = Literal["highest", "high", "medium"]


def nearest(z: Tensor, codebook: Tensor, precision: Precision = "highest") -> Tensor:
    """Index of the nearest code, (H, N) int64; the lowest index wins a tie.

    z (H, N, D) and codebook (H, K, D): float32, bfloat16 or float16, any strides, D ≤ 256. When
    both are 16 bits their products are exact as they are, of elements down to 2^-16 of the largest;
    otherwise "highest" and "high" give the accuracy of float32 and "medium" rounds both to float16.
    """
    heads, rows, dim = z.shape
    if z.stride(2) != 1:
        z = z.contiguous()
    has_float32 = torch.float32 in (z.dtype, codebook.dtype)
    split = has_float32 and precision != "medium"
    how = Arithmetic(torch.float16, split, split, split, centre=has_float32)
    indices = z.new_empty((heads, rows), dtype=torch.int64)

    def run(tile: tiles.Tile):
        compiled = _nearest_kernel[(triton.cdiv(rows, tile.rows), heads)](
            *(z, *prepared, indices),
            *(*z.stride()[:2], rows, codebook.shape[1], prepared.high.shape[1]),
            SPLIT=split,
            WHOLE_TILES=rows >= tile.rows,
            DIM=dim,
            PAD=tiles.padded_dim(dim),
            ROWS=tile.rows,
            CODES=tile.codes,
            STAGES=tile.stages,
            num_warps=tile.warps,
            enable_fp_fusion=True,
        )
        return [compiled], indices

    with torch.cuda.device_of(z):
        prepared = prepare(codebook, how)
        if rows:
            run(tiles.choose("nearest", how, z, prepared.high.shape[1], run))
    return indices


@triton.jit
def _nearest_kernel(
    z_pointer,
    high_pointer,
    low_pointer,
    half_norm_pointer,
    centre_pointer,
    scale_pointer,
    indices_pointer,
    head_stride,
    row_stride: tl.constexpr,
    rows,
    codes,
    padded_codes,
    SPLIT: tl.constexpr,
    WHOLE_TILES: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: ROWS latents of one head against all its codes."""
    start = tile_start(tl.program_id(0) * ROWS, rows, ROWS, WHOLE_TILES)
    rows_left = ROWS if WHOLE_TILES else rows - start
    repeated = (tl.program_id(0) * ROWS - start).to(tl.int32)
    head = tl.program_id(1).to(tl.int64)
    high_pointer += head * padded_codes * PAD
    half_norm_pointer += head * padded_codes
    if low_pointer is not None:
        low_pointer += head * padded_codes * PAD
    if centre_pointer is not None:
        centre_pointer += head * PAD
    unit = tl.load(scale_pointer + head)

    # [ROWS, PAD]
    z_pointer += head * head_stride + start * row_stride
    z_high, z_low, z_scale, _ = load_operand(
        *(z_pointer, row_stride, rows_left, centre_pointer),
        *(SPLIT, tl.float16, ROWS, DIM, PAD, 1),
    )

    # [ROWS, 8], by lane
    best = tl.full([ROWS, 8], LOWEST, tl.float32)
    best_block = tl.zeros([ROWS, 8], tl.int32)
    order = lane_order(CODES)
    for first in tl.range(0, padded_codes, CODES, num_stages=STAGES):
        # [CODES, PAD]
        code, code_low = load_codes(high_pointer, low_pointer, first, order, PAD, 1)
        # [CODES]
        half_norm = tl.load(half_norm_pointer + first + order)
        # [ROWS, CODES]
        product = tl.zeros([ROWS, CODES], tl.float32)
        product = score_product(z_high, z_low, code, code_low, product, SPLIT, SPLIT)
        scores = tl.fma(product, (z_scale / unit)[:, None], -half_norm[None, :])
        # [ROWS, 8]; the strict comparison keeps the lowest index of a tie
        tile_best, block = best_quad(scores)
        best_block = tl.where(tile_best > best, first + block, best_block)
        best = tl.maximum(best, tile_best)

    index, _ = nearest_of_quad(
        *(z_pointer, row_stride, rows_left, best, best_block),
        *(high_pointer, low_pointer, centre_pointer, unit, codes, DIM, PAD),
    )
    offsets = tl.arange(0, ROWS)
    mask = (offsets >= repeated) & (offsets < rows_left)
    tl.store(indices_pointer + head * rows + start + offsets, index.to(tl.int64), mask=mask)
