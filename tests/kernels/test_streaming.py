"""The streaming backend against float64 truth, measured beside plain PyTorch in the same dtype."""

import itertools
from collections.abc import Callable

import pytest
import torch
from naive import Errors, Problem, forward, gradients
from torch.utils._python_dispatch import TorchDispatchMode

from softvq.kernels import reference, streaming

ALL = ("quantized", "log_partition", "entropy", "usage")
SHAPES = [
    (1, 1, 1, 1),
    (6, 1, 130, 5),
    (1, 67, 1, 3),
    (3, 67, 67, 48),
    (1, 130, 128, 64),
    (2, 130, 130, 65),
    (1, 67, 192, 130),
]


def make(heads, rows, codes, dim, temperature=1.0, offset=0.0) -> Problem:
    return Problem(
        torch.randn(heads, rows, dim) + offset,
        torch.randn(heads, codes, dim) + offset,
        torch.tensor(temperature),
    )


def incoming_for(problem: Problem) -> dict[str, torch.Tensor]:
    return {name: torch.randn_like(output) for name, output in forward(problem).items()}


def check(draw: Callable[[], Problem], dtype=torch.float32, names=ALL) -> None:
    """Outputs within 2× and gradients within 3× plain float32 PyTorch's own error, over draws."""
    errors = {name: Errors() for name in (*ALL, "grad z", "grad codebook", "grad temperature")}
    errors["entropy"].floor = 1.0
    for _ in range(8):
        given = draw().to(dtype)  # the rounded inputs are the problem
        plain_inputs, true_inputs = given.to(torch.float32), given.to(torch.float64)
        plain, truth = forward(plain_inputs), forward(true_inputs)
        incoming = {name: torch.randn_like(plain[name]).to(dtype) for name in names}

        outputs = run(given)
        for name in ALL:
            errors[name].add(outputs[name], plain[name], truth[name])
        inputs = [x.detach() for x in given]
        grads = streaming.soft_backward(*inputs, *(incoming.get(n) for n in ALL), True, True, True)
        plain, truth = gradients(plain_inputs, incoming), gradients(true_inputs, incoming)
        for name, grad in zip(("z", "codebook", "temperature"), grads, strict=True):
            errors[f"grad {name}"].add(grad, plain[name], truth[name])
    for name, error in errors.items():
        error.assert_no_worse(3 if name.startswith("grad") else 2, name)


def run(problem: Problem) -> dict[str, torch.Tensor]:
    inputs = [x.detach() for x in problem]
    quantized, _, log_partition, entropy, _ = streaming.soft_forward(*inputs)
    ones = torch.ones(*inputs[0].shape[:2], 1, dtype=inputs[0].dtype)
    usage = streaming.probability_sums(*inputs, ones)[..., 0] / inputs[0].shape[1]
    return dict(zip(ALL, (quantized, log_partition, entropy, usage), strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("temperature", [1e-3, 0.1, 1.0, 100.0])
def test_shapes_and_temperatures(shape, temperature):
    check(lambda: make(*shape, temperature=temperature))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 67, 67, 5), (2, 130, 64, 48)], ids=str)
def test_dtypes(dtype, shape):
    check(lambda: make(*shape), dtype)


def test_float64_agrees_with_the_reference():
    problem = [x.double() for x in make(2, 130, 64, 48)]
    incoming = [incoming_for(Problem(*problem))[name] for name in ALL]
    for ours, expected in (
        (streaming.soft_forward(*problem), reference.soft_forward(*problem)),
        (
            streaming.soft_backward(*problem, *incoming, True, True, True),
            reference.soft_backward(*problem, *incoming, True, True, True),
        ),
    ):
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("offset", [10.0, 1e4])
def test_latents_far_from_zero(offset):
    check(lambda: make(1, 130, 67, 48, offset=offset))


def test_an_offset_costs_no_accuracy():
    """Centring makes the error independent of where the data lie."""
    near = make(1, 130, 64, 48)
    rounded = Problem(near.z.bfloat16().float(), near.codebook.bfloat16().float(), near.temperature)
    far = Problem(rounded.z + 256.0, rounded.codebook + 256.0, rounded.temperature)
    _, _, log_partition, entropy, _ = streaming.soft_forward(*far)
    truth = forward(far.to(torch.float64))
    assert (log_partition - truth["log_partition"]).abs().max() < 1e-4
    assert (entropy - truth["entropy"]).abs().max() < 1e-5


def test_near_ties():
    def draw() -> Problem:
        problem = make(1, 64, 32, 16, temperature=0.01)
        codebook = problem.codebook
        codebook[:, 16:] = codebook[:, :16] * (1 + 1e-6)
        return Problem(codebook[:, :16].repeat(1, 4, 1) + 1e-3, codebook, problem.temperature)

    check(draw)


COMBINATIONS = [c for n in range(1, 5) for c in itertools.combinations(ALL, n)]


@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_every_combination_of_incoming_gradients(names):
    check(lambda: make(2, 67, 48, 5, temperature=0.3), names=names)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)))
def test_only_needed_gradients_are_computed(needs):
    problem = [x.detach() for x in make(1, 20, 10, 4)]
    incoming = [incoming_for(Problem(*problem))[name] for name in ALL]
    every = streaming.soft_backward(*problem, *incoming, True, True, True)
    some = streaming.soft_backward(*problem, *incoming, *needs)
    for grad, expected, needed in zip(some, every, needs, strict=True):
        assert torch.equal(grad, expected) if needed else grad is None


def test_views_and_expanded_gradients():
    base = make(1, 60, 40, 12)
    z, codebook = base.z.mT.contiguous().mT, base.codebook.repeat(1, 2, 1)[:, ::2]
    grad = torch.ones(()).expand(1, 60, 12)
    views = (z, codebook, base.temperature)
    plain = tuple(x.contiguous() for x in views)
    for a, b in zip(streaming.soft_forward(*views), streaming.soft_forward(*plain), strict=True):
        torch.testing.assert_close(a, b)
    rest = (None, None, None, True, True, True)
    viewed = streaming.soft_backward(*views, grad, *rest)
    for a, b in zip(viewed, streaming.soft_backward(*plain, grad.clone(), *rest), strict=True):
        torch.testing.assert_close(a, b)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK_ELEMENTS", 2**12)


def test_blocks_join_to_the_same_result(small_blocks):
    assert streaming.rows_per_block(500, 100) == 40
    check(lambda: make(2, 500, 100, 20))


@pytest.mark.parametrize("codes", [1, 48, 64, 100, 128, 1000, 4096])
def test_row_max_is_the_first_maximum(codes):
    scores = torch.randint(0, 20, (50, codes)).float()
    best, indices = streaming.row_max(scores)
    assert torch.equal(best, scores.amax(1))
    first = torch.tensor([row.tolist().index(row.max()) for row in scores])
    assert torch.equal(indices, first)


def test_nearest_breaks_ties_by_the_lowest_index():
    codebook = torch.randn(1, 10, 4).repeat(1, 20, 1)
    indices = streaming.nearest(codebook[:, 100:110], codebook)
    assert indices.tolist() == [list(range(10))]


def test_nearest_agrees_with_the_soft_forward_and_with_distances():
    problem = make(2, 300, 128, 8)
    indices = streaming.nearest(problem.z, problem.codebook)
    assert torch.equal(indices, streaming.soft_forward(*problem)[1])
    assert torch.equal(
        indices, torch.cdist(problem.z.double(), problem.codebook.double()).argmin(-1)
    )


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements any operation inside put into one tensor."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        for output in outputs if isinstance(outputs, tuple) else (outputs,):
            if isinstance(output, torch.Tensor):
                self.elements = max(self.elements, output.untyped_storage().nbytes() // 4)
        return outputs


def test_no_tensor_of_the_size_of_rows_times_codes(small_blocks):
    problem = make(1, 2000, 128, 4)
    incoming = [incoming_for(problem)[name] for name in ALL]
    with LargestTensor() as largest:
        streaming.soft_forward(*problem)
        streaming.soft_backward(*problem, *incoming, True, True, True)
        streaming.probability_sums(*problem, torch.ones(1, 2000, 1))
        streaming.nearest(problem.z, problem.codebook)
    assert 0 < largest.elements < 2000 * 128 / 10


def test_the_same_inputs_give_the_same_bits():
    problem = make(1, 500, 130, 48)
    first, second = streaming.soft_forward(*problem), streaming.soft_forward(*problem)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
