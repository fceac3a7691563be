"""What the Triton kernels can take, and on which cards; asked before any of them is imported."""

import importlib.metadata
import importlib.util
import math
import os

import torch
from torch import Tensor

from softvq.kernels import tiles

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_LEAST_CAPABILITY = 8  # from there on matrix units take bfloat16
_MOST_HEADS, _MOST_ROWS = 2**16 - 1, 2**30  # of a grid's second axis; counted in 32 bits
_BLACKWELL_TRITON = (3, 8)  # older ones compile some of the products for its matrix unit to a trap


def _triton_version() -> tuple[int, ...]:
    """As the package has it, for this module imports no Triton; of another name, a new one."""
    try:
        return tuple(map(int, importlib.metadata.version("triton").split(".")[:2]))
    except importlib.metadata.PackageNotFoundError:
        return _BLACKWELL_TRITON


_TRITON_VERSION = _triton_version()


def obstacle(z: Tensor) -> str | None:
    """What this machine lacks for kernels on z, as the end of a sentence."""
    if not _HAS_TRITON:
        return "needs the package triton"
    if z.is_cuda:
        if torch.version.hip is not None:
            return "needs an NVIDIA GPU"
        device = torch.cuda.get_device_properties(z.device)
        if device.major < _LEAST_CAPABILITY:
            return (
                f"needs a GPU of compute capability {_LEAST_CAPABILITY}.0, "
                f"{device.name} has {device.major}.{device.minor}"
            )
    elif os.environ.get("TRITON_INTERPRET") != "1":
        return (
            f"needs CUDA tensors, got {z.device}; "
            "with TRITON_INTERPRET=1 in the environment it interprets them, slowly"
        )
    return None


def soft_obstacle(z: Tensor, codebook: Tensor) -> str | None:
    """`obstacle` for the kernels that multiply."""
    if torch.float64 in (z.dtype, codebook.dtype):
        return "has no float64; use 'streaming' or 'reference'"
    if (lacking := obstacle(z)) is not None:
        return lacking
    if _TRITON_VERSION < _BLACKWELL_TRITON and tiles.architecture(z.device) == "blackwell":
        needed, found = (".".join(map(str, x)) for x in (_BLACKWELL_TRITON, _TRITON_VERSION))
        return f"needs triton {needed} on this GPU, {found} is installed"
    return None


def too_large(z: Tensor, codebook: Tensor) -> bool:
    """Whether z (…, D) is too wide for the kernels' tiles, or more than their programs can number.

    codebook (K, D) or (H, K, D).
    """
    heads = math.prod(codebook.shape[:-2])
    rows = math.prod(z.shape[:-1]) // heads
    return z.shape[-1] > tiles.WIDEST or heads > _MOST_HEADS or rows > _MOST_ROWS
