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
from torch.nn.functional import pad

from softvq.kernels.tiles import padded_dim

CHUNK = 256  # rows of one program: enough programs at N = 10^5, few sums to keep at N = 10^7


@triton.jit
def _segment_sums_kernel(
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


@torch.library.custom_op("softvq::code_sums", mutates_args=())
def code_sums(z: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """Sum (K, D) and count (K) of the rows of z (N, D) that each index (N) in [0, K) names.

    z is float16, bfloat16, float32 or float64, with any strides; the results are float32 or
    float64. Differentiable in z.
    """
    dtype = torch.promote_types(z.dtype, torch.float32)
    if z.stride(1) != 1:
        z = z.contiguous()
    ordered, order = indices.to(torch.int32).sort(stable=True)
    codes = torch.arange(codebook_size + 1, dtype=torch.int32, device=z.device)
    # (K + 1): where each code's segment begins in the order, and its chunks among all chunks.
    begins = torch.searchsorted(ordered, codes)
    counts = begins.diff()
    first_chunk = pad(((counts + CHUNK - 1) // CHUNK).cumsum(0), (1, 0))

    # (chunks): the code that a chunk belongs to, and its part of the order; unused ones are empty.
    chunk = torch.arange(len(z) // CHUNK + codebook_size, device=z.device)
    code = torch.searchsorted(first_chunk[1:], chunk, right=True).clamp(max=codebook_size - 1)
    chunk_begins = begins[code] + (chunk - first_chunk[code]) * CHUNK
    chunk_ends = torch.minimum(chunk_begins + CHUNK, begins[code + 1])

    with torch.cuda.device_of(z):
        partial = _segment_sums(z, order, chunk_begins, chunk_ends, dtype)
        sums = _segment_sums(partial, None, first_chunk[:-1], first_chunk[1:], dtype)
    return sums, counts.to(dtype)


@code_sums.register_fake
def _(z: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(z.dtype, torch.float32)
    sums = z.new_empty((codebook_size, z.shape[1]), dtype=dtype)
    return sums, z.new_empty((codebook_size,), dtype=dtype)


def _save_indices(ctx, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.dtype = inputs[0].dtype


def _gather_gradient(ctx, grad_sums: Tensor, _) -> tuple[Tensor, None, None]:
    (indices,) = ctx.saved_tensors
    return grad_sums[indices].to(ctx.dtype), None, None


code_sums.register_autograd(_gather_gradient, setup_context=_save_indices)


def _segment_sums(
    values: Tensor, order: Tensor | None, begins: Tensor, ends: Tensor, dtype: torch.dtype
) -> Tensor:
    dim = values.shape[1]
    sums = values.new_empty((len(begins), dim), dtype=dtype)
    _segment_sums_kernel[(len(begins),)](
        *(values, order, begins, ends, sums, values.stride(0)),
        DIM=dim,
        PAD=padded_dim(dim),
        ROWS=max(1, min(32, 8192 // padded_dim(dim))),  # at most 64 registers of sums a thread
        num_warps=4,
        enable_fp_fusion=True,
    )
    return sums
