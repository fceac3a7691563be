"""A run of several processes, started by torchrun; in a single one, everything here is free.

Every rank holds the whole model and takes its part of each batch. What a run leaves is written by
the first rank.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from hashlib import blake2b
from itertools import zip_longest
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from softvq.distributed.batch_norm import synchronise_batch_norms
from softvq.distributed.collectives import from_first_replica, is_synced, mean_over_replicas
from softvq.models import TrainingStep
from softvq.training.config import torch_device
from softvq.training.settings import ConfigError

PATIENCE = timedelta(minutes=10)  # with a rank that does not come, before all end

Item = TypeVar("Item")


@contextmanager
def joined(device_name: str) -> Iterator[torch.device]:
    """The processes that torchrun started, one process group inside; this rank's device.

    An error in one rank is noted for torchrun, which ends the others. Raises ConfigError.
    """
    device = torch_device(device_name)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler  # 20 ms

    errors = get_error_handler()
    errors.initialize()
    try:
        if device.type == "cuda":
            device = _own_gpu()
        distributed.init_process_group(
            "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl", timeout=PATIENCE
        )
        yield device
    except Exception as error:
        errors.record_exception(error)
        raise
    distributed.destroy_process_group()


def _own_gpu() -> torch.device:
    number, available = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number >= available:
        raise ConfigError(
            f"device: process {number} has no GPU, there are {available}; start as many processes "
            "with --nproc-per-node, or give --device cpu"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def is_first() -> bool:
    """Whether this process writes what the run leaves; known before and after the others meet."""
    return os.environ.get("RANK", "0") == "0"


def was_restarted() -> bool:
    """Whether torchrun started this process in place of one that failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def count() -> int:
    """How many ranks there are."""
    return distributed.get_world_size() if is_synced(None) else 1


def rank() -> int:
    """Which one this is, from 0."""
    return distributed.get_rank() if is_synced(None) else 0


@contextmanager
def first_rank_first() -> Iterator[None]:
    """The first rank comes in alone, and when it has left, all others do."""
    if rank() > 0:
        distributed.barrier()
    yield
    if rank() == 0 and count() > 1:
        distributed.barrier()


def any_rank(flag: bool) -> bool:
    """Whether it is true on any rank; the same answer on all, without waiting for a GPU."""
    if not is_synced(None):
        return flag
    flags = torch.tensor(int(flag))
    distributed.all_reduce(flags, distributed.ReduceOp.MAX)
    return bool(flags)


def check_batch_size(size: int) -> None:
    """Raise ConfigError for a batch that the ranks cannot share evenly."""
    if size % count():
        raise ConfigError(f"batch_size: {size} images are not divisible by {count()} processes")


def part_of(batch: Tensor) -> Tensor:
    """This rank's part of a batch (B, ...), (B / ranks, ...)."""
    return batch.chunk(count())[rank()]


def share_of(items: Sequence[Item]) -> Sequence[Item]:
    """The items that are this rank's to look at: one of each turn."""
    return items[rank() :: count()]


def from_all(results: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Of the results for `share_of` some items, those for all of them, in the items' order."""
    if not is_synced(None):
        return results
    own = [{name: value.cpu() for name, value in result.items()} for result in results]
    parts: list[Any] = [None] * count()
    distributed.all_gather_object(parts, own)
    return [result for turn in zip_longest(*parts) for result in turn if result is not None]


def seed_step(seed: int, step: int, device: torch.device) -> None:
    """Give every rank but the first random numbers of its own for a step.

    They follow from seed, rank and step alone, so no checkpoint holds them. The first rank goes on
    with the numbers that a single process would draw.
    """
    if rank() == 0:
        return
    text = f"{seed} {rank()} {step}"
    number = int.from_bytes(blake2b(text.encode(), digest_size=8).digest())
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)


def start_alike(model: nn.Module) -> None:
    """Let every rank's model begin as the first one's, and its batch norms see whole batches."""
    if is_synced(None):
        synchronise_batch_norms(model)
        for tensor in model.state_dict().values():
            tensor.copy_(from_first_replica(tensor))


@torch.no_grad()
def average_gradients(model: nn.Module) -> None:
    """Let every rank have the mean of all ranks' gradients.

    In one piece of fixed order. DistributedDataParallel orders its pieces by the first step it
    sees; from three ranks on a resumed run then adds in another order and ends with other bits.
    """
    if not is_synced(None):
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    means = mean_over_replicas(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, mean in zip(gradients, means.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def averaged(seen: TrainingStep) -> TrainingStep:
    """A step's losses as means over the whole batch, the same on every rank."""
    if not is_synced(None):
        return seen
    means = mean_over_replicas(torch.stack(list(seen.losses.values()))).unbind()
    return seen._replace(losses=dict(zip(seen.losses, means, strict=True)))
