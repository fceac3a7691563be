"""The streaming backend: plain PyTorch, no N×K matrix, the default without a GPU.

Rows are independent, so a block of rows meets the whole codebook, leaves its outputs and is
forgotten. The backward repeats the block's softmax from z and C instead of loading it: nothing has
to be saved, and the probabilities sum to one whatever rounding did in between.

Every function takes a precision. Whatever it is, scores are nearly as good as float32 products; the
other products are as torch is set to multiply.
"""

import torch
from torch import Tensor

from softvq.kernels.block_softmax import LN_2, BlockSoftmax
from softvq.kernels.dtypes import accumulation_dtype


def soft_forward(
    z: Tensor, codebook: Tensor, temperature: Tensor, precision: str = "highest"
) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
    """Quantized (H, N, D), indices, log-partition and entropy (H, N), nothing to save."""
    heads, rows, _ = z.shape
    dtype = accumulation_dtype(z, codebook)
    temperature = temperature.to(dtype)
    quantized = z.new_empty(z.shape)
    indices = z.new_empty((heads, rows), dtype=torch.int64)
    log_partition = z.new_empty((heads, rows), dtype=dtype)
    entropy = torch.empty_like(log_partition)

    for h in range(heads):
        softmax = BlockSoftmax(codebook[h], dtype, temperature, rows, precision)
        for block in softmax.blocks():
            latents = z[h, block].to(dtype) - softmax.centre
            softmax.run(latents)
            total = softmax.total[:, 0]
            best = softmax.indices()
            mean = softmax.weighted_codes() / softmax.total
            quantized[h, block] = mean + softmax.centre
            indices[h, block] = best
            log_partition[h, block] = softmax.score_at(best, latents) + total.log()
            entropy[h, block] = total.log() - softmax.weighted_score(softmax.weights) / total
    return quantized, indices, log_partition, entropy, None


def soft_backward(
    z: Tensor,
    codebook: Tensor,
    temperature: Tensor,
    grad_quantized: Tensor | None,
    grad_log_partition: Tensor | None,
    grad_entropy: Tensor | None,
    grad_usage: Tensor | None,
    needs_z: bool,
    needs_codebook: bool,
    needs_temperature: bool,
    quantized: Tensor | None = None,
    indices: Tensor | None = None,
    row_state: Tensor | None = None,
    detach_log_partition: bool = False,
    precision: str = "highest",
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of z (H, N, D), codebook (H, K, D) and temperature () for the gradients given.

    A missing incoming gradient is zero; an outgoing one that is not needed is None. `quantized`,
    `indices` and `row_state`, the forward's, are for backends that reuse them. With
    detach_log_partition the log-partition is that of constant latents. The names are those of
    README.md; log p is replaced by the score relative to the row's best one, since a row's constant
    drops out everywhere.
    """
    heads, rows, dim = z.shape
    codes = codebook.shape[1]
    dtype = accumulation_dtype(z, codebook)
    temperature = temperature.to(dtype)
    two_over_t = 2 / temperature
    grad_z = z.new_empty(z.shape) if needs_z else None
    grad_codebook = codebook.new_empty(codebook.shape) if needs_codebook else None
    grad_temperature = temperature.new_zeros(()) if needs_temperature else None

    for h in range(heads):
        softmax = BlockSoftmax(codebook[h], dtype, temperature, rows, precision)
        usage_bias = softmax.centre.new_zeros(codes)
        if grad_usage is not None:
            usage_bias = grad_usage[h].to(dtype) / rows
        # Σ_n p_nk g_n + (2/T) Σ_n e_nk z_n, transposed, and Σ_n e_nk
        sums = softmax.centre.new_zeros(dim, codes)
        column = softmax.centre.new_zeros(codes)

        for block in softmax.blocks():
            latents = z[h, block].to(dtype) - softmax.centre
            g = None if grad_quantized is None else grad_quantized[h, block].to(dtype)
            lam = None if grad_log_partition is None else grad_log_partition[h, block, None]
            eta = None if grad_entropy is None else grad_entropy[h, block, None]
            softmax.run(latents)
            p = softmax.probabilities()
            e = softmax.score_gradients()
            if g is None:
                e.copy_(usage_bias)
            else:
                beta = 0 if grad_usage is None else 1  # 0 saves the pass that would fill e
                torch.addmm(usage_bias, *softmax.operands(g), beta=beta, out=e)
            if eta is not None:
                e.addcmul_(softmax.scores, eta, value=-LN_2)
            delta = e.mul_(p).sum(1, keepdim=True)
            e.addcmul_(p, delta, value=-1)
            if lam is not None and not detach_log_partition:
                e.addcmul_(p, lam)

            if needs_z:
                # Σ_k e_nk is λ_n, or 0, up to rounding; the sum itself keeps z near a code exact.
                pull = (e @ softmax.codebook).addcmul_(latents, e.sum(1, keepdim=True), value=-1)
                grad_z[h, block] = pull * two_over_t
            if lam is not None and detach_log_partition:
                e.addcmul_(p, lam)
            if needs_codebook:
                right = latents * two_over_t
                column += e.sum(0)
                if g is None:
                    sums.addmm_(right.T, e)
                else:
                    sums.addmm_(torch.cat([g, right]).T, softmax.weights_and_gradients())
            if needs_temperature:
                if lam is not None:
                    best_score = softmax.score_at(softmax.indices(), latents)
                    grad_temperature -= (lam[:, 0] * best_score).sum() / temperature
                grad_temperature -= softmax.weighted_score(e).sum() / temperature

        if needs_codebook:
            grad_codebook[h] = sums.T - two_over_t * column[:, None] * softmax.codebook
    return grad_z, grad_codebook, grad_temperature


def probability_sums(
    z: Tensor,
    codebook: Tensor,
    temperature: Tensor,
    values: Tensor | None,
    row_state: Tensor | None = None,
    precision: str = "highest",
) -> Tensor:
    """Σ_n p_nk values_n, (H, K, V) for values (H, N, V); Σ_n p_nk, (H, K, 1), for None."""
    heads, rows, _ = z.shape
    codes = codebook.shape[1]
    dtype = accumulation_dtype(z, codebook)
    temperature = temperature.to(dtype)
    # Transposed: a matrix product of a transposed block of weights is up to twice as slow.
    sums = z.new_zeros((heads, 1 if values is None else values.shape[2], codes), dtype=dtype)
    for h in range(heads):
        softmax = BlockSoftmax(codebook[h], dtype, temperature, rows, precision)
        lost = 0.0
        for block in softmax.blocks():
            softmax.run(z[h, block].to(dtype) - softmax.centre)
            if values is None:
                # Nearly equal numbers, added in turn, all round the same way: what the sum loses
                # with a block is added to the next one (Kahan). A product could round to tf32.
                more = softmax.probabilities().sum(0) - lost
                total = sums[h] + more
                lost = total - sums[h] - more
                sums[h] = total
            else:
                sums[h].addmm_((values[h, block].to(dtype) / softmax.total).T, softmax.weights)
    return sums.mT.contiguous()


def nearest(z: Tensor, codebook: Tensor, precision: str = "highest") -> Tensor:
    """Index of the nearest code, (H, N) int64; the lowest index wins a tie of scores as rounded."""
    heads, rows, _ = z.shape
    dtype = accumulation_dtype(z, codebook)
    indices = z.new_empty((heads, rows), dtype=torch.int64)
    one = z.new_ones((), dtype=dtype)
    for h in range(heads):
        softmax = BlockSoftmax(codebook[h], dtype, one, rows, precision)
        for block in softmax.blocks():
            softmax.match(z[h, block].to(dtype) - softmax.centre)
            indices[h, block] = softmax.indices()
    return indices


def code_sums(z: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """Sum (K, D) and count (K) of the rows of z (N, D) that each index (N) in [0, K) names.

    Differentiable in z by autograd; float32, or float64 for float64.
    """
    dtype = torch.promote_types(z.dtype, torch.float32)
    sums = z.new_zeros((codebook_size, z.shape[1]), dtype=dtype)
    # Whole numbers: a float32 stops counting at 2^24. (`bincount` would wait for the device.)
    counts = indices.new_zeros(codebook_size)
    return (
        sums.index_add(0, indices, z.to(dtype)),
        counts.index_add(0, indices, torch.ones_like(indices)).to(dtype),
    )
