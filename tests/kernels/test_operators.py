"""The operators among the rest of PyTorch: its precision setting, compile, autocast, opcheck."""

from importlib.util import find_spec

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import softvq
from softvq.kernels import operators, streaming
from softvq.kernels.products import float32_product

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SETTING = (torch.backends.cuda if DEVICE == "cuda" else torch.backends.mkldnn).matmul
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


@pytest.fixture
def set_precision():
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision("highest")


def explicit(*tensors) -> dict[str, list[torch.Tensor]]:
    """The fused results by the name of their precision; different from one another."""
    names = ("highest", "high", "medium")
    results = {
        name: with_gradients(every_result, *tensors, backend="triton", precision=name)
        for name in names
    }
    assert not torch.equal(results["highest"][0], results["high"][0])
    assert not torch.equal(results["high"][0], results["medium"][0])
    return results


@needs_triton
def test_precision_follows_the_setting_of_torch(set_precision):
    tensors = inputs()
    for name, expected in explicit(*tensors).items():
        set_precision(name)
        assert_same(with_gradients(every_result, *tensors, backend="triton"), expected)
    chosen = with_gradients(every_result, *tensors, backend="triton", precision="highest")
    assert_same(chosen, explicit(*tensors)["highest"])


@needs_triton
def test_nearest_follows_the_setting_too(set_precision):
    codebook = torch.randn(1, 16, device=DEVICE) + 1e-4 * torch.randn(30, 16, device=DEVICE)
    codebook = torch.cat([codebook, -codebook])  # far from its mean, where float16 is coarse
    z = codebook + 1e-5 * torch.randn_like(codebook)
    found = {name: softvq.nearest_codes(z, codebook, backend="triton", precision=name)[0]
             for name in ("highest", "medium")}  # fmt: skip
    assert not torch.equal(found["highest"], found["medium"])
    for name, expected in found.items():
        set_precision(name)
        assert torch.equal(softvq.nearest_codes(z, codebook, backend="triton")[0], expected)


@needs_triton
@pytest.mark.parametrize(("newer", "name"), [("tf32", "high"), ("ieee", "highest")])
def test_precision_set_by_the_newer_name(set_precision, newer, name):
    tensors = inputs()
    SETTING.fp32_precision = newer
    results = with_gradients(every_result, *tensors, backend="triton")
    assert_same(results, explicit(*tensors)[name])


REDUCED = {"high": {"ieee", "tf32"}, "medium": {"ieee", "tf32"}}
if DEVICE == "cpu":
    REDUCED = {"high": {"ieee"}, "medium": {"ieee", "bf16"}}


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
@pytest.mark.parametrize("precision", ["highest", "high", "medium", None])
def test_plain_products_follow_the_call(set_precision, monkeypatch, setting, precision):
    """Whatever torch is set to, and then it still is; scores round nothing."""
    seen = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            if function in (torch.ops.aten.mm.out, torch.ops.aten.mm.default,
                            torch.ops.aten.addmm.out, torch.ops.aten.addmm_.default):  # fmt: skip
                seen.append((function, SETTING.fp32_precision))
            return function(*arguments, **(keywords or {}))

    def watched(function):
        def call(*arguments):
            with Products():
                return function(*arguments)

        return call

    for name in ("soft_forward", "soft_backward", "probability_sums", "nearest"):
        monkeypatch.setattr(streaming, name, watched(getattr(streaming, name)))
    set_precision(setting)
    before = SETTING.fp32_precision
    with_gradients(every_result, *inputs(), backend="streaming", precision=precision)
    assert SETTING.fp32_precision == before and torch.get_float32_matmul_precision() == setting
    assert {how for _, how in seen} == REDUCED.get(precision or setting, {"ieee"})
    assert {how for function, how in seen if function == torch.ops.aten.mm.out} == {"ieee"}


@pytest.mark.parametrize("backend", ["streaming", "reference", TRITON])
def test_results_hardly_depend_on_what_torch_is_set_to(set_precision, backend):
    """On a machine that can round operands; on others the setting changes nothing."""
    tensors = inputs()
    how = {"backend": backend, "precision": "highest"}
    expected = with_gradients(every_result, *tensors, **how)
    for name in ("high", "medium"):
        set_precision(name)
        assert_same(with_gradients(every_result, *tensors, **how), expected)


class Graphs:
    """Compiles with fullgraph=True and counts how often."""

    def __init__(self, function, **options):
        self.count = 0
        torch._dynamo.reset()
        self.run = torch.compile(function, backend=self._backend, fullgraph=True, **options)

    def _backend(self, graph, example_inputs):
        self.count += 1
        return graph.forward


@needs_triton
def test_a_compiled_graph_follows_the_setting(set_precision):
    tensors = inputs()
    expected = explicit(*tensors)
    graphs = Graphs(every_result)
    # torch itself guards on "is it highest?", so that one more graph would be its own doing.
    for name in ("high", "medium", "high"):
        set_precision(name)
        assert_same(with_gradients(graphs.run, *tensors, backend="triton"), expected[name])
    assert graphs.count == 1


@pytest.mark.parametrize("backend", ["streaming", TRITON])
def test_one_graph_whatever_the_temperature_and_the_rows(backend):
    graphs = Graphs(every_result, dynamic=True)
    for temperature, rows in ((1.0, 70), (0.5, 33), (0.25, 90)):
        z, codebook, _ = inputs(rows)
        tensors = (z, codebook, torch.tensor(temperature, device=DEVICE, requires_grad=True))
        compiled = with_gradients(graphs.run, *tensors, backend=backend)
        assert_same(compiled, with_gradients(every_result, *tensors, backend=backend))
    assert graphs.count == 1


def test_compiled_for_a_temperature_that_is_a_number():
    """From its second value on it is a symbol: there are two graphs, however many follow."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(softvq.soft_quantize, backend=counter, fullgraph=True)
    z, codebook, _ = inputs()
    for temperature in (1.0, 0.5, 0.25, 2.0):
        expected = softvq.soft_quantize(z, codebook, temperature)
        assert_same(compiled(z, codebook, temperature)[:1], expected[:1])
    assert counter.frame_count == 2


@pytest.mark.parametrize("backend", ["streaming", TRITON])
@pytest.mark.parametrize("options", [{"estimator": "straight_through"},
                                     {"detach_probabilities": True}], ids=str)  # fmt: skip
def test_compiled_estimators(backend, options):
    tensors = inputs()

    def quantized(*tensors):
        return softvq.soft_quantize(*tensors, backend=backend, **options).quantized

    torch._dynamo.reset()
    compiled = torch.compile(quantized, backend="aot_eager", fullgraph=True)
    grads = [torch.autograd.grad(f(*tensors).square().sum(), tensors, materialize_grads=True)
             for f in (compiled, quantized)]  # fmt: skip
    assert_same(*grads)
    assert_same([compiled(*tensors)], [quantized(*tensors)])


@pytest.mark.parametrize("backend", ["streaming", TRITON])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_lower_the_precision(backend, dtype):
    tensors = inputs()
    with torch.autocast(DEVICE, dtype):
        inside = with_gradients(every_result, *tensors, backend=backend)
    assert_same(inside, with_gradients(every_result, *tensors, backend=backend))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["streaming", "reference", TRITON])
def test_distances_of_half_precision_are_computed_in_float32(backend, dtype):
    z = (40 * torch.randn(30, 64, device=DEVICE)).to(dtype)
    codebook = torch.randn(10, 64, device=DEVICE).to(dtype)
    indices, distance = softvq.nearest_codes(z, codebook, backend=backend)
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance, (z.float() - codebook[indices]).square().sum(-1))


@pytest.mark.parametrize("backend", ["streaming", "reference", TRITON])
@pytest.mark.parametrize("operator", [lambda *x, **o: softvq.soft_quantize(*x, **o).quantized,
                                      softvq.code_usage], ids=["soft", "usage"])  # fmt: skip
@pytest.mark.parametrize("power", [1, 2])
def test_a_second_derivative_is_refused(backend, operator, power):
    """Also of a sum, whose incoming gradient depends on nothing."""
    tensors = inputs()
    loss = operator(*tensors, backend=backend).pow(power).sum()
    for gradient in torch.autograd.grad(loss, tensors, create_graph=True):
        with pytest.raises(RuntimeError, match="differentiated once, not twice"):
            gradient.sum().backward(retain_graph=True)


@pytest.mark.parametrize("operator", [lambda *x: softvq.soft_quantize(*x).quantized,
                                      softvq.code_usage], ids=["soft", "usage"])  # fmt: skip
def test_a_checkpoint_gives_what_was_saved_once(operator):
    tensors = inputs()
    wanted = torch.autograd.grad(operator(*tensors).square().sum(), tensors)
    loss = checkpoint(operator, *tensors, use_reentrant=False).square().sum()
    grads = torch.autograd.grad(loss, tensors, create_graph=True)
    assert_same(grads, wanted)
    with pytest.raises(RuntimeError, match="differentiated once, not twice"):
        grads[0].sum().backward()


def every_call(backend: str) -> list[tuple]:
    """Each registered operator and arguments for it, without and with what the forward saved."""
    z, codebook, row = (torch.randn(2, *shape, device=DEVICE) for shape in ((6, 5), (10, 5), (6,)))
    soft, how = (z, codebook, torch.tensor(0.7, device=DEVICE)), ("highest", backend)
    quantized, indices, _, _, row_state = operators.soft_forward(*soft, *how)
    saved = (quantized, indices, row_state) if backend == "triton" else (None,) * 3
    usage, some, every = torch.randn(2, 10, device=DEVICE), (True, True, False), (True,) * 3
    return [
        (operators.soft_forward, (*soft, *how)),
        (operators.soft_forward, (*soft, None, backend)),
        (operators.soft_backward, (*soft, z, row, None, usage, *some, *(None,) * 3, True, *how)),
        (operators.soft_backward, (*soft, z, row, row, None, *every, *saved, False, *how)),
        (operators.probability_sums, (*soft, None, None, *how)),
        (operators.probability_sums, (*soft, z, saved[2], *how)),
        (operators.nearest, (z, codebook, *how)),
    ]


@pytest.mark.parametrize("backend", ["streaming", "reference", TRITON])
@pytest.mark.parametrize("index", range(7))
def test_opcheck(backend, index):
    torch.library.opcheck(*every_call(backend)[index])


def test_opcheck_of_the_product():
    a, b = (torch.randn(2, *shape, device=DEVICE) for shape in ((6, 5), (5, 10)))
    torch.library.opcheck(float32_product, (a.requires_grad_(), b.requires_grad_()))


class NothingIsRead(TorchDispatchMode):
    """Refuses what would wait for a GPU: a value, or a shape that depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        assert not waits & set(func.tags), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@needs_triton
def test_the_fused_backend_never_reads_a_value():
    from softvq.kernels import fused

    calls = every_call("triton")
    with NothingIsRead():
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            torch.ones(()).item()
        for operator, (*arguments, precision, _) in calls:
            function = getattr(fused, operator.name().removeprefix("softvq::"))
            function(*arguments, precision or "highest")
