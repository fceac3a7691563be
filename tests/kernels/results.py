"""All that the operators give, for the tests of how they behave among the rest of PyTorch."""

from importlib.util import find_spec

import pytest
import torch

import softvq

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
TRITON = pytest.param("triton", marks=needs_triton)


def inputs(rows=70, codes=40, dim=20):
    z = torch.randn(rows, dim, device=DEVICE, requires_grad=True)
    codebook = torch.randn(codes, dim, device=DEVICE, requires_grad=True)
    return z, codebook, torch.tensor(0.7, device=DEVICE, requires_grad=True)


def every_result(z, codebook, temperature, **options) -> tuple[torch.Tensor, ...]:
    """All that the operators give, differentiable first."""
    out = softvq.soft_quantize(z, codebook, temperature, **options)
    both = softvq.usage_and_entropy(z, codebook, temperature, **options)
    indices, distance = softvq.nearest_codes(z, codebook, **options)
    sums, counts = softvq.code_sums(z, out.indices, len(codebook), backend=options["backend"])
    p = softvq.assignment_probabilities(z, codebook, temperature)
    differentiable = (out.quantized, out.log_partition, out.entropy, *both, distance, sums, p)
    return *differentiable, out.indices, indices, counts


def with_gradients(function, *tensors, **options) -> list[torch.Tensor]:
    """Results of `every_result`, and gradients of the inputs."""
    results = function(*tensors, **options)
    loss = sum(x.square().mean() for x in results[:8])
    return [*results, *torch.autograd.grad(loss, tensors)]


def assert_same(results, expected) -> None:
    """Equal up to what BLAS makes of another alignment of the same numbers."""
    for a, b in zip(results, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6 * b.abs().max().item())


class Graphs:
    """Compiles with fullgraph=True and counts how often."""

    def __init__(self, function, **options):
        self.count = 0
        torch._dynamo.reset()
        self.run = torch.compile(function, backend=self._backend, fullgraph=True, **options)

    def _backend(self, graph, example_inputs):
        self.count += 1
        return graph.forward
