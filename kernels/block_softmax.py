"""The softmax of a block of rows over all codes, in plain PyTorch: what `streaming` is made of.

What makes it fast on a CPU: blocks that stay in the cache, in-place operations on reused buffers,
exp2 with a floor under its argument (denormal results are 20 times slower), an arg-maximum in two
levels (PyTorch's own is not vectorised), and both halves of dC in one matrix product. On a GPU,
where it takes what the fused kernels do not, blocks are large enough to outlast their launches,
and unless the precision is "highest" matrix units multiply, for the scores tf32 parts of float32.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from softvq.kernels.centre import centre_of
from softvq.kernels.products import float32_products, tf32_parts

BLOCK_ELEMENTS = 2**21  # rows × codes in one buffer: 8 MB of float32
MIN_ROWS, MAX_ROWS = 32, 2048
ON_A_GPU = 8  # times as many elements, and rows at most
LOG2_E = math.log2(math.e)
LN_2 = math.log(2)


class BlockSoftmax:
    """Softmax of blocks of N latents over one centred codebook, in buffers that are reused.

    After `run`, all in base 2 and relative to the row's best code:
    ``scores`` (R, K) ≤ 0, ``weights`` = 2^scores, ``total`` (R, 1) = Σ_k weights.
    """

    def __init__(
        self,
        codebook: Tensor,
        dtype: torch.dtype,
        temperature: Tensor,
        rows: int,
        precision: str,
    ):
        codebook = codebook.to(dtype)
        self.centre = centre_of(codebook)  # (1, D)
        self.codebook = codebook - self.centre
        self.in_parts = takes_tf32(codebook, precision)
        # [c, −½‖c‖²], to be multiplied with [z, 1]: adding a bias would be a pass of its own.
        columns = [self.codebook, -0.5 * self.codebook.square().sum(1, True)]
        if self.in_parts:
            code, bias = columns
            high, low = tf32_parts(code, 2)
            # Against [z_low, z_high, z_high, 1, 1, 1]: of the products the small terms first.
            columns = [high, low, high, *tf32_parts(bias, 3)]
            # A matrix unit wants rows of whole 16 bytes.
            columns.append(bias.new_zeros(len(bias), -3 * (code.shape[1] + 1) % 4))
        self.affine = torch.cat(columns, 1)
        if self.in_parts:
            self.low_and_high = self.affine[:, code.shape[1] : 3 * code.shape[1]]  # (K, 2D)
        self.temperature = temperature
        # Products of a weight and a gradient must not become denormal either.
        self.floor = math.log2(torch.finfo(dtype).tiny) + 26
        self._all_rows, self._most_rows = rows, rows_per_block(rows, codebook)
        # Weights and score gradients lie one under the other: dC needs them as one matrix.
        self._stacked = codebook.new_empty(2 * self._most_rows, len(codebook))
        self._scores = codebook.new_empty(self._most_rows, len(codebook))

    def blocks(self) -> Iterator[slice]:
        """The rows of each block."""
        for start in range(0, self._all_rows, self._most_rows or 1):
            yield slice(start, min(start + self._most_rows, self._all_rows))

    def match(self, latents: Tensor) -> None:
        """Scores z·c − ½‖c‖² of centred latents (R, D)."""
        self.rows = len(latents)
        self.scores = self._scores[: self.rows]
        # Rounded to bfloat16 or tf32, scores of hundreds would be off by what T may be.
        precision = "highest"
        if self.in_parts:
            high, low = tf32_parts(latents, 2)
            latents, precision = torch.cat([low, high, high], 1), "high"
        ones = self.affine.shape[1] - latents.shape[1]
        with float32_products(precision, latents.device):
            torch.mm(pad(latents, (0, ones), value=1), self.affine.T, out=self.scores)

    def operands(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Two matrices whose product is g·c (R, K) of rows g (R, D), exact for 16-bit gradients."""
        if not self.in_parts:
            return gradient, self.codebook.T
        return torch.cat([gradient, gradient], 1), self.low_and_high.T

    def weighted_codes(self) -> Tensor:
        """Σ_k w_k c_k (R, D), c_k exact, of the unnormalised weights."""
        if not self.in_parts:
            return self.weights @ self.codebook
        low, high = (self.weights @ self.low_and_high).chunk(2, 1)
        return low + high

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


def takes_tf32(codebook: Tensor, precision: str) -> bool:
    """Whether a matrix unit is there and may take products of this codebook."""
    if not codebook.is_cuda or codebook.dtype != torch.float32 or precision == "highest":
        return False
    has_tf32 = torch.cuda.get_device_properties(codebook.device).major >= 8
    return has_tf32 and torch.version.hip is None


def rows_per_block(rows: int, codebook: Tensor) -> int:
    """How many rows meet the codebook (K, D) at once."""
    times = ON_A_GPU if codebook.is_cuda else 1
    most = min(times * MAX_ROWS, times * BLOCK_ELEMENTS // len(codebook))
    return min(rows, max(MIN_ROWS, most))
