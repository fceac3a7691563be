"""The operators as PyTorch sees them: registered once, dispatched to a backend by name.

Registration makes each call one opaque node for torch.compile and for autocast. All of them take
latents (H, N, D), a codebook (H, K, D) and a temperature ().
"""

from types import ModuleType

import torch
from torch import Tensor

from softvq.kernels import reference, streaming
from softvq.kernels.dtypes import accumulation_dtype

BACKENDS: dict[str, ModuleType] = {"reference": reference, "streaming": streaming}

_library = torch.library.Library("softvq", "DEF")
_INPUTS = "Tensor z, Tensor codebook, Tensor temperature"


def _register(signature: str, fake) -> None:
    """Define ``softvq::name``: the backend's function of that name, and its output shapes."""
    name = signature.partition("(")[0]
    _library.define(signature)

    def call(*args):
        *inputs, backend = args
        # The backend chooses its own precision; autocast would lower its matrix products.
        with torch.autocast(args[0].device.type, enabled=False):
            return _promised(getattr(BACKENDS[backend], name)(*inputs), like=inputs[0])

    _library.impl(name, call, "CompositeExplicitAutograd")
    torch.library.register_fake(f"softvq::{name}", fake, lib=_library)


def _promised(outputs, like: Tensor):
    """What the fakes promise: contiguous tensors, and an empty one where nothing was needed."""
    if isinstance(outputs, Tensor):
        return outputs.contiguous()
    return tuple(like.new_empty(0) if x is None else x.contiguous() for x in outputs)


def _fake_soft_forward(z, codebook, temperature, backend):
    row = z.new_empty(z.shape[:2], dtype=accumulation_dtype(z, codebook))
    indices = z.new_empty(z.shape[:2], dtype=torch.int64)
    return z.new_empty(z.shape), indices, row, torch.empty_like(row)


def _fake_soft_backward(z, codebook, temperature, *args):
    *_, needs_z, needs_codebook, needs_temperature, _ = args
    dtype = accumulation_dtype(z, codebook)
    return (
        z.new_empty(z.shape) if needs_z else z.new_empty(0),
        codebook.new_empty(codebook.shape) if needs_codebook else z.new_empty(0),
        temperature.new_empty((), dtype=dtype) if needs_temperature else z.new_empty(0),
    )


def _fake_probability_sums(z, codebook, temperature, values, backend):
    shape = (*codebook.shape[:2], values.shape[2])
    return z.new_empty(shape, dtype=accumulation_dtype(z, codebook))


def _fake_nearest(z, codebook, backend):
    return z.new_empty(z.shape[:2], dtype=torch.int64)


_register(
    f"soft_forward({_INPUTS}, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_soft_forward,
)
_register(
    f"soft_backward({_INPUTS}, Tensor? grad_quantized, Tensor? grad_log_partition, "
    "Tensor? grad_entropy, Tensor? grad_usage, bool needs_z, bool needs_codebook, "
    "bool needs_temperature, str backend) -> (Tensor, Tensor, Tensor)",
    _fake_soft_backward,
)
_register(
    f"probability_sums({_INPUTS}, Tensor values, str backend) -> Tensor", _fake_probability_sums
)
_register("nearest(Tensor z, Tensor codebook, str backend) -> Tensor", _fake_nearest)

soft_forward = torch.ops.softvq.soft_forward.default
soft_backward = torch.ops.softvq.soft_backward.default
probability_sums = torch.ops.softvq.probability_sums.default
nearest = torch.ops.softvq.nearest.default
