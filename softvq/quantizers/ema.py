"""The quantizer whose codes are running means."""

from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from softvq import losses
from softvq.checks import check_decay, check_positive, check_weights
from softvq.functional import nearest_indices
from softvq.precise import precise_dtype
from softvq.quantizers.base import Quantizer
from softvq.quantizers.kmeans import replica_code_sums
from softvq.quantizers.restart import restart_codes
from softvq.quantizers.snapshot import snapshot
from softvq.quantizers.straight_through import NearestCodes, nearest_straight_through
from softvq.quantizers.types import QuantizerOptions

GRACE = 2.0  # times the threshold: the count of a restarted code, which then has time to win rows


class EMAVQLoss(NamedTuple):
    """Parts of what EMAVQ computed, 0-d tensors, unweighted."""

    commitment: Tensor  #          mean of (z − sg[e])²
    entropy_regulariser: Tensor  # zero with entropy_weight=0


class EMAVQ(Quantizer):
    """The nearest code, each code the running mean of the latents that chose it.

    van den Oord et al. 2017, appendix A.1: with the n_k latents of a batch that chose code k,
    N_k ← γN_k + (1−γ)n_k and m_k ← γm_k + (1−γ)Σz, then e_k = m_k / Ñ_k with
    Ñ_k = n(N_k + ε)/(n + Kε), n = Σ_k N_k, which keeps a count of zero from dividing. The smoothed
    count is used, never stored. Statistics move in training only, after the batch was quantised;
    a code that rows of infinity or NaN chose learns nothing from that batch. The loss is
    β‖z − sg[e]‖², a mean over elements.

    What is stored is N (`counts`) and m/Ñ (the codes); `sums`, m, is their product. So whoever
    moves a code, by hand or as a dead one, has moved its running mean with it. With use_cosine_sim
    the means are of latents of length 1, and the codebook is the means brought back to length 1.
    Replicas of a data-parallel run have to start alike (DistributedDataParallel sees to it) and
    then stay so, bit by bit.

    Args:
        dim, codebook_size, codebook_dim, heads, **options: see `Quantizer`.
        commitment_weight: β.
        rotation_trick: the gradient reaches the latent turned and scaled as the latent would be to
            become its code: `straight_through` with `rotated`.
        decay: γ.
        eps: ε.
        freeze_codebook: codes and statistics stay, also in training, once k-means has run; an
            attribute to set later, which `train()` of the model around it leaves.
        threshold_ema_dead_code: a code whose count N_k, rows per batch, is lower is restarted at a
            latent of the batch, as `restart_codes` says; 0: never. An even share is rows·heads/K
            (rows/K with a codebook per head): keep it well under that, or live codes restart.
    """

    in_float32 = ("means", "counts")
    codes_name = "means"

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        heads: int = 1,
        *,
        commitment_weight: float = 0.25,
        rotation_trick: bool = False,
        decay: float = 0.99,
        eps: float = 1e-5,
        freeze_codebook: bool = False,
        threshold_ema_dead_code: float = 0.0,
        **options: Unpack[QuantizerOptions],
    ):
        super().__init__(dim, codebook_size, codebook_dim, heads, **options)
        check_weights(
            commitment_weight=commitment_weight, threshold_ema_dead_code=threshold_ema_dead_code
        )
        check_positive(eps=eps)
        check_decay(decay)
        self.commitment_weight = commitment_weight
        self.rotation_trick = rotation_trick
        self.decay = decay
        self.eps = eps
        self.freeze_codebook = freeze_codebook
        self.threshold_ema_dead_code = threshold_ema_dead_code
        self.register_buffer("means", self._first_codes().to(precise_dtype()))
        # Nothing has been counted yet: where 1 is dead already, a code starts as a restarted one.
        start = 1.0 if threshold_ema_dead_code <= 1 else GRACE * threshold_ema_dead_code
        counts = torch.full((self.codebooks, codebook_size), start, dtype=precise_dtype())
        self.register_buffer("counts", counts)

    @property
    def smoothed_counts(self) -> Tensor:
        """Ñ (codebooks, K)."""
        total = self.counts.sum(-1, keepdim=True)
        return total * (self.counts + self.eps) / (total + self.codebook_size * self.eps)

    @property
    def sums(self) -> Tensor:
        """m (codebooks, K, D)."""
        return self.means * self.smoothed_counts[..., None]

    def quantize(self, z: Tensor) -> NearestCodes:
        """The nearest codes of latents (..., D), with heads (..., heads, D)."""
        codebook = self.codebook
        if self.training and torch.compiler.is_compiling():  # may read it after `_learn`
            codebook = snapshot(codebook)
        return nearest_straight_through(z, codebook, self.rotation_trick)

    def _loss(
        self, z: Tensor, out: NearestCodes, entropy_regulariser: Tensor
    ) -> tuple[Tensor, EMAVQLoss]:
        commitment = losses.commitment_loss(z, out.quantized)
        return self.commitment_weight * commitment, EMAVQLoss(commitment, entropy_regulariser)

    @torch.no_grad()
    def _learn(self, z: Tensor, out: NearestCodes) -> None:
        if self.freeze_codebook:
            return
        latents = self._by_codebook(z)
        batch_sums, batch_counts = self._batch_statistics(latents, out.indices)
        sums = self.decay * self.sums + (1 - self.decay) * batch_sums
        self.counts.mul_(self.decay).add_(batch_counts, alpha=1 - self.decay)
        smoothed = self.smoothed_counts[..., None]
        self.means.copy_(torch.where(smoothed > 0, sums / smoothed, self.means))
        if self.threshold_ema_dead_code:
            squared_distance = (losses.in_float32(z) - out.quantized).square().sum(-1)
            self._restart(latents, squared_distance)

    def _batch_statistics(self, latents: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Σz (codebooks, K, D) and n (codebooks, K), of all replicas.

        Zero for a code whose sum is not finite: one such row would stay in its mean for ever.
        """
        indices = self._by_codebook(indices[..., None])[..., 0]
        parts = [
            replica_code_sums(rows, chosen, self.codebook_size, self.sync_codebook)
            for rows, chosen in zip(latents, indices, strict=True)
        ]
        sums, counts = (torch.stack(part) for part in zip(*parts, strict=True))
        finite = sums.isfinite().all(-1)
        return sums.where(finite[..., None], 0), counts.where(finite, 0)

    def _restart(self, latents: Tensor, squared_distance: Tensor) -> None:
        """Restart the codes of few rows, with their running statistics."""
        distances = self._by_codebook(squared_distance[..., None])[..., 0]
        for means, counts, rows, distance in zip(
            self.means, self.counts, latents, distances, strict=True
        ):
            dead = counts < self.threshold_ema_dead_code
            codes, moved = restart_codes(means, dead, rows, distance, self.sync_codebook)
            means.copy_(codes)
            counts.masked_fill_(moved, GRACE * self.threshold_ema_dead_code)

    @torch.no_grad()
    def _initialise(self, z: Tensor) -> bool:
        """k-means, and the counts that belong to it."""
        placed = super()._initialise(z)
        if placed:
            indices = nearest_indices(z, self.codebook)
            _, counts = self._batch_statistics(self._by_codebook(z), indices)
            self.counts.copy_(counts.clamp(min=1))
        return placed
