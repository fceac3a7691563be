"""Restarting codes that nothing uses."""

import torch
from torch import Tensor, nn

from softvq.functional import nearest_codes


class DeadCodeRestart(nn.Module):
    """Follows each code's share of the latents and moves the codes that have none.

    A code is dead when its running share falls under `threshold` of an even one, 1/K. It goes to a
    latent drawn with a probability proportional to its squared distance from the nearest code,
    the seeding of k-means++ (Arthur and Vassilvitskii 2007): where codes are missing most.
    """

    def __init__(self, codebook_size: int, threshold: float, decay: float = 0.95):
        super().__init__()
        self.threshold = threshold
        self.decay = decay
        self.register_buffer("share", torch.full((codebook_size,), 1 / codebook_size))

    @torch.no_grad()
    def update(self, indices: Tensor) -> None:
        """Count the nearest codes (...) int64 of a batch."""
        counts = torch.bincount(indices.flatten(), minlength=len(self.share))
        self.share.lerp_(counts / indices.numel(), 1 - self.decay)

    @torch.no_grad()
    def restart(self, codebook: Tensor, latents: Tensor) -> None:
        """Move the dead codes of the codebook (K, D), in place, to latents (..., D)."""
        even = 1 / len(self.share)
        dead = (self.share < self.threshold * even).nonzero()[:, 0]
        rows = latents.reshape(-1, latents.shape[-1])
        dead = dead[: len(rows)]
        if len(dead) == 0:
            return
        _, squared_distance = nearest_codes(rows, codebook)
        chosen = torch.multinomial(squared_distance + 1e-12, len(dead))
        codebook[dead] = rows[chosen].to(codebook.dtype)
        self.share[dead] = even
