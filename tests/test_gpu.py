"""The public operators on a GPU: streams, graphs, memory, devices. `python -m pytest -m gpu`."""

import pytest
import torch

import softvq
from softvq.kernels import operators

pytest.importorskip("triton", reason="the fused kernels are written in Triton")
pytestmark = pytest.mark.gpu
DEVICE = "cuda"


def step(z, codebook, temperature) -> tuple[torch.Tensor, ...]:
    """Everything public, forward and backward, the way a user calls it."""
    out = softvq.soft_quantize(z, codebook, temperature)
    both = softvq.usage_and_entropy(z, codebook, temperature)
    indices, distance = softvq.nearest_codes(z, codebook)
    sums, counts = softvq.code_sums(z, indices, len(codebook))
    losses = (out.quantized, out.log_partition, out.entropy, *both, distance, sums)
    loss = sum(x.float().square().mean() for x in losses)
    grads = torch.autograd.grad(loss, (z, codebook, temperature))
    return *out, *both, indices, counts, *grads


def inputs(rows=3000, codes=500, temperature=4.0, dtype=torch.bfloat16):
    z = torch.randn(rows, 64, device=DEVICE, dtype=dtype, requires_grad=True)
    codebook = torch.randn(codes, 64, device=DEVICE, requires_grad=True)
    return z, codebook, torch.tensor(temperature, device=DEVICE, requires_grad=True)


def assert_same(results, expected) -> None:
    for a, b in zip(results, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b.to(a.device))


def test_auto_is_the_fused_backend():
    tensors = inputs()
    for a, b in zip(softvq.soft_quantize(*tensors),
                    softvq.soft_quantize(*tensors, backend="triton"), strict=True):  # fmt: skip
        assert torch.equal(a, b)
    assert not torch.equal(
        softvq.soft_quantize(*tensors).entropy,
        softvq.soft_quantize(*tensors, backend="streaming").entropy,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graph(dtype):
    static = inputs(dtype=dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(*static)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*static)
    for temperature in (4.0, 1.0):
        new = inputs(temperature=temperature, dtype=dtype)
        with torch.no_grad():
            for old, x in zip(static, new, strict=True):
                old.copy_(x)
        graph.replay()
        assert_same(captured, step(*new))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compile(dynamic):
    """No graph break, and nothing compiled again for another temperature; with `dynamic` right
    for other rows too, compiled again or not."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    @torch.compile(fullgraph=True, dynamic=dynamic)
    def loss(z, codebook, temperature):
        out = softvq.soft_quantize(z, codebook, temperature)
        both = softvq.usage_and_entropy(z, codebook, temperature)
        _, distance = softvq.nearest_codes(z, codebook)
        sums, _ = softvq.code_sums(z, out.indices, len(codebook))
        parts = (out.quantized, out.log_partition, out.entropy, *both, distance, sums)
        return sum(x.float().square().mean() for x in parts)

    def check(rows: int, temperature: float) -> None:
        tensors = inputs(rows, temperature=temperature)
        grads = torch.autograd.grad(loss(*tensors), tensors)
        for ours, expected in zip(grads, step(*tensors)[-3:], strict=True):
            # Inductor fuses what surrounds the operators and rounds it elsewhere.
            scale = expected.abs().max()
            torch.testing.assert_close(ours / scale, expected / scale, rtol=0, atol=1e-2)

    for temperature in (4.0, 2.0, 1.0):
        check(3000, temperature)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    if dynamic:
        for rows in (1001, 5000):
            check(rows, temperature=2.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype):
    tensors = inputs(dtype=torch.float32)
    with torch.autocast("cuda", dtype):
        inside = step(*tensors)
    assert_same(inside, step(*tensors))


@pytest.mark.parametrize("dim", [64, 300])
def test_a_distance_moves_the_codes_alike_every_time(dim):
    """Also where its products stream."""
    torch.use_deterministic_algorithms(False)  # as users have it
    z = torch.randn(20_000, dim, device=DEVICE)
    codebook = torch.randn(50, dim, device=DEVICE, requires_grad=True)
    _, distance = softvq.nearest_codes(z, codebook)
    first, *others = (
        torch.autograd.grad(distance.sum(), codebook, retain_graph=True)[0] for _ in range(10)
    )
    assert all(torch.equal(grad, first) for grad in others)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
def test_the_device_of_the_inputs_not_the_current_one():
    tensors = inputs()
    moved = [x.detach().to("cuda:1").requires_grad_() for x in tensors]
    results = step(*moved)
    assert all(x.device.index == 1 for x in results)
    assert_same(step(*tensors), results)


@pytest.fixture
def no_waiting():
    """Afterwards any synchronisation with the host is an error."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def test_nothing_waits_for_the_device(no_waiting):
    tensors = inputs()
    step(*tensors)  # compiles
    no_waiting()
    step(*tensors)
    with pytest.raises(RuntimeError, match="synchroniz"):
        tensors[2].item()


def extra_memory(call) -> float:
    """Peak MB during a call, beyond what was there before and what it returned."""
    call()  # compiles
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = call()
    kept = sum(x.untyped_storage().nbytes() for x in results)
    return (torch.cuda.max_memory_allocated() - before - kept) / 1e6


def test_extra_memory_of_forward_and_backward():
    tensors = inputs(10**6, 1024)
    incoming = (torch.randn_like(tensors[0]), *torch.randn(2, 10**6, device=DEVICE))

    def forward_and_backward():
        out = softvq.soft_quantize(*tensors)
        outputs = (out.quantized, out.log_partition, out.entropy)
        return *out, *torch.autograd.grad(outputs, tensors, incoming)

    # 12 bytes a row, 8 MiB of partial sums, which keep every processor busy, and the codes.
    assert extra_memory(forward_and_backward) < 22


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extra_memory_of_nearest(dtype):
    z, codebook, _ = inputs(10**6, 8192, dtype=dtype)
    z, codebook = z.detach()[None], codebook.detach()[None].to(dtype)
    assert extra_memory(lambda: [operators.nearest(z, codebook, "highest", "triton")]) < 20
