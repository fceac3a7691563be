"""Restarting codes that nothing uses."""

import torch
from torch import Tensor

from softvq.checks import check_counts, check_decay, check_dtype, check_range, check_weights
from softvq.distributed.collectives import sum_over_replicas
from softvq.functional import nearest_codes
from softvq.precise import KeepsFloat32, precise_dtype
from softvq.quantizers.draw import draw_latents


@torch.no_grad()
def restart_codes(
    codes: Tensor,
    dead: Tensor,
    latents: Tensor,
    squared_distance: Tensor,
    sync: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Move dead codes to latents drawn ∝ their squared distance from the nearest code.

    The seeding of k-means++ (Arthur and Vassilvitskii 2007): where codes are missing most. Each
    latent serves once; dead codes beyond the number of latents stay. Fixed shapes, no host
    synchronisation, the same on every replica.

    Args:
        codes: (K, D). dead: (K,) bool, the same on every replica.
        latents: (n, D). squared_distance: (n,); where it is not finite, no code moves.
    Returns:
        the new codes (K, D), and which of them moved (K,) bool.
    """
    drawn, exists = draw_latents(latents, squared_distance, len(codes), sync)
    turn = dead.cumsum(0) - 1  # the first dead code has the first latent
    moved = dead & exists[turn]
    return torch.where(moved[:, None], drawn[turn].to(codes.dtype), codes), moved


class DeadCodeRestart(KeepsFloat32):
    """Follows each code's share of the latents and moves the codes that have none.

    A code is dead when its running share falls under `threshold` of an even one, 1/K; it moves as
    `restart_codes` says. For one codebook, and for the latents that meet its codes: those of
    `Quantizer.latents`.

    Raises TypeError or ValueError: a size below 1, a threshold below 0, a decay outside [0, 1).
    """

    in_float32 = ("share",)

    def __init__(
        self,
        codebook_size: int,
        threshold: float,
        decay: float = 0.95,
        sync_codebook: bool | None = None,
    ):
        super().__init__()
        check_counts(1, codebook_size=codebook_size)
        check_weights(threshold=threshold)
        check_decay(decay)
        self.threshold = threshold
        self.decay = decay
        self.sync_codebook = sync_codebook
        share = torch.full((codebook_size,), 1 / codebook_size, dtype=precise_dtype())
        self.register_buffer("share", share)

    @torch.no_grad()
    def update(self, indices: Tensor) -> None:
        """Count the nearest codes (...) int64 of a batch; −1, a masked position, does not count.

        Raises:
            TypeError: indices that are not int64.
            ValueError: on a CPU, an index outside [-1, K).
        """
        check_dtype(torch.int64, indices=indices)
        check_range(-1, len(self.share), indices=indices)
        rows = indices.flatten() + 1
        # bincount would wait for the device to say which index is the largest.
        counts = rows.new_zeros(len(self.share) + 1).scatter_add_(0, rows, torch.ones_like(rows))
        counts = sum_over_replicas(counts[1:], self.sync_codebook)
        self.share.lerp_(counts.to(self.share) / counts.sum().clamp(min=1), 1 - self.decay)

    @torch.no_grad()
    def restart(self, codebook: Tensor, latents: Tensor, indices: Tensor | None = None) -> None:
        """Move the dead codes of the codebook (K, D), in place, to latents (..., D).

        Not between a forward and its backward pass, which reads the codes again.

        indices: (...), those of `update`; no code moves to a latent of index −1.

        Raises:
            ValueError: another shape, or a codebook that autograd knows to be a copy, as with
                use_cosine_sim; under `torch.no_grad` nothing tells, and no code moves.
        """
        if codebook.shape != (len(self.share), latents.shape[-1]):
            raise ValueError(
                f"codebook must be (K, D) and latents (..., D) with K = {len(self.share)}, "
                f"got {tuple(codebook.shape)} and {tuple(latents.shape)}"
            )
        if indices is not None and indices.shape != latents.shape[:-1]:
            raise ValueError(
                f"indices must be (...) for latents (..., D) = {tuple(latents.shape)}, "
                f"got {tuple(indices.shape)}"
            )
        if codebook.grad_fn is not None and not codebook._is_view():
            raise ValueError("codebook is a copy, as with use_cosine_sim: no code would move")
        even = 1 / len(self.share)
        dead = self.share < self.threshold * even
        if not dead.is_cuda and not dead.any():  # a GPU is not waited for
            return
        rows = latents.reshape(-1, latents.shape[-1])
        _, squared_distance = nearest_codes(rows, codebook)
        if indices is not None:
            squared_distance = squared_distance.masked_fill(indices.flatten() < 0, torch.inf)
        codes, moved = restart_codes(codebook, dead, rows, squared_distance, self.sync_codebook)
        codebook.copy_(codes)
        self.share.masked_fill_(moved, even)
