"""The public operators: layout, estimators, the choice of a backend, errors."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

import softvq
from softvq import functional
from softvq.kernels import streaming, support

BACKENDS = ("streaming", "reference")
needs_triton = pytest.mark.skipif(not support._HAS_TRITON, reason="needs triton")
EVERY_BACKEND = (*BACKENDS, pytest.param("triton", marks=needs_triton))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where triton runs


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


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_the_distance_has_the_gradients_of_its_formula(backend):
    z = torch.randn(7, 3, 5, device=DEVICE, requires_grad=True)
    codebook = torch.randn(3, 10, 5, device=DEVICE, requires_grad=True)
    indices, distance = softvq.nearest_codes(z, codebook, backend=backend)
    expected = (z - codebook[torch.arange(3, device=DEVICE), indices]).square().sum(-1)
    torch.testing.assert_close(distance, expected)
    for a, b in zip(*(torch.autograd.grad(x.exp().sum(), (z, codebook))
                      for x in (distance, expected)), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)


def test_the_distance_can_be_differentiated_twice():
    z, codebook, _ = inputs(rows=(3,))
    assert torch.autograd.gradgradcheck(lambda z, c: softvq.nearest_codes(z, c)[1], (z, codebook))


def test_shapes_and_dtypes():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        z, codebook = torch.randn(2, 3, 5).to(dtype), torch.randn(10, 5)
        out = softvq.soft_quantize(z, codebook, 1.0)
        row_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        assert out.quantized.shape == z.shape and out.quantized.dtype == dtype
        assert out.indices.shape == (2, 3) and out.indices.dtype == torch.int64
        assert out.log_partition.shape == (2, 3) and out.log_partition.dtype == row_dtype
        assert out.entropy.shape == (2, 3) and out.entropy.dtype == row_dtype


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("heads", [(), (3,)])
def test_a_single_latent_has_no_leading_dimension(heads, backend):
    z, codebook = torch.randn(*heads, 5, device=DEVICE), torch.randn(*heads, 10, 5, device=DEVICE)

    def by_row(z):
        return (
            *softvq.soft_quantize(z, codebook, 0.5, backend=backend),
            softvq.usage_and_entropy(z, codebook, 0.5, backend=backend)[1],
            *softvq.nearest_codes(z, codebook, backend=backend),
            softvq.assignment_probabilities(z, codebook, 0.5),
        )

    for one, rows in zip(by_row(z), by_row(z[None]), strict=True):
        assert torch.equal(one, rows[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_are_independent_codebooks(backend):
    z, codebook = torch.randn(2, 7, 3, 5), torch.randn(3, 10, 5)
    together = softvq.soft_quantize(z, codebook, 0.5, backend=backend)
    for head in range(3):
        alone = softvq.soft_quantize(z[:, :, head], codebook[head], 0.5, backend=backend)
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[:, :, head], b)
    assert softvq.code_usage(z, codebook, 0.5).shape == (3, 10)
    one = softvq.code_usage(z[:, :, :1], codebook[:1], 0.5)
    assert one.shape == (1, 10)  # a head of its own is no plain codebook
    assert softvq.assignment_probabilities(z, codebook, 0.5).shape == (2, 7, 3, 10)
    indices, distance = softvq.nearest_codes(z, codebook)
    assert indices.shape == distance.shape == (2, 7, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_neither_temperatures_nor_distances(dtype):
    z, codebook = torch.randn(50, 16).to(dtype), torch.randn(20, 16)
    half = softvq.soft_quantize(z, codebook, 0.3)
    torch.testing.assert_close(
        half.log_partition, softvq.soft_quantize(z.float(), codebook, 0.3).log_partition
    )
    assert softvq.soft_quantize(z, codebook, 1e-10).quantized.isfinite().all()
    indices, distance = softvq.nearest_codes(z, codebook.to(dtype))
    wanted = (z.double() - codebook.to(dtype).double()[indices]).square().sum(-1)
    torch.testing.assert_close(distance.double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_number_is_a_temperature_of_the_codebooks_precision():
    z, codebook = 3 * torch.randn(20, 16), 3 * torch.randn(9, 16).double()
    found = softvq.soft_quantize(z, codebook, 1e-3).log_partition
    temperature = torch.tensor(1e-3, dtype=torch.float64)
    wanted = softvq.soft_quantize(z, codebook, temperature).log_partition
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("limit", [1e-20, 1e20])
def test_the_limits_of_a_temperature_are_allowed_in_float32(limit):
    z, codebook = torch.randn(5, 4), torch.randn(3, 4)
    assert softvq.soft_quantize(z, codebook, torch.tensor(limit)).quantized.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_half_precision_codes_is_summed_before_it_is_rounded(dtype):
    codebook = (0.1 * torch.randn(16, 8)).to(dtype).requires_grad_()
    z = (codebook.detach().repeat(2000, 1) + 0.03 * torch.randn(32_000, 8)).to(dtype)
    indices, distance = softvq.nearest_codes(z, codebook)
    distance.mean().backward()  # a row's share would be lost in float16
    true = codebook.detach().double().requires_grad_()
    (z.double() - true[indices]).square().sum(-1).mean().backward()
    error = (codebook.grad.double() - true.grad).abs().max()
    assert error <= torch.finfo(dtype).eps * true.grad.abs().max()


@pytest.mark.parametrize("heads", [(), (3,)], ids=str)
def test_gradients_arrive_and_leave_without_a_copy(heads, monkeypatch):
    seen = []

    def record(z, codebook, temperature, grad_quantized, *rest):
        grads = backward(z, codebook, temperature, grad_quantized, *rest)
        seen.extend((z, grad_quantized, grads[0]))
        return grads

    backward = streaming.soft_backward
    monkeypatch.setattr(streaming, "soft_backward", record)
    z, codebook = torch.randn(4, 7, *heads, 5, requires_grad=True), torch.randn(*heads, 10, 5)
    grad = torch.randn_like(z)
    (dz,) = torch.autograd.grad(softvq.soft_quantize(z, codebook, 1.0).quantized, z, grad)
    assert [x.data_ptr() for x in seen[:2]] == [z.data_ptr(), grad.data_ptr()]
    assert dz.data_ptr() == seen[2].data_ptr()


def test_probabilities_agree_with_the_operator():
    z, codebook, temperature = inputs()
    p = softvq.assignment_probabilities(z, codebook, temperature)
    out = softvq.soft_quantize(z, codebook, temperature)
    torch.testing.assert_close(out.quantized, p @ codebook)
    torch.testing.assert_close(out.entropy, -(p * p.log()).sum(-1))
    torch.testing.assert_close(softvq.code_usage(z, codebook, temperature), p.mean((0, 1)))


def test_probabilities_of_meta_tensors_have_a_shape():
    with torch.device("meta"):
        p = softvq.assignment_probabilities(torch.empty(4, 6, 5), torch.empty(10, 5), 0.7)
    assert p.is_meta and p.shape == (4, 6, 10)


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


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_a_detached_log_partition_does_not_move_the_latents(backend):
    tensors = [x.detach().to(DEVICE).requires_grad_() for x in inputs(dtype=torch.float32)]
    weights = torch.randn_like(tensors[0]), *torch.randn(2, *tensors[0].shape[:-1], device=DEVICE)

    def gradients(with_log_partition, **options):
        out = softvq.soft_quantize(*tensors, backend=backend, **options)
        outputs = (out.quantized, out.entropy, out.log_partition)[: 2 + with_log_partition]
        loss = sum((w * x).sum() for w, x in zip(weights, outputs, strict=False))
        return torch.autograd.grad(loss, tensors)

    dz, *others = gradients(True, detach_log_partition=True)
    assert torch.equal(dz, gradients(False)[0])
    for given, expected in zip(others, gradients(True)[1:], strict=True):
        assert torch.equal(given, expected)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("heads", [(), (3,)], ids=str)
def test_usage_and_entropy_are_those_of_the_two_operators(backend, heads):
    z, codebook = torch.randn(4, 6, *heads, 5), torch.randn(*heads, 10, 5)
    tensors = [x.to(DEVICE).requires_grad_() for x in (z, codebook, torch.tensor(0.7))]
    together = softvq.usage_and_entropy(*tensors, backend=backend)
    apart = (
        softvq.code_usage(*tensors, backend=backend),
        softvq.soft_quantize(*tensors, backend=backend).entropy,
    )
    weights = [torch.randn_like(x) for x in apart]
    for wanted in ([0], [1], [0, 1]):
        sums = [
            sum((weights[i] * outputs[i]).sum() for i in wanted) for outputs in (together, apart)
        ]
        given, expected = (torch.autograd.grad(x, tensors, retain_graph=True) for x in sums)
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(together, apart)


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


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_code_sums_are_the_statistics_of_k_means(backend, dtype):
    z = torch.randn(20, 3, 4, device=DEVICE).to(dtype).requires_grad_()
    indices = torch.randint(0, 6, (20, 3), device=DEVICE)
    sums, counts = softvq.code_sums(z, indices, 8, backend=backend)
    one_hot = torch.nn.functional.one_hot(indices, 8).to(sums.dtype).reshape(-1, 8)
    assert sums.dtype == counts.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(sums, one_hot.T @ z.to(sums.dtype).reshape(-1, 4))
    assert torch.equal(counts, one_hot.sum(0))
    weight = torch.randn_like(sums)
    (dz,) = torch.autograd.grad(sums, z, weight)
    assert torch.equal(dz, weight[indices].to(dtype))


@pytest.fixture
def fake_card(monkeypatch):
    """Makes empty tensors (3, D) on a CUDA device of any compute capability."""

    def tensor(major=9, dim=4, dtype=torch.float32):
        shared_memory = (227 if major in (9, 10) else 99) * 1024
        card = SimpleNamespace(
            name="Card", major=major, minor=5, shared_memory_per_block_optin=shared_memory
        )
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
        with FakeTensorMode():
            return torch.empty(3, dim, device="cuda", dtype=dtype)

    return tensor


def chosen(z: torch.Tensor, backend="auto") -> tuple[str, str]:
    """The backends for what multiplies latents and codes, and for code_sums."""
    product = functional._product_backend(z, z, backend)
    return product, functional._choose_backend(z, backend, support.obstacle(z))


@needs_triton
def test_auto_is_fused_where_the_kernels_can_be_used(fake_card, monkeypatch):
    monkeypatch.setattr(support, "_TRITON_VERSION", (3, 8))
    for major in (8, 9, 10, 12):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert chosen(fake_card(major, 256, dtype)) == ("triton",) * 2
            assert chosen(fake_card(major, 257, dtype)) == ("streaming", "triton")
    assert chosen(fake_card(dtype=torch.float64)) == ("streaming", "triton")
    assert chosen(fake_card(major=7)) == ("streaming",) * 2
    assert chosen(torch.empty(3, 4)) == ("streaming",) * 2
    monkeypatch.setattr(support, "_TRITON_VERSION", (3, 7))
    assert chosen(fake_card(major=9)) == ("triton",) * 2
    assert chosen(fake_card(major=10)) == ("streaming", "triton")
    assert chosen(fake_card(major=12)) == ("triton",) * 2
    with monkeypatch.context() as rocm:
        rocm.setattr(torch.version, "hip", "6.4")
        assert chosen(fake_card()) == ("streaming",) * 2
    monkeypatch.setattr(support, "_HAS_TRITON", False)
    assert chosen(fake_card()) == ("streaming",) * 2


@needs_triton
def test_the_gradient_of_a_distance_is_a_sum_as_code_sums_has_it(fake_card, monkeypatch):
    """Fused too where products stream: plain additions come in another order each time."""
    used, apply = [], functional.autograd.CodesAt.apply

    def watched(codebook, indices, backend):
        used.append(backend)
        return apply(codebook, indices, backend)

    monkeypatch.setattr(functional.autograd.CodesAt, "apply", watched)
    for card in ({"dim": 300}, {"dtype": torch.float64}, {"major": 7}):
        z = fake_card(**card)
        with z.fake_mode:
            softvq.nearest_codes(z, z)
    assert used == ["triton", "triton", "streaming"]


def test_more_rows_or_heads_than_programs_can_number():
    def too_large(rows: int, heads: int) -> bool:
        z, codebook = torch.empty(rows, heads, 4, device="meta"), torch.empty(heads, 8, 4)
        return support.too_large(z, codebook)

    assert not too_large(2**30, 1) and too_large(2**30 + 1, 1)
    assert not too_large(1, 2**16 - 1) and too_large(1, 2**16)
    assert support.too_large(torch.empty(2**15, 2**16, 4, device="meta"), torch.empty(8, 4))


@needs_triton
def test_triton_says_what_it_lacks(fake_card, monkeypatch):
    with pytest.raises(ValueError, match="'triton' has no float64"):
        chosen(fake_card(dtype=torch.float64), "triton")
    with pytest.raises(ValueError, match=r"compute capability 8\.0, Card has 7\.5"):
        chosen(fake_card(major=7), "triton")
    monkeypatch.setattr(support, "_TRITON_VERSION", (3, 7))
    with pytest.raises(ValueError, match=r"needs triton 3\.8 on this GPU, 3\.7 is installed"):
        chosen(fake_card(major=10), "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="'triton' needs CUDA tensors, got cpu"):
        softvq.code_sums(torch.ones(3, 4), torch.tensor([0, 1, 1]), 2, backend="triton")
    monkeypatch.setattr(support, "_HAS_TRITON", False)
    with pytest.raises(ValueError, match="'triton' needs the package triton"):
        chosen(fake_card(), "triton")


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
        ({"temperature": 0.0}, ValueError, r"temperature .* from 1e-20 to 1e\+20, got 0\.0"),
        ({"temperature": None}, TypeError, "temperature must be a number from .* got None"),
        ({"temperature": "1"}, TypeError, "temperature must be a number from .* got '1'"),
        ({"temperature": torch.tensor(2.0**70)}, ValueError, "temperature .* got 1.18"),
        ({"temperature": 1e-21}, ValueError, "temperature .* got 1e-21"),
        ({"temperature": -1}, ValueError, "temperature .* got -1"),
        ({"temperature": float("nan")}, ValueError, "temperature .* got nan"),
        ({"temperature": float("inf")}, ValueError, "temperature .* got inf"),
        ({"temperature": torch.tensor(-2.0)}, ValueError, "temperature .* got -2.0"),
        ({"temperature": torch.ones(2)}, ValueError, r"0-d .*\(2,\)"),
        ({"z": torch.zeros(3, 4)}, ValueError, r"D = 5, got z \(3, 4\)"),
        ({"z": torch.zeros(3, 5, dtype=torch.int64)}, TypeError, "z must be .* got torch.int64"),
        ({"codebook": torch.zeros(10, 5, dtype=torch.int32)}, TypeError, "codebook .* torch.int32"),
        ({"codebook": torch.zeros(10, 5).numpy()}, TypeError, "codebook must be .* got a ndarray"),
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


@pytest.mark.parametrize("function", [softvq.code_usage, softvq.nearest_codes])
def test_every_call_names_a_wrong_precision(function):
    arguments = (torch.zeros(2, 5), torch.zeros(9, 5), 1.0)[
        : 3 - (function is softvq.nearest_codes)
    ]
    with pytest.raises(ValueError, match="precision must be one of"):
        function(*arguments, precision="low")


@pytest.mark.parametrize(
    ("z", "indices", "error", "message"),
    [
        (torch.zeros(3, 4), torch.tensor([0, 1]), ValueError, r"shape .* \(3,\); got \(2,\)"),
        (torch.zeros(2, 4), torch.tensor([0, 5]), ValueError, r"lie in \[0, 5\), got 0 to 5"),
        (torch.zeros(2, 4), torch.tensor([-1, 4]), ValueError, r"lie in \[0, 5\), got -1 to 4"),
        (torch.zeros(2, 4), torch.tensor([0.0, 1.0]), TypeError, "int64, got torch.float32"),
        (torch.zeros(2, 4).long(), torch.tensor([0, 1]), TypeError, "z must .* got torch.int64"),
        (torch.zeros(2, 4).to(torch.float8_e5m2), torch.tensor([0, 1]), TypeError, "float8_e5m2"),
        (torch.tensor(1.0), torch.tensor(0), ValueError, r"z must be \(\.\.\., D\) .* got \(\)"),
        (torch.zeros(2, 0), torch.tensor([0, 1]), ValueError, r"D of at least 1, got \(2, 0\)"),
        (torch.zeros(2, 4), torch.zeros(2).long().to("meta"), ValueError, "indices on meta; use"),
    ],
    ids=str,
)
def test_code_sums_names_what_is_wrong(z, indices, error, message):
    with pytest.raises(error, match=message):
        softvq.code_sums(z, indices, 5)


@pytest.mark.parametrize(
    ("codebook_size", "error", "message"),
    [
        (0, ValueError, "codebook_size must be at least 1, got 0"),
        (5.0, TypeError, "codebook_size must be a whole number, got 5.0"),
    ],
)
def test_code_sums_needs_a_number_of_codes(codebook_size, error, message):
    with pytest.raises(error, match=message):
        softvq.code_sums(torch.zeros(2, 4), torch.tensor([0, 1]), codebook_size)
