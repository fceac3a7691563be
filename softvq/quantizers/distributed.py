"""Collectives that do nothing in a single process.

`sync` everywhere: None where torch.distributed is initialised, True always, False never.
"""

import torch
from torch import Tensor, distributed


def is_synced(sync: bool | None) -> bool:
    """Whether there are replicas to agree with. Raises ValueError where True has no process group.

    All replicas have to come here in the same order.
    """
    initialised = distributed.is_available() and distributed.is_initialized()
    if sync and not initialised:
        raise ValueError(
            "sync_codebook=True needs an initialised torch.distributed; None follows it"
        )
    return initialised and sync is not False


def sum_over_replicas(x: Tensor, sync: bool | None) -> Tensor:
    """The sum over all replicas, the same bits on each."""
    if not is_synced(sync):
        return x
    x = x.contiguous()
    distributed.all_reduce(x)
    return x


def gather_from_replicas(x: Tensor, sync: bool | None) -> Tensor:
    """Tensors (n, ...) of one shape, one behind the other in the order of ranks: (R·n, ...)."""
    if not is_synced(sync):
        return x
    parts = [torch.empty_like(x) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def from_first_replica(x: Tensor, sync: bool | None) -> Tensor:
    """What rank 0 has."""
    if not is_synced(sync):
        return x
    x = x.contiguous()
    distributed.broadcast(x, src=0)
    return x
