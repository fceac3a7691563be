"""How much memory a run has taken, and how much it will."""

import resource
import sys

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from softvq.training.task import Examples, Task


def peak_memory(device: torch.device) -> int:
    """The most bytes that tensors on the GPU, or the process on a CPU, have taken so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def bytes_of(tensors: list[Tensor]) -> int:
    """Of all tensors together."""
    return sum(tensor.nbytes for tensor in tensors)


def activation_bytes(task: Task, batch: Examples, dtype: torch.dtype) -> int:
    """What one forward pass of a batch, on the CPU, keeps for the backward pass.

    dtype: in which the networks multiply. Storages count once; weights and buffers do not.
    """
    state = (*task.model.parameters(), *task.model.buffers())
    own = {tensor.untyped_storage().data_ptr() for tensor in state}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
    ):
        seen = task.step(batch)  # its graph keeps the storages alive until all are counted
    del seen
    return sum(kept.values())
