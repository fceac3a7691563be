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

from softvq.kernels.dtypes import accumulation_dtype

BLOCK_ELEMENTS = 2**22  # rows × codes in one buffer: 16 MB of float32
MIN_ROWS, MAX_ROWS = 32, 2048
LOG2_E = math.log2(math.e)
LN_2 = math.log(2)


class BlockSoftmax:
    """Softmax of blocks of latents over one centred codebook, in buffers that are reused.

    After `run`, all in base 2 and relative to the row's best code:
    ``scores`` (R, K) ≤ 0, ``weights`` = 2^scores, ``total`` (R, 1) = Σ_k weights, ``indices`` (R,).
    """

    def __init__(self, codebook: Tensor, dtype: torch.dtype, temperature: Tensor, rows: int):
        codebook = codebook.to(dtype)
        self.mean = codebook.mean(0)
        self.codebook = codebook - self.mean
        self.bias = -0.5 * self.codebook.square().sum(1)
        self.temperature = temperature
        # Products of a weight and a gradient must not become denormal either.
        self.floor = math.log2(torch.finfo(dtype).tiny) + 26
        # Weights and score gradients lie one under the other: dC needs them as one matrix.
        self._stacked = codebook.new_empty(2 * rows, len(codebook))
        self._scores = codebook.new_empty(rows, len(codebook))

    def match(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Scores z·c − ½‖c‖² of centred latents (R, D), kept; their row maximum and its index."""
        self.rows = len(latents)
        self.scores = self._scores[: self.rows]
        torch.addmm(self.bias, latents, self.codebook.T, out=self.scores)
        return row_max(self.scores)

    def run(self, latents: Tensor) -> None:
        """Scores, nearest indices, unnormalised weights and their sums of latents (R, D)."""
        best, self.indices = self.match(latents)
        self.scores.sub_(best[:, None]).mul_(2 * LOG2_E / self.temperature).clamp_(min=self.floor)
        self.weights = torch.exp2(self.scores, out=self._stacked[: self.rows])
        self.total = self.weights.sum(1, keepdim=True)

    def probabilities(self) -> Tensor:
        """Assignment probabilities (R, K), in place of the weights."""
        return self.weights.div_(self.total)

    def best_score(self, latents: Tensor) -> Tensor:
        """−‖z−c‖²/T of the nearest code, (R,): from the difference, ‖z‖² − 2z·c + ‖c‖² cancels."""
        distance = (latents - self.codebook[self.indices]).square_().sum(1)
        return -distance / self.temperature

    def mean_score(self, probabilities: Tensor) -> Tensor:
        """Σ_k p_k s_k relative to the best score, (R,), natural units."""
        return LN_2 * torch.linalg.vecdot(probabilities, self.scores)

    def score_gradients(self) -> Tensor:
        """A buffer (R, K) that follows the weights in memory, its content undefined."""
        return self._stacked[self.rows : 2 * self.rows]

    def weights_and_gradients(self) -> Tensor:
        """Both of them as one matrix (2R, K)."""
        return self._stacked[: 2 * self.rows]


def row_max(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum of each row of (R, K) and the first index that reaches it."""
    rows, codes = scores.shape
    width = math.gcd(codes, 64)
    if width < 16 or codes == width:
        best = scores.max(1)
        return best.values, best.indices
    # `max` with indices is slow, `amax` is not: find the group first, then look inside it.
    groups = scores.view(rows, codes // width, width)
    group = groups.amax(2).argmax(1)
    best = groups[torch.arange(rows, device=scores.device), group].max(1)
    return best.values, group * width + best.indices


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

    `precision` is for other backends: this one always computes in the accumulation dtype.
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
            latents = z[h, block].to(dtype) - softmax.mean
            softmax.run(latents)
            total = softmax.total[:, 0]
            quantized[h, block] = (
                softmax.weights @ softmax.codebook
            ) / softmax.total + softmax.mean
            indices[h, block] = softmax.indices
            log_partition[h, block] = softmax.best_score(latents) + total.log()
            entropy[h, block] = total.log() - softmax.mean_score(softmax.weights) / total
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
        usage_bias = softmax.bias.new_zeros(codes)
        if grad_usage is not None:
            usage_bias = grad_usage[h].to(dtype) / rows
        # Σ_n p_nk g_n + (2/T) Σ_n e_nk z_n, and (2/T) Σ_n e_nk in the last column.
        sums = softmax.bias.new_zeros(codes, dim + 1)

        for block in blocks(rows, codes):
            latents = z[h, block].to(dtype) - softmax.mean
            g = None if grad_quantized is None else grad_quantized[h, block].to(dtype)
            lam = None if grad_log_partition is None else grad_log_partition[h, block, None]
            eta = None if grad_entropy is None else grad_entropy[h, block, None]
            softmax.run(latents)
            p = softmax.probabilities()
            e = softmax.score_gradients()
            if g is None:
                e.copy_(usage_bias)
            else:
                torch.addmm(usage_bias, g, softmax.codebook.T, out=e)
            if eta is not None:
                e.addcmul_(softmax.scores, eta, value=-LN_2)
            e.sub_(torch.linalg.vecdot(p, e)[:, None]).mul_(p)
            if needs_temperature:
                row = softmax.mean_score(e)
                if lam is not None:
                    row += lam[:, 0] * (softmax.best_score(latents) + softmax.mean_score(p))
                grad_temperature -= row.sum() / temperature
            if lam is not None and not detach_log_partition:
                e.addcmul_(p, lam)

            if needs_z:
                # Σ_k e_nk is λ_n, or 0, up to rounding; the sum itself keeps z near a code exact.
                pull = (e @ softmax.codebook).addcmul_(latents, e.sum(1, keepdim=True), value=-1)
                grad_z[h, block] = pull * two_over_t
            if lam is not None and detach_log_partition:
                e.addcmul_(p, lam)
            if needs_codebook:
                right = pad(latents, (0, 1), value=1) * two_over_t
                if g is None:
                    sums.addmm_(e.T, right)
                else:
                    right = torch.cat([pad(g, (0, 1)), right])
                    sums.addmm_(softmax.weights_and_gradients().T, right)

        if needs_codebook:
            grad_codebook[h] = sums[:, :dim] - sums[:, dim:] * softmax.codebook
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
    sums = z.new_zeros((heads, codes, values.shape[2]), dtype=dtype)
    for h in range(heads):
        softmax = BlockSoftmax(codebook[h], dtype, temperature, rows_per_block(rows, codes))
        for block in blocks(rows, codes):
            softmax.run(z[h, block].to(dtype) - softmax.mean)
            sums[h].addmm_(softmax.weights.T, values[h, block].to(dtype) / softmax.total)
    return sums


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
            indices[h, block] = softmax.match(z[h, block].to(dtype) - softmax.mean)[1]
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
