"""k-means as a start for a codebook."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from softvq.distributed.collectives import from_first_replica, sum_over_replicas
from softvq.functional import code_sums, nearest_indices
from softvq.losses import in_float32
from softvq.quantizers.draw import draw_latents, race_keys

CANDIDATES_PER_CODE = 8  # latents the seeding looks at; K passes over all of them would be slow
SPREAD = 0.1  # of codes around a latent that has one already, in standard deviations


@torch.no_grad()
def kmeans(
    latents: Tensor,
    codebook_size: int,
    iterations: int,
    *,
    spherical: bool = False,
    sync: bool | None = None,
) -> Tensor | None:
    """Codes (K, D) among latents (n, D), in float32 at least; None without any latent, and for
    several codes without two that differ.

    Seeded by k-means++, then Lloyd's steps; a code that nothing chose stays. Over all replicas
    together, the same bits on each.

    Args:
        spherical: bring the codes back to length 1 after every step (spherical k-means).
        sync: see `softvq.distributed.collectives`.
    """
    latents = in_float32(latents)
    even = latents.new_ones(len(latents))
    candidates, exists = draw_latents(latents, even, CANDIDATES_PER_CODE * codebook_size, sync)
    candidates = candidates[exists]
    if len(candidates) == 0 or (codebook_size > 1 and (candidates == candidates[0]).all()):
        return None
    codes = from_first_replica(seed_codes(candidates, codebook_size), sync)
    codes = normalize(codes, dim=-1) if spherical else codes
    for _ in range(iterations):
        indices = nearest_indices(latents, codes)
        sums, counts = replica_code_sums(latents, indices, codebook_size, sync)
        means = sums / counts.clamp(min=1)[:, None]
        means = normalize(means, dim=-1) if spherical else means
        codes = torch.where(counts[:, None] > 0, means, codes)
    return codes


def seed_codes(latents: Tensor, codebook_size: int) -> Tensor:
    """Latents (K, D) drawn from (n, D), each ∝ its squared distance from those drawn before.

    k-means++, Arthur and Vassilvitskii 2007. With fewer latents than codes some are drawn again and
    moved a little: equal codes have equal gradients, and would stay equal.
    """
    codes = latents.new_empty(codebook_size, latents.shape[1])
    weights = latents.new_ones(len(latents))
    nearest = torch.full_like(weights, torch.inf)
    again = []
    for code in codes:
        chosen = race_keys(weights).argmax()
        code.copy_(latents[chosen])
        again.append(weights[chosen] == 0)
        nearest = torch.minimum(nearest, (latents - code).square().sum(1))
        weights = nearest
    again = torch.stack(again)[:, None]
    if again.any():
        deviation = latents.var(0, correction=0).mean().sqrt()
        codes += again * (SPREAD * deviation * torch.randn_like(codes))
    return codes


def replica_code_sums(
    latents: Tensor, indices: Tensor, codebook_size: int, sync: bool | None
) -> tuple[Tensor, Tensor]:
    """`code_sums` (K, D), (K,) of latents (n, D) and indices (n,), summed over all replicas."""
    sums, counts = code_sums(latents, indices, codebook_size)
    both = sum_over_replicas(torch.cat([sums, counts[:, None]], 1), sync)
    return both[:, :-1], both[:, -1]
