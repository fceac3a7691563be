"""Drawing latents at random: what k-means starts from and what dead codes move to."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from softvq.distributed.collectives import gather_from_replicas

SMALLEST = 1e-30  # weight of a latent that has none: drawn when nothing else is left


def race_keys(weights: Tensor) -> Tensor:
    """Random keys above 0 of weights (n,); the k largest are a draw without replacement.

    The first to arrive of independent Poisson processes is number i with probability w_i/Σw:
    Efraimidis and Spirakis 2006, "Weighted random sampling with a reservoir", with key w/Exp(1).
    """
    return (weights + SMALLEST) / torch.empty_like(weights).exponential_()


def draw_latents(
    latents: Tensor, weights: Tensor, count: int, sync: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Draw `count` of the latents without replacement, with probabilities ∝ weights ≥ 0.

    Over all replicas together, where there are any, and the same on each of them: keys can be
    merged, so every replica sends its own best. Fixed shapes and no host synchronisation.

    Args:
        latents: (n, D); n may differ between replicas and be 0.
        weights: (n,) floating point; a latent whose weight is not finite is not drawn.
    Returns:
        drawn (count, D), the first ones if there were fewer latents, and exists (count,) bool:
        False where there was none left.
    """
    keys = race_keys(weights).where(weights.isfinite(), 0)
    keys, chosen = keys.topk(min(count, len(latents)))
    missing = count - len(chosen)
    keys = gather_from_replicas(pad(keys, (0, missing)), sync)
    drawn = gather_from_replicas(pad(latents[chosen], (0, 0, 0, missing)), sync)
    keys, chosen = keys.topk(count)
    return drawn[chosen], keys > 0
