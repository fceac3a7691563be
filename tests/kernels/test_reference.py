"""The reference is the specification: its explicit derivatives must be those of the formulas."""

import pytest
import torch

from bench.truth import Problem, forward, gradients
from softvq.kernels import reference, streaming

ALL = ("quantized", "log_partition", "entropy", "usage")


def problem(heads=2, rows=5, codes=7, dim=3, temperature=0.8) -> Problem:
    return Problem(
        torch.randn(heads, rows, dim),
        torch.randn(heads, codes, dim),
        torch.tensor(temperature),
    ).to(torch.float64)


def test_forward_is_the_naive_expression():
    inputs = problem()
    expected = forward(inputs)
    quantized, indices, log_partition, entropy, _ = reference.soft_forward(*inputs)
    torch.testing.assert_close(quantized, expected["quantized"])
    torch.testing.assert_close(log_partition, expected["log_partition"])
    torch.testing.assert_close(entropy, expected["entropy"])
    assert torch.equal(indices, torch.cdist(inputs.z, inputs.codebook).argmin(-1))


@pytest.mark.parametrize("names", [(name,) for name in ALL] + [ALL])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
def test_explicit_backward_is_autograd_of_the_naive_expression(names, temperature):
    inputs = problem(temperature=temperature)
    incoming = {name: torch.randn_like(forward(inputs)[name]) for name in names}
    expected = gradients(inputs, incoming)
    grads = reference.soft_backward(
        *(x.detach() for x in inputs), *(incoming.get(name) for name in ALL), True, True, True
    )
    for name, grad in zip(("z", "codebook", "temperature"), grads, strict=True):
        torch.testing.assert_close(grad, expected[name], msg=lambda m, name=name: f"{name}: {m}")


def test_only_needed_gradients_are_computed():
    inputs = [x.detach() for x in problem()]
    ones = torch.ones(2, 5, 3, dtype=torch.float64)
    grads = reference.soft_backward(*inputs, ones, None, None, None, False, True, False)
    assert grads[0] is None and grads[1] is not None and grads[2] is None


def test_probability_sums():
    inputs = problem()
    values = torch.randn(2, 5, 4, dtype=torch.float64)
    p = (-torch.cdist(inputs.z, inputs.codebook).square() / inputs.temperature).softmax(-1)
    torch.testing.assert_close(reference.probability_sums(*inputs, values), p.mT @ values)


def test_probabilities_of_large_scores():
    """Of 10⁴ and more, for small T; in float32 the log-partition has no digits left for them."""
    codebook = torch.randn(1, 25, 32)
    codebook = torch.cat([codebook, codebook + 5e-5 * torch.randn(1, 25, 32)], 1)
    inputs = Problem(torch.randn(1, 64, 32), codebook, torch.tensor(1e-3))
    quantized = reference.soft_forward(*inputs)[0]
    wanted = streaming.soft_forward(*(x.double() for x in inputs))
    torch.testing.assert_close(quantized.double(), wanted[0], rtol=0, atol=1e-5)
