"""Collectives that do nothing in a single process.

`sync` everywhere: None where torch.distributed is initialised, True always, False never.

Sums and means over replicas are differentiable. Their gradient is summed over replicas too: the
right one where each replica has a loss of its own and the mean of these losses is trained, as in
data-parallel training.
"""

from typing import Any

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


def sum_over_replicas(x: Tensor, sync: bool | None = None) -> Tensor:
    """The sum over all replicas, the same bits on each."""
    return _Sum.apply(x) if is_synced(sync) else x


def mean_over_replicas(x: Tensor) -> Tensor:
    """The mean over all replicas, the same bits on each."""
    return _Sum.apply(x) / distributed.get_world_size() if is_synced(None) else x


def gather_from_replicas(x: Tensor, sync: bool | None = None) -> Tensor:
    """Tensors (n, ...) of one shape, one behind the other in the order of ranks: (R·n, ...)."""
    if not is_synced(sync):
        return x
    parts = [torch.empty_like(x) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def from_first_replica(x: Tensor, sync: bool | None = None) -> Tensor:
    """What rank 0 has."""
    if not is_synced(sync):
        return x
    x = x.contiguous()
    distributed.broadcast(x, src=0)
    return x


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Sum.apply(grad)
