"""The streaming backend against float64 truth, measured beside plain PyTorch in the same dtype."""

import itertools
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.bounds import (
    ALL,
    REDUCED_PRECISION,
    check,
    far_code,
    incoming_for,
    make,
    near_ties,
    nearest_excess,
    reduced_errors,
    undecided,
)
from bench.truth import Errors, Problem, forward, matmul_in
from softvq.kernels import block_softmax, reference, streaming
from softvq.kernels.products import tf32_parts

SHAPES = [
    (1, 1, 1, 1),
    (24, 1, 130, 5),
    (1, 67, 1, 3),
    (3, 67, 67, 48),
    (1, 130, 128, 64),
    (2, 130, 130, 65),
    (1, 67, 192, 130),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("draw", "temperature"), [(undecided, 1e-3), (undecided, 0.1), (make, 1.0), (make, 100.0)]
)
def test_shapes_and_temperatures(shape, draw, temperature):
    check(streaming, lambda: draw(*shape, temperature))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 67, 67, 5), (2, 130, 64, 48)], ids=str)
def test_dtypes(dtype, shape):
    check(streaming, lambda: make(*shape), dtype)


def test_float64_agrees_with_the_reference():
    problem = [x.double() for x in make(2, 130, 64, 48)]
    incoming = [incoming_for(Problem(*problem))[name] for name in ALL]
    for ours, expected in (
        (streaming.soft_forward(*problem)[:4], reference.soft_forward(*problem)[:4]),
        (
            streaming.soft_backward(*problem, *incoming, True, True, True),
            reference.soft_backward(*problem, *incoming, True, True, True),
        ),
    ):
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("offset", [10.0, 1e4])
def test_latents_far_from_zero(offset):
    check(streaming, lambda: make(1, 130, 67, 48, offset=offset))


def test_an_offset_costs_no_accuracy():
    """Centring makes the error independent of where the data lie."""
    near = make(1, 130, 64, 48)
    rounded = Problem(near.z.bfloat16().float(), near.codebook.bfloat16().float(), near.temperature)
    far = Problem(rounded.z + 256.0, rounded.codebook + 256.0, rounded.temperature)
    _, _, log_partition, entropy, _ = streaming.soft_forward(*far)
    truth = forward(far.to(torch.float64))
    assert (log_partition - truth["log_partition"]).abs().max() < 1e-4
    assert (entropy - truth["entropy"]).abs().max() < 1e-5


def test_the_log_partition_of_latents_at_their_codes():
    """‖z‖² − 2z·c + ‖c‖² would cancel there."""
    codebook = 30 * torch.randn(1, 64, 48)
    z = codebook[:, 5:45] + 0.01 * torch.randn(1, 40, 48)
    problem = Problem(z, codebook, torch.tensor(1e-3))
    log_partition = streaming.soft_forward(*problem)[2]
    truth = forward(problem.to(torch.float64))["log_partition"]
    assert (log_partition - truth).abs().max() < 2e-3


@pytest.mark.parametrize("factor", [1e3, 1e6])
def test_one_code_far_from_the_others(factor):
    """Centred by their mean, which it moves, the others would lose their digits."""
    check(streaming, lambda: far_code(factor))


@pytest.mark.parametrize("most", [32, 2048])
def test_usage_that_hardly_differs_from_row_to_row(monkeypatch, most):
    """Nearly equal numbers, added one behind the other, all round the same way."""
    monkeypatch.setattr(block_softmax, "MAX_ROWS", most)
    problem = make(1, 60_000, 64, 16, temperature=1e3)
    usage = streaming.probability_sums(*problem, None)[..., 0] / 60_000
    error = Errors()
    error.add(usage, forward(problem)["usage"], forward(problem.to(torch.float64))["usage"])
    error.assert_no_worse(2, "usage")


def test_near_ties():
    check(streaming, near_ties)


COMBINATIONS = [c for n in range(1, 5) for c in itertools.combinations(ALL, n)]


@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_every_combination_of_incoming_gradients(names):
    check(streaming, lambda: make(2, 67, 48, 5, temperature=0.3), names=names)


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
    for a, b in zip(
        streaming.soft_forward(*views)[:4], streaming.soft_forward(*plain)[:4], strict=True
    ):
        torch.testing.assert_close(a, b)
    rest = (None, None, None, True, True, True)
    viewed = streaming.soft_backward(*views, grad, *rest)
    for a, b in zip(viewed, streaming.soft_backward(*plain, grad.clone(), *rest), strict=True):
        torch.testing.assert_close(a, b)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(block_softmax, "BLOCK_ELEMENTS", 2**12)


def test_blocks_join_to_the_same_result(small_blocks):
    assert block_softmax.rows_per_block(500, torch.empty(100, 20)) == 40
    check(streaming, lambda: make(2, 500, 100, 20))


@pytest.mark.parametrize("codes", [1, 31, 48, 64, 67, 100, 128, 1000, 4096])
def test_first_maximum(codes):
    scores = torch.randint(0, 20, (50, codes)).float()
    first = torch.tensor([row.tolist().index(row.max()) for row in scores])
    assert torch.equal(block_softmax.first_maximum(scores), first)


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


PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.mm.out,
    torch.ops.aten.addmm.out,
    torch.ops.aten.addmm_.default,
}


class MatrixUnit(TorchDispatchMode):
    """Takes float32 operands of products for tf32, as a GPU may: their last 13 bits are lost."""

    rounds = True

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function in PRODUCTS and self.rounds:
            *rest, a, b = arguments
            a, b = ((x.view(torch.int32) & -(2**13)).view(torch.float32) for x in (a, b))
            arguments = (*rest, a, b)
        return function(*arguments, **(keywords or {}))

    @contextmanager
    def float32_products(self, precision, device):
        before, self.rounds = self.rounds, precision != "highest"
        yield
        self.rounds = before


@pytest.fixture
def on_a_matrix_unit(monkeypatch):
    """The backend as a GPU runs it at precision "high"."""
    unit = MatrixUnit()
    monkeypatch.setattr(block_softmax, "takes_tf32", lambda codebook, precision: True)
    monkeypatch.setattr(block_softmax, "float32_products", unit.float32_products)

    def inside(function):
        def call(*arguments, **options):
            with unit:
                return function(*arguments, **options)

        return call

    names = ("soft_forward", "soft_backward", "probability_sums", "nearest")
    return SimpleNamespace(**{name: inside(getattr(streaming, name)) for name in names})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 130, 64, 48), (1, 67, 192, 300), (1, 40, 30, 513)], ids=str)
@pytest.mark.parametrize("temperature", [0.1, 1.0, 100.0])
def test_half_precision_on_a_matrix_unit(on_a_matrix_unit, dtype, shape, temperature):
    how = {"precision": "high", "matmul": matmul_in(dtype)}
    check(on_a_matrix_unit, lambda: make(*shape, temperature=temperature), dtype, **how)


@pytest.mark.parametrize("offset", [10.0, 1e3])
def test_bfloat16_far_from_zero_on_a_matrix_unit(on_a_matrix_unit, offset):
    how = {"precision": "high", "matmul": matmul_in(torch.bfloat16)}
    check(on_a_matrix_unit, lambda: make(1, 130, 67, 48, offset=offset), torch.bfloat16, **how)


@pytest.mark.parametrize("dim", [5, 48, 300])
@pytest.mark.parametrize("offset", [0.0, 10.0, 1e4])
def test_high_precision_on_a_matrix_unit(on_a_matrix_unit, offset, dim):
    bounds = REDUCED_PRECISION["high"]
    for name, error in reduced_errors(on_a_matrix_unit, "high", offset, "cpu", dim).items():
        assert error <= bounds[name.split()[0]], name


@pytest.mark.parametrize("dim", [5, 48, 300])
def test_nearest_on_a_matrix_unit(on_a_matrix_unit, dim):
    problem = make(1, 500, 300, dim)
    indices = on_a_matrix_unit.nearest(problem.z, problem.codebook, "high")
    assert nearest_excess(problem.z[0], problem.codebook[0], indices[0]) <= 1


def test_parts_are_taken_as_they_are():
    x = torch.randn(1000) * 10.0 ** torch.randint(-20, 20, (1000,))
    parts = tf32_parts(x, 3)
    assert torch.equal(sum(parts), x)
    for count, part in enumerate(parts, 1):
        assert torch.equal(part.view(torch.int32) & -(2**13), part.view(torch.int32))
        assert ((sum(parts[:count]) - x).abs() <= 2.0 ** (-11 * count) * x.abs()).all()


def test_parts_of_what_is_not_finite():
    """A GPU's NaN is 0x7fffffff; and what rounding would bring to infinity stays as it is."""
    nans = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    first, *rest = tf32_parts(nans, 3)
    assert first.isnan().all() and not any(part.any() for part in rest)
    large = torch.tensor([torch.inf, -torch.inf, torch.finfo(torch.float32).max])
    first, *rest = tf32_parts(large, 3)
    assert torch.equal(first, large) and not any(part.any() for part in rest)


def test_a_code_beyond_all_on_a_matrix_unit(on_a_matrix_unit):
    """Its norm is infinite, its weight zero, and the others are as they were."""
    problem = make(1, 40, 30, 48)
    problem.codebook[0, 5] *= 1e30
    others = torch.arange(30) != 5
    alone = problem._replace(codebook=problem.codebook[:, others])
    found = on_a_matrix_unit.soft_forward(*problem, precision="high")
    wanted = streaming.soft_forward(*alone)
    assert found[0].isfinite().all()
    torch.testing.assert_close(found[2], wanted[2], rtol=1e-4, atol=1e-4)


def test_a_mixture_of_one_code_is_that_code_on_a_matrix_unit(on_a_matrix_unit):
    codebook = torch.randn(1, 30, 48).half()
    problem = (codebook.repeat(1, 3, 1), codebook, torch.tensor(1e-3))
    quantized = on_a_matrix_unit.soft_forward(*problem, precision="high")[0]
    assert torch.equal(quantized, problem[0])


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
    assert all(torch.equal(a, b) for a, b in zip(first[:4], second[:4], strict=True))
