"""The operators as PyTorch sees them: registered once, dispatched to a backend by name.

Registration makes each call one opaque node for torch.compile and for autocast. All of them take
latents (H, N, D) and a codebook (H, K, D), the soft ones a temperature (); where a backend has
nothing to return, an empty tensor comes back. `precision` is "highest", "high" or "medium", or None
for torch's own setting when the operator runs: a graph that was compiled under another one follows
it too, and a backward that of its own time, like the backward of a matrix product.
"""

from contextlib import nullcontext
from importlib import import_module

import torch
from torch import Tensor

from softvq.kernels import streaming
from softvq.kernels.dtypes import accumulation_dtype
from softvq.kernels.products import float32_products, torch_precision

# Modules by name: the fused one is imported at its first call, for it needs triton.
BACKENDS = {
    "reference": "softvq.kernels.reference",
    "streaming": "softvq.kernels.streaming",
    "triton": "softvq.kernels.fused",
}

_library = torch.library.Library("softvq", "DEF")
_INPUTS = "Tensor z, Tensor codebook, Tensor temperature"


def _register(signature: str, fake) -> None:
    """Define ``softvq::name``: the backend's function of that name, and its output shapes."""
    name = signature.partition("(")[0]
    _library.define(signature)

    def call(*args):
        *inputs, precision, backend = args
        function = getattr(import_module(BACKENDS[backend]), name)
        z = inputs[0]
        if backend == "reference":
            precision = "highest"  # the specification is exact
        elif backend == "streaming" and z.dtype.itemsize == 2:
            precision = precision or "high"  # tf32 has their digits
        precision = precision or torch_precision(z.device)
        products = nullcontext()  # the fused kernels have their own
        if backend != "triton":
            products = float32_products(precision, z.device)
        # Autocast would lower the products of plain PyTorch. And what differentiates them is not
        # here: an exported graph has only the forward.
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False), products:
            outputs = function(*inputs, precision)
        return _promised(outputs, like=z)

    _library.impl(name, call, "CompositeExplicitAutograd")
    torch.library.register_fake(f"softvq::{name}", fake, lib=_library)


def _promised(outputs, like: Tensor):
    """What the fakes promise: contiguous tensors, and an empty one where nothing was needed."""
    if isinstance(outputs, Tensor):
        return outputs.contiguous()
    return tuple(like.new_empty(0) if x is None else x.contiguous() for x in outputs)


def _fake_soft_forward(z, codebook, temperature, precision, backend):
    row = z.new_empty(z.shape[:2], dtype=accumulation_dtype(z, codebook))
    indices = z.new_empty(z.shape[:2], dtype=torch.int64)
    row_state = row.new_empty((2, *z.shape[:2])) if backend == "triton" else z.new_empty(0)
    return z.new_empty(z.shape), indices, row, torch.empty_like(row), row_state


def _fake_soft_backward(z, codebook, temperature, *args):
    needs_z, needs_codebook, needs_temperature = args[4:7]
    dtype = accumulation_dtype(z, codebook)
    return (
        z.new_empty(z.shape) if needs_z else z.new_empty(0),
        codebook.new_empty(codebook.shape) if needs_codebook else z.new_empty(0),
        temperature.new_empty((), dtype=dtype) if needs_temperature else z.new_empty(0),
    )


def _fake_probability_sums(z, codebook, temperature, values, *args):
    shape = (*codebook.shape[:2], 1 if values is None else values.shape[2])
    return z.new_empty(shape, dtype=accumulation_dtype(z, codebook))


def _fake_nearest(z, codebook, precision, backend):
    return z.new_empty(z.shape[:2], dtype=torch.int64)


_register(
    f"soft_forward({_INPUTS}, str? precision, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_soft_forward,
)
_register(
    f"soft_backward({_INPUTS}, Tensor? grad_quantized, Tensor? grad_log_partition, "
    "Tensor? grad_entropy, Tensor? grad_usage, bool needs_z, bool needs_codebook, "
    "bool needs_temperature, Tensor? quantized, Tensor? indices, Tensor? row_state, "
    "bool detach_log_partition, str? precision, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _fake_soft_backward,
)
_register(
    f"probability_sums({_INPUTS}, Tensor? values, Tensor? row_state, str? precision, str backend) "
    "-> Tensor",
    _fake_probability_sums,
)
_register(
    "nearest(Tensor z, Tensor codebook, str? precision, str backend) -> Tensor", _fake_nearest
)

soft_forward = torch.ops.softvq.soft_forward.default
soft_backward = torch.ops.softvq.soft_backward.default
probability_sums = torch.ops.softvq.probability_sums.default
nearest = torch.ops.softvq.nearest.default


def code_sums(
    z: Tensor, indices: Tensor, codebook_size: int, backend: str
) -> tuple[Tensor, Tensor]:
    """Sum (K, D) and count (K) of the rows of z (N, D) by index (N); differentiable in z.

    Not registered here: the fused one is an operator of its own, the other plain PyTorch.
    """
    if backend != "triton":
        return streaming.code_sums(z, indices, codebook_size)
    from softvq.kernels.code_sums import code_sums as fused  # needs triton

    return fused(z, indices, codebook_size)
