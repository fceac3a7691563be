"""The public operators: layout, estimators, errors, and how they live with the rest of PyTorch."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

import softvq
from softvq import functional
from softvq.kernels import operators

BACKENDS = ("streaming", "reference")


def inputs(rows=(4, 6), codes=10, dim=5, dtype=torch.float64):
    z = torch.randn(*rows, dim, dtype=dtype, requires_grad=True)
    codebook = torch.randn(codes, dim, dtype=dtype, requires_grad=True)
    temperature = torch.tensor(0.7, dtype=dtype, requires_grad=True)
    return z, codebook, temperature


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_of_every_output(backend):
    def floating_outputs(z, codebook, temperature):
        out = softvq.soft_quantize(z, codebook, temperature, backend=backend)
        usage = softvq.code_usage(z, codebook, temperature, backend=backend)
        return out.quantized, out.log_partition, out.entropy, usage

    assert torch.autograd.gradcheck(floating_outputs, inputs(rows=(3,)))
    z, _, temperature = inputs(rows=(2, 3))
    codebook = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(floating_outputs, (z, codebook, temperature))


def test_gradcheck_of_the_materialised_probabilities_and_the_distance():
    assert torch.autograd.gradcheck(softvq.assignment_probabilities, inputs(rows=(3,)))
    z, codebook, _ = inputs(rows=(3,))
    assert torch.autograd.gradcheck(lambda z, c: softvq.nearest_codes(z, c)[1], (z, codebook))


def test_shapes_and_dtypes():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        z, codebook = torch.randn(2, 3, 5).to(dtype), torch.randn(10, 5)
        out = softvq.soft_quantize(z, codebook, 1.0)
        row_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        assert out.quantized.shape == z.shape and out.quantized.dtype == dtype
        assert out.indices.shape == (2, 3) and out.indices.dtype == torch.int64
        assert out.log_partition.shape == (2, 3) and out.log_partition.dtype == row_dtype
        assert out.entropy.shape == (2, 3) and out.entropy.dtype == row_dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_are_independent_codebooks(backend):
    z, codebook = torch.randn(2, 7, 3, 5), torch.randn(3, 10, 5)
    together = softvq.soft_quantize(z, codebook, 0.5, backend=backend)
    for head in range(3):
        alone = softvq.soft_quantize(z[:, :, head], codebook[head], 0.5, backend=backend)
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[:, :, head], b)
    assert softvq.code_usage(z, codebook, 0.5).shape == (3, 10)
    assert softvq.assignment_probabilities(z, codebook, 0.5).shape == (2, 7, 3, 10)
    indices, distance = softvq.nearest_codes(z, codebook)
    assert indices.shape == distance.shape == (2, 7, 3)


def test_probabilities_agree_with_the_operator():
    z, codebook, temperature = inputs()
    p = softvq.assignment_probabilities(z, codebook, temperature)
    out = softvq.soft_quantize(z, codebook, temperature)
    torch.testing.assert_close(out.quantized, p @ codebook)
    torch.testing.assert_close(out.entropy, -(p * p.log()).sum(-1))
    torch.testing.assert_close(softvq.code_usage(z, codebook, temperature), p.mean((0, 1)))


def test_straight_through_has_the_nearest_value_and_the_soft_gradient():
    z, codebook, temperature = inputs()
    grad = torch.randn_like(z)
    soft = softvq.soft_quantize(z, codebook, temperature)
    hard = softvq.soft_quantize(z, codebook, temperature, estimator="straight_through")
    assert torch.equal(hard.quantized, codebook[hard.indices])
    wanted = torch.autograd.grad(soft.quantized, (z, codebook, temperature), grad)
    given = torch.autograd.grad(hard.quantized, (z, codebook, temperature), grad)
    for a, b in zip(given, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_detached_probabilities_move_only_the_codebook(backend):
    z, codebook, temperature = inputs()
    grad = torch.randn_like(z)
    out = softvq.soft_quantize(z, codebook, temperature, detach_probabilities=True, backend=backend)
    assert not out.log_partition.requires_grad and not out.entropy.requires_grad
    dz, dc, dt = torch.autograd.grad(
        out.quantized, (z, codebook, temperature), grad, allow_unused=True
    )
    p = softvq.assignment_probabilities(z, codebook, temperature).reshape(-1, 10)
    assert dz is None and dt is None
    torch.testing.assert_close(dc, p.T @ grad.reshape(-1, 5))


def test_code_sums_are_the_statistics_of_k_means():
    z = torch.randn(20, 3, 4).bfloat16()
    indices = torch.randint(0, 6, (20, 3))
    sums, counts = softvq.code_sums(z, indices, 8)
    one_hot = torch.nn.functional.one_hot(indices, 8).float().reshape(-1, 8)
    assert sums.dtype == counts.dtype == torch.float32
    torch.testing.assert_close(sums, one_hot.T @ z.float().reshape(-1, 4))
    assert torch.equal(counts, one_hot.sum(0))


def test_auto_never_chooses_the_fused_kernels():
    with FakeTensorMode():
        z = torch.empty(3, 4, device="cuda")
    assert functional._choose_backend(z, z, "auto") == "streaming"


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend):
    z, codebook, temperature = inputs(rows=(0,))
    out = softvq.soft_quantize(z, codebook, temperature, backend=backend)
    assert out.quantized.shape == (0, 5) and out.indices.shape == (0,)
    (out.quantized.sum() + out.log_partition.sum() + out.entropy.sum()).backward()
    assert z.grad.shape == (0, 5)
    assert torch.equal(codebook.grad, torch.zeros_like(codebook)) and temperature.grad == 0
    assert softvq.nearest_codes(z, codebook, backend=backend)[0].shape == (0,)
    sums, counts = softvq.code_sums(z, out.indices, 10)
    assert sums.abs().sum() == 0 and counts.sum() == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, "temperature must be a finite number above 0, got 0.0"),
        ({"temperature": -1}, ValueError, "temperature .* got -1"),
        ({"temperature": float("nan")}, ValueError, "temperature .* got nan"),
        ({"temperature": float("inf")}, ValueError, "temperature .* got inf"),
        ({"temperature": torch.tensor(-2.0)}, ValueError, "temperature .* got -2.0"),
        ({"temperature": torch.ones(2)}, ValueError, r"0-d .*\(2,\)"),
        ({"z": torch.zeros(3, 4)}, ValueError, r"D = 5, got z \(3, 4\)"),
        ({"z": torch.zeros(3, 5, dtype=torch.int64)}, TypeError, "z must be .* got torch.int64"),
        ({"codebook": torch.zeros(10, 5, dtype=torch.int32)}, TypeError, "codebook .* torch.int32"),
        ({"codebook": torch.zeros(0, 5)}, ValueError, r"codebook is empty: \(0, 5\)"),
        ({"codebook": torch.zeros(5)}, ValueError, r"codebook must be \(K, D\)"),
        ({"codebook": torch.zeros(3, 9, 5)}, ValueError, r"H = 3, got \(2, 5\)"),
        ({"estimator": "hard"}, ValueError, "estimator must be one of soft, straight_through"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
        ({"precision": "low"}, ValueError, "precision must be one of highest, high, medium"),
    ],
    ids=str,
)
def test_bad_input_is_named(change, error, message):
    call = {"z": torch.zeros(2, 5), "codebook": torch.zeros(9, 5), "temperature": 1.0} | change
    with pytest.raises(error, match=message):
        softvq.soft_quantize(**call)


def test_code_sums_names_a_wrong_shape():
    with pytest.raises(ValueError, match=r"indices must have the shape .* \(3,\); got \(2,\)"):
        softvq.code_sums(torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64), 5)


def test_a_second_derivative_is_refused():
    z, codebook, temperature = inputs()
    quantized = softvq.soft_quantize(z, codebook, temperature).quantized
    (dz,) = torch.autograd.grad(quantized.square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dz.sum().backward()


def test_autocast_does_not_lower_the_precision():
    z, codebook, temperature = inputs(rows=(64,), dtype=torch.float32)
    grad = torch.randn_like(z)
    with torch.autocast("cpu", torch.bfloat16):
        inside = softvq.soft_quantize(z, codebook, temperature)
        inside_grad = torch.autograd.grad(inside.quantized, z, grad)[0]
    outside = softvq.soft_quantize(z, codebook, temperature)
    outside_grad = torch.autograd.grad(outside.quantized, z, grad)[0]
    assert torch.equal(inside.quantized, outside.quantized)
    assert torch.equal(inside_grad, outside_grad)


def test_one_graph_under_compile_whatever_the_temperature():
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True)
    def step(z, codebook, temperature):
        out = softvq.soft_quantize(z, codebook, temperature)
        usage = softvq.code_usage(z, codebook, temperature)
        return out.quantized.sum() + out.entropy.sum() + usage.square().sum()

    z, codebook, _ = inputs(dtype=torch.float32)
    for value in (1.0, 0.5, 0.25):
        loss = step(z, codebook, torch.tensor(value))
        expected = softvq.soft_quantize(z, codebook, value)
        usage = softvq.code_usage(z, codebook, value)
        total = expected.quantized.sum() + expected.entropy.sum() + usage.square().sum()
        torch.testing.assert_close(loss, total)
        grad = torch.autograd.grad(loss, codebook)[0]
        torch.testing.assert_close(grad, torch.autograd.grad(total, codebook)[0])
    assert len(graphs) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_registered_operators_pass_opcheck(backend):
    z, codebook = torch.randn(2, 6, 5), torch.randn(2, 10, 5)
    temperature = torch.tensor(0.7)
    g, row = torch.randn_like(z), torch.randn(2, 6)
    for operator, arguments in (
        (operators.soft_forward, (z, codebook, temperature, "highest", backend)),
        (
            operators.soft_backward,
            (
                z,
                codebook,
                temperature,
                g,
                row,
                None,
                None,
                True,
                True,
                False,
                None,
                None,
                "highest",
                backend,
            ),
        ),
        (operators.probability_sums, (z, codebook, temperature, g, None, "highest", backend)),
        (operators.nearest, (z, codebook, backend)),
    ):
        torch.library.opcheck(operator, arguments)
