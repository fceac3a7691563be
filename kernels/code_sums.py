"""Sums and counts of the rows assigned to each code, fused and the same bits every time.

Sorting the indices (a stable radix sort: 32-bit keys, no data moved) turns "rows of code k" into a
segment. Adding a segment in its own order needs no atomics, whose order differs from run to run,
and reads every row once. One program a segment would wait for the largest: with collapsed codes
it holds all rows. So a segment is cut into chunks of at most CHUNK rows, each summed by its own
program, and a second launch of the same kernel adds the chunks. There are at most N/CHUNK + K of
them, known without asking the device how the rows fell: no synchronisation, and the only extra
memory beside the sort's is their sums. A one-hot matrix product would do K times the work.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from softvq.kernels.tiles import padded_dim

CHUNK = 256  # rows of one program: 4 of them fill a multiprocessor, and K=1024, N=1M makes 5000
ROWS = 32


@triton.jit
def segment_sums_kernel(
    values_pointer,
    order_pointer,
    begins_pointer,
    ends_pointer,
    sums_pointer,
    value_stride,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """sums[s] = Σ values[order[i]] over begins[s] ≤ i < ends[s]; without an order, of values[i].

    values (M, DIM) with unit column stride · order (M) int64 or None · begins, ends (S) int64
    · sums (S, DIM) in the dtype of the addition
    """
    segment = tl.program_id(0).to(tl.int64)
    begin = tl.load(begins_pointer + segment)
    end = tl.load(ends_pointer + segment)
    dtype: tl.constexpr = sums_pointer.dtype.element_ty
    # [PAD]
    column = tl.arange(0, PAD)
    # [ROWS, PAD]: added up over rows only once, at the end.
    sums = tl.zeros([ROWS, PAD], dtype)
    for start in range(begin, end, ROWS):
        # [ROWS]
        row = start + tl.arange(0, ROWS)
        inside = row < end
        if order_pointer is not None:
            row = tl.load(order_pointer + row, mask=inside, other=0)
        # [ROWS, PAD]
        values = tl.load(
            values_pointer + row[:, None] * value_stride + column[None, :],
            mask=inside[:, None] & (column < DIM)[None, :],
            other=0.0,
        )
        sums += values.to(dtype)
    tl.store(sums_pointer + segment * DIM + column, tl.sum(sums, 0), mask=column < DIM)


def code_sums(z: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """Sum (K, D) and count (K) of the rows of z (N, D) with each index (N); at least float32.

    An index outside [0, K) counts nowhere.
    """
    rows, dim = z.shape
    dtype = torch.promote_types(z.dtype, torch.float32)
    if z.stride(1) != 1:
        z = z.contiguous()
    ordered, order = indices.to(torch.int32).sort(stable=True)
    codes = torch.arange(codebook_size + 1, dtype=torch.int32, device=z.device)
    # (K + 1): where each code's segment begins in the order, and its chunks among all chunks.
    begins = torch.searchsorted(ordered, codes)
    counts = begins.diff()
    first_chunk = torch.nn.functional.pad(((counts + CHUNK - 1) // CHUNK).cumsum(0), (1, 0))

    # (chunks): the code that a chunk belongs to, and its part of the order; unused ones are empty.
    chunk = torch.arange(rows // CHUNK + codebook_size, device=z.device)
    code = torch.searchsorted(first_chunk[1:], chunk, right=True).clamp(max=codebook_size - 1)
    chunk_begins = begins[code] + (chunk - first_chunk[code]) * CHUNK
    chunk_ends = torch.minimum(chunk_begins + CHUNK, begins[code + 1])

    partial = _segment_sums(z, order, chunk_begins, chunk_ends, dtype)
    sums = _segment_sums(partial, None, first_chunk[:-1], first_chunk[1:], dtype)
    return sums, counts.to(dtype)


def _segment_sums(
    values: Tensor, order: Tensor | None, begins: Tensor, ends: Tensor, dtype: torch.dtype
) -> Tensor:
    sums = values.new_empty((len(begins), values.shape[1]), dtype=dtype)
    segment_sums_kernel[(len(begins),)](
        *(values, order, begins, ends, sums, values.stride(0)),
        DIM=values.shape[1],
        PAD=padded_dim(values.shape[1]),
        ROWS=ROWS,
        num_warps=4,
    )
    return sums
