"""The streaming backend: plain PyTorch, no N×K matrix, the default without a GPU.

Rows are independent, so a block of rows meets the whole codebook, leaves its outputs and is
forgotten. The backward repeats the block's softmax from z and C instead of loading it: nothing has
to be saved, and the probabilities sum to one whatever rounding did in between.

What makes it fast on a CPU: blocks that stay in the cache, in-place operations on reused buffers,
exp2 with a floor under its argument (denormal results are 20 times slower), an arg-maximum in two
levels (PyTorch's own is not vectorised), and both halves of dC in one matrix product.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from softvq.kernels.centre import centre_of
from softvq.kernels.dtypes import accumulation_dtype
from softvq.kernels.products import float32_products

BLOCK_ELEMENTS = 2**21  # rows × codes in one buffer: 8 MB of float32
MIN_ROWS, MAX_ROWS = 32, 2048
LOG2_E = math.log2(math.e)
LN_2 = math.log(2)


class BlockSoftmax:
    """Softmax of blocks of latents over one centred codebook, in buffers that are reused.

    After `run`, all in base 2 and relative to the row's best code:
    ``scores`` (R, K) ≤ 0, ``weights`` = 2^scores, ``total`` (R, 1) = Σ_k weights.
    """

    def __init__(self, codebook: Tensor, dtype: torch.dtype, temperature: Tensor, rows: int):
        codebook = codebook.to(dtype)
        self.centre = centre_of(codebook)  # (1, D)
        self.codebook = codebook - self.centre
        # [c, −½‖c‖²], to be multiplied with [z, 1]: adding a bias would be a pass of its own.
        self.affine = torch.cat([self.codebook, -0.5 * self.codebook.square().sum(1, True)], 1)
        self.temperature = temperature
        # Products of a weight and a gradient must not become denormal either.
        self.floor = math.log2(torch.finfo(dtype).tiny) + 26
        # Weights and score gradients lie one under the other: dC needs them as one matrix.
        self._stacked = codebook.new_empty(2 * rows, len(codebook))
        self._scores = codebook.new_empty(rows, len(codebook))

    def match(self, latents: Tensor) -> None:
        """Scores z·c − ½‖c‖² of centred latents (R, D)."""
        self.rows = len(latents)
        self.scores = self._scores[: self.rows]
        # Rounded to bfloat16 or tf32, scores of hundreds would be off by what T may be.
        with float32_products("highest", latents.device):
            torch.mm(pad(latents, (0, 1), value=1), self.affine.T, out=self.scores)

    def run(self, latents: Tensor) -> None:
        """Scores, unnormalised weights and their sums of centred latents (R, D)."""
        self.match(latents)
        best = self.scores.amax(1, keepdim=True)
        self.scores.sub_(best).mul_(2 * LOG2_E / self.temperature).clamp_(min=self.floor)
        self.weights = torch.exp2(self.scores, out=self._stacked[: self.rows])
        self.total = self.weights.sum(1, keepdim=True)

    def indices(self) -> Tensor:
        """Of the nearest codes, (R,), after `match` or `run`."""
        return first_maximum(self.scores)

    def probabilities(self) -> Tensor:
        """Assignment probabilities (R, K), in place of the weights."""
        return self.weights.div_(self.total)

    def score_at(self, indices: Tensor, latents: Tensor) -> Tensor:
        """−‖z−c‖²/T of one code a row, (R,): from the difference, ‖z‖² − 2z·c + ‖c‖² cancels."""
        distance = (latents - self.codebook[indices]).square_().sum(1)
        return -distance / self.temperature

    def weighted_score(self, weights: Tensor) -> Tensor:
        """Σ_k w_k s_k of scores relative to the best, (R,), natural units, for w (R, K).

        The scores are gone then: no other matrix of this size is allocated in the loop.
        """
        return LN_2 * self.scores.mul_(weights).sum(1)

    def score_gradients(self) -> Tensor:
        """A buffer (R, K) that follows the weights in memory, its content undefined."""
        return self._stacked[self.rows : 2 * self.rows]

    def weights_and_gradients(self) -> Tensor:
        """Both of them as one matrix (2R, K)."""
        return self._stacked[: 2 * self.rows]


def first_maximum(scores: Tensor) -> Tensor:
    """The first index of the maximum of each row of (R, K)."""
    rows, codes = scores.shape
    width = max((w for w in range(32, 101, 4) if codes % w == 0), default=codes)
    if width == codes:
        return scores.argmax(1)
    # `argmax` is slow, `amax` is not: find the group first, then look inside it.
    groups = scores.view(rows, codes // width, width)
    group = groups.amax(2).argmax(1)
    within = groups[torch.arange(rows, device=scores.device), group].argmax(1)
    return group * width + within


def rows_per_block(rows: int, codes: int) -> int:
    """How many rows are worked on at once, so that a block of scores stays in the cache."""
    return min(rows, max(MIN_ROWS, min(MAX_ROWS, BLOCK_ELEMENTS // codes)))


def blocks(rows: int, codes: int) -> Iterator[slice]:
    """The rows of each block."""
    step = rows_per_block(rows, codes) or 1
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def soft_forward(
    z: Tensor, codebook: Tensor, temperature: Tensor, precision: str = "highest"
) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
    """Quantized (H, N, D), indices (H, N), log-partition (H, N), entropy (H, N), nothing to save.

    Whatever the precision, scores are exact; the other products are as torch is set to multiply.
    """
    heads, rows, _ = z.shape
    codes = codebook.shape[1]
    dtype = accumulation_dtype(z, codebook)
    temperature = temperature.to(dtype)
    quantized = z.new_empty(z.shape)
    indices = z.new_empty((heads, rows), dtype=torch.int64)
    log_partition = z.new_empty((heads, rows), dtype=dtype)
    entropy = torch.empty_like(log_partition)

    for h in range(heads):
        softmax = BlockSoftmax(codebook[h], dtype, temperature, rows_per_block(rows, codes))
        for block in blocks(rows, codes):
            latents = z[h, block].to(dtype) - softmax.centre
            softmax.run(latents)
            total = softmax.total[:, 0]
            best = softmax.indices()
            mean = softmax.weights @ softmax.codebook / softmax.total
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
        softmax = BlockSoftmax(codebook[h], dtype, temperature, rows_per_block(rows, codes))
        usage_bias = softmax.centre.new_zeros(codes)
        if grad_usage is not None:
            usage_bias = grad_usage[h].to(dtype) / rows
        # Σ_n p_nk g_n + (2/T) Σ_n e_nk z_n, transposed, and Σ_n e_nk
        sums = softmax.centre.new_zeros(dim, codes)
        column = softmax.centre.new_zeros(codes)

        for block in blocks(rows, codes):
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
                torch.addmm(usage_bias, g, softmax.codebook.T, beta=beta, out=e)
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
    if values is None:
        values = z.new_ones((), dtype=dtype).expand(heads, rows, 1)
    # Transposed: a matrix product of a transposed block of weights is up to twice as slow.
    sums = z.new_zeros((heads, values.shape[2], codes), dtype=dtype)
    for h in range(heads):
        softmax = BlockSoftmax(codebook[h], dtype, temperature, rows_per_block(rows, codes))
        for block in blocks(rows, codes):
            softmax.run(z[h, block].to(dtype) - softmax.centre)
            sums[h].addmm_((values[h, block].to(dtype) / softmax.total).T, softmax.weights)
    return sums.mT.contiguous()


def nearest(z: Tensor, codebook: Tensor, precision: str = "highest") -> Tensor:
    """Index of the nearest code, (H, N) int64; the lowest index wins a tie of scores as rounded."""
    heads, rows, _ = z.shape
    codes = codebook.shape[1]
    dtype = accumulation_dtype(z, codebook)
    indices = z.new_empty((heads, rows), dtype=torch.int64)
    one = z.new_ones((), dtype=dtype)
    for h in range(heads):
        softmax = BlockSoftmax(codebook[h], dtype, one, rows_per_block(rows, codes))
        for block in blocks(rows, codes):
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
