"""What only a GPU can show of the kernels: the same bits every time, large and huge problems.

`python -m pytest -m gpu` runs what needs a GPU, here and in the other files. Most of its time goes
into compiling some 470 kernels, by one process: with pytest-xdist, `-n 9` shares them out.
Where there is a GPU, the other tests of the kernels compile them too, instead of interpreting them.
"""

import math
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton", reason="the fused kernels are written in Triton")

from bench.bounds import ALL, make, nearest_excess
from bench.truth import Errors, Problem, forward, gradients, matmul_in
from softvq.kernels import fused, streaming, tuning
from softvq.kernels.code_sums import code_sums
from softvq.kernels.products import float32_products

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
]
# 16-bit latents are multiplied as they are, whatever the precision.
ARITHMETICS = [
    (*dtypes, precision)
    for dtypes in DTYPES
    for precision in ("highest", "high", "medium")
    if dtypes[0] == torch.float32 or precision == "highest"
]


def draw(heads, rows, codes, dim, z_dtype=torch.float32, codebook_dtype=torch.float32) -> Problem:
    problem = make(heads, rows, codes, dim, temperature=dim / 8, device=DEVICE)
    z, codebook = problem.z.to(z_dtype), problem.codebook.to(codebook_dtype)
    return Problem(z, codebook, problem.temperature)


def incoming_of(problem: Problem) -> dict[str, torch.Tensor]:
    """Random gradients for every output."""
    (heads, rows, _), codes = problem.z.shape, problem.codebook.shape[1]
    row, usage = (
        torch.randn(2, heads, rows, device=DEVICE),
        torch.randn(heads, codes, device=DEVICE),
    )
    return dict(zip(ALL, (torch.randn_like(problem.z), *row, usage), strict=True))


def run(problem: Problem, incoming, precision="highest", backend=fused) -> dict[str, torch.Tensor]:
    """Outputs and gradients of the backend, by name."""
    with float32_products(precision, torch.device(DEVICE)):
        quantized, indices, *row, state = backend.soft_forward(*problem, precision)
        sums = backend.probability_sums(*problem, None, None, precision)
        grads = backend.soft_backward(
            *problem,
            *(incoming.get(name) for name in ALL),
            *(True, True, True, quantized, indices, state),
            precision=precision,
        )
    usage = sums[..., 0] / problem.z.shape[1]
    outputs = dict(zip(ALL, (quantized, *row, usage), strict=True))
    names = ("grad z", "grad codebook", "grad temperature")
    return outputs | {"indices": indices} | dict(zip(names, grads, strict=True))


def in_blocks(problem: Problem, incoming, matmul=torch.matmul) -> dict[str, torch.Tensor]:
    """The same from plain PyTorch in the problem's dtype, in blocks of rows of bounded memory."""
    rows, blocks = problem.z.shape[1], []
    step = 2**26 // problem.codebook.shape[1]
    for start in range(0, rows, step):
        block = slice(start, start + step)
        part = Problem(problem.z[:, block], *problem[1:]).to(problem.z.dtype)
        share = part.z.shape[1] / rows
        given = {name: x * share if name == "usage" else x[:, block]
                 for name, x in incoming.items()}  # fmt: skip
        result = {name: x.detach() for name, x in forward(part, matmul).items()}
        result["usage"] *= share
        grads = gradients(part, given, matmul)
        blocks.append(result | {f"grad {name}": grad for name, grad in grads.items()})
    added = ("usage", "grad codebook", "grad temperature")
    return {
        name: sum(x) if name in added else torch.cat(x, 1)
        for name in blocks[0]
        for x in [[block[name] for block in blocks]]
    }


@pytest.mark.parametrize("dim", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("arithmetic", ARITHMETICS, ids=str)
def test_the_same_bits_every_time(arithmetic, dim):
    torch.use_deterministic_algorithms(False)  # as users have it
    *dtypes, precision = arithmetic
    problem = draw(2, 5000, 1000, dim, *dtypes)
    incoming = incoming_of(problem)
    first = run(problem, incoming, precision)
    nearest = fused.nearest(*problem[:2], precision)
    for _ in range(10):
        for name, x in run(problem, incoming, precision).items():
            assert torch.equal(x, first[name]), name
        assert torch.equal(fused.nearest(*problem[:2], precision), nearest)


@pytest.mark.parametrize("dim", [1, 16, 64, 256, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_same_sums_every_time(dtype, dim):
    torch.use_deterministic_algorithms(False)  # as users have it
    z = torch.randn(50_000, dim, device=DEVICE).to(dtype)
    indices = torch.randint(0, 100, (50_000,), device=DEVICE) ** 2 // 100  # uneven
    first = code_sums(z, indices, 100)
    for _ in range(10):
        assert all(
            torch.equal(a, b) for a, b in zip(code_sums(z, indices, 100), first, strict=True)
        )


@pytest.mark.parametrize("codes", [1000, 8192])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_large_problems_against_float64(dtypes, dim, codes):
    """Outputs within 2×, gradients and usage within 3× the error of plain float32 PyTorch."""
    assert_near_float64(lambda: draw(1, 70_001, codes, dim, *dtypes))


@pytest.mark.parametrize("dim", [300, 512])
@pytest.mark.parametrize("dtypes", [d for d in DTYPES if d[0].itemsize == 2], ids=str)
def test_codes_too_wide_to_be_fused(dtypes, dim):
    """They stream; the bounds are those of the fused kernels, and the bits the same every time."""
    torch.use_deterministic_algorithms(False)  # as users have it
    how = {"precision": "high", "backend": streaming}
    assert_near_float64(lambda: draw(1, 20_001, 1000, dim, *dtypes), **how)
    problem = draw(1, 20_001, 1000, dim, *dtypes)
    incoming = incoming_of(problem)
    first = run(problem, incoming, **how)
    for name, x in run(problem, incoming, **how).items():
        assert torch.equal(x, first[name]), name


def assert_near_float64(draw_problem: Callable[[], Problem], **how) -> None:
    """Over four draws: the temperature's gradient is one number, and exact by luck in some."""
    errors: dict[str, Errors] = {}
    for _ in range(4):
        problem = draw_problem()
        incoming = incoming_of(problem)
        ours = run(problem, incoming, **how)
        dtype = problem.z.dtype
        matmul = torch.matmul if dtype == torch.float32 else matmul_in(dtype)
        plain = in_blocks(problem.to(torch.float32), incoming, matmul)
        for name, truth in in_blocks(problem.to(torch.float64), incoming).items():
            error = errors.setdefault(name, Errors(floor=1.0 if name == "entropy" else 0.0))
            error.add(ours[name], plain[name], truth)
    for name, error in errors.items():
        # What a matrix unit cuts off does not cancel over rows, as what is rounded does.
        over_rows = name.startswith("grad") or name == "usage"
        error.assert_no_worse(3 if over_rows else 2, name)


def test_usage_that_hardly_differs_from_row_to_row():
    """A million nearly equal numbers, which all round the same way where they are added in turn."""
    problem = draw(1, 2**20, 1000, 16, torch.bfloat16, torch.bfloat16)
    problem = problem._replace(temperature=torch.tensor(1e3, device=DEVICE))
    usage = fused.probability_sums(*problem, None)[..., 0] / 2**20
    blocks = [problem._replace(z=z) for z in problem.z.split(2**16, 1)]
    with torch.no_grad():
        plain, truth = (
            sum(forward(block.to(dtype))["usage"] for block in blocks) / len(blocks)
            for dtype in (torch.float32, torch.float64)
        )
    error = Errors()
    error.add(usage, plain, truth)
    error.assert_no_worse(3, "usage")


@pytest.mark.parametrize("codes", [1000, 8192])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_nearest_of_large_problems(dtypes, dim, codes):
    """No code is closer than the chosen one by more than the rounding of a product z·c."""
    z, codebook, _ = draw(1, 70_001, codes, dim, *dtypes)
    assert nearest_excess(z[0], codebook[0], fused.nearest(z, codebook)[0]) <= 1


def test_sums_of_many_rows():
    z, indices = (
        torch.randn(10**6, 64, device=DEVICE),
        torch.randint(0, 50, (10**6,), device=DEVICE),
    )
    sums, counts = code_sums(z, indices, 50)
    error = Errors()
    truth = z.new_zeros(50, 64, dtype=torch.float64).index_add(0, indices, z.double())
    error.add(sums, z.new_zeros(50, 64).index_add(0, indices, z), truth)
    error.assert_no_worse(2, "sums")
    assert torch.equal(counts.long(), torch.bincount(indices, minlength=50))


@pytest.mark.parametrize("dim", [64, 256])
def test_more_than_2_31_elements(dim):
    """The last rows of a huge problem, whose other rows are zero, give what they give alone."""
    rows, tail = 2**31 // dim + 1000, 2000
    if torch.cuda.mem_get_info()[0] < 26e9:
        pytest.skip("needs 26 GB of free GPU memory")
    few = draw(1, tail, 128, dim, torch.bfloat16, torch.bfloat16)
    alone = incoming_of(few)
    del alone["usage"]

    def at_the_end(x):
        padded = x.new_zeros((1, rows, *x.shape[2:]))
        padded[:, -tail:] = x
        return padded

    many = Problem(at_the_end(few.z), *few[1:])
    outputs = run(many, {name: at_the_end(x) for name, x in alone.items()})
    expected = run(few, alone)
    for name in ("quantized", "log_partition", "entropy", "indices", "grad z"):
        assert torch.equal(outputs[name][:, -tail:], expected[name]), name
    # Zero gradients arrive at the other rows.
    torch.testing.assert_close(outputs["grad codebook"], expected["grad codebook"])
    assert torch.equal(fused.nearest(many.z, many.codebook)[:, -tail:], fused.nearest(*few[:2]))
    sums, counts = code_sums(many.z[0], outputs["indices"][0], 128)
    torch.testing.assert_close(sums, code_sums(few.z[0], expected["indices"][0], 128)[0])
    # Above 2²⁴ a count in float32 goes in steps of two.
    assert abs(counts.double().sum() - rows) <= 2


@pytest.fixture
def autotune(monkeypatch, tmp_path):
    """As with SOFTVQ_AUTOTUNE=1 in a new process that finds nothing on disk."""
    monkeypatch.setenv("SOFTVQ_AUTOTUNE", "1")
    monkeypatch.setenv("SOFTVQ_CACHE", str(tmp_path))
    tuning._on.cache_clear()
    tuning._cache.cache_clear()
    yield tmp_path / "softvq" / "tiles.json"
    tuning._on.cache_clear()
    tuning._cache.cache_clear()


@pytest.mark.parametrize("wins", ["fastest", "slowest"])
@pytest.mark.parametrize("dtypes", DTYPES[:2], ids=str)  # each compiles some forty kernels
def test_tuned_tiles_against_float64(autotune, monkeypatch, dtypes, wins):
    """As exact as the shipped ones, the same bits every time, and timed only once."""
    milliseconds, timed = tuning.milliseconds, []

    def watched(*args):
        timed.append(milliseconds(*args))
        slow = wins == "slowest" and math.isfinite(timed[-1])
        return 1 / timed[-1] if slow else timed[-1]

    monkeypatch.setattr(tuning, "milliseconds", watched)
    assert_near_float64(lambda: draw(1, 20_001, 1000, 64, *dtypes))
    problem = draw(1, 20_001, 1000, 64, *dtypes)
    incoming = incoming_of(problem)
    first = run(problem, incoming)
    assert math.isfinite(min(timed)) and autotune.exists()
    count = len(timed)
    tuning._cache.cache_clear()  # another process, which reads the file
    for _ in range(3):
        for name, x in run(problem, incoming).items():
            assert torch.equal(x, first[name]), name
    assert len(timed) == count


def test_a_capture_is_not_timed(autotune, monkeypatch):
    def refuse(*args):
        raise AssertionError("timed in a capture")

    problem = draw(1, 5000, 1000, 64, torch.bfloat16)
    incoming = incoming_of(problem)
    with monkeypatch.context() as untuned:
        untuned.setattr(tuning, "applies", lambda device: False)
        expected = run(problem, incoming)  # compiles the shipped tiles
    monkeypatch.setattr(tuning, "milliseconds", refuse)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(problem, incoming)
    graph.replay()
    assert not autotune.exists()
    for name, x in captured.items():
        assert torch.equal(x, expected[name]), name
