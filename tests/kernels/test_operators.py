"""The operators among the rest of PyTorch: compile, autocast, checkpoints, opcheck."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import softvq
from softvq.kernels import operators
from tests.kernels.results import (
    DEVICE,
    TRITON,
    Graphs,
    assert_same,
    every_result,
    inputs,
    needs_triton,
    with_gradients,
)


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
