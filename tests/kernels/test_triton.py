"""The fused kernels against float64 truth: interpreted without a GPU, compiled on one.

The interpreter rounds 16-bit operands as a GPU does and multiplies float32 exactly: what tf32
splitting loses is seen on a GPU only.
"""

import itertools
from functools import partial

import pytest
import torch
from torch.nn.functional import normalize

pytest.importorskip("triton")

import softvq
from bench.bounds import (
    ALL,
    REDUCED_PRECISION,
    check,
    far_code,
    incoming_for,
    make,
    near_ties,
    reduced_errors,
    undecided,
)
from bench.truth import Errors, Problem, gradients, matmul_in
from softvq.kernels import code_sweep, fused, reference, tiles
from tests.kernels.choices import CHOICES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
draw = partial(make, device=DEVICE)
check_fused = partial(check, fused, draws=2)

SHAPES = [  # heads, rows, codes, D
    (1, 1, 1, 1),
    (2, 1, 130, 5),
    (1, 67, 1, 3),
    (2, 67, 67, 48),
    (1, 130, 130, 64),
    (1, 130, 67, 65),
    (1, 67, 130, 100),
]


@pytest.fixture(params=[1, 2], ids="parts={}".format)
def small_tiles(request, monkeypatch):
    """Several iterations of every loop, several programs along every axis."""
    tile = tiles.Tile(32, 32, 4, 1, parts=request.param)
    monkeypatch.setattr(tiles, "choose", lambda *_: tile)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("kind", "temperature"), [(undecided, 1e-3), (make, 1.0)])
def test_shapes_and_temperatures(shape, kind, temperature):
    check_fused(lambda: kind(*shape, temperature, device=DEVICE))


def test_small_tiles(small_tiles):
    check_fused(lambda: draw(2, 70, 70, 20))
    check_fused(lambda: draw(1, 70, 70, 20), torch.bfloat16, matmul=matmul_in(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 67, 67, 5), (1, 130, 130, 48)], ids=str)
@pytest.mark.parametrize("temperature", [0.1, 1.0, 100.0])
def test_16_bit_inputs(dtype, shape, temperature):
    check_fused(lambda: draw(*shape, temperature=temperature), dtype, matmul=matmul_in(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_latents_with_a_float32_codebook(dtype):
    def mixed() -> Problem:
        problem = draw(2, 67, 130, 20, temperature=0.5)
        return Problem(problem.z.to(dtype), problem.codebook, problem.temperature)

    check_fused(mixed, None, matmul=matmul_in(dtype))


WIDE = [  # latents, codebook, whose tiles: large ones, bfloat16 whole; small ones, all in parts; D
    (torch.bfloat16, torch.bfloat16, "hopper", 130),
    (torch.bfloat16, torch.float32, "hopper", 256),
    (torch.float16, torch.float16, "hopper", 200),
    (torch.float16, torch.float32, "hopper", 256),
    (torch.float32, torch.float32, "hopper", 130),
    (torch.float32, torch.float32, "hopper", 256),
    (torch.bfloat16, torch.bfloat16, "ampere", 256),
    (torch.bfloat16, torch.float32, "ampere", 130),
    (torch.float32, torch.float32, "ampere", 200),
]


@pytest.mark.parametrize(("latents", "codebook_dtype", "architecture", "dim"), WIDE, ids=str)
def test_wide_codes(monkeypatch, latents, codebook_dtype, architecture, dim):
    if DEVICE == "cuda" and architecture != tiles.architecture(torch.device(DEVICE)):
        pytest.skip("tiles of another card, which may not fit into this one's shared memory")
    monkeypatch.setattr(tiles, "architecture", lambda _: architecture)

    def wide() -> Problem:
        problem = draw(1, 67, 70, dim)
        z, codebook = problem.z.to(latents), problem.codebook.to(codebook_dtype)
        return Problem(z, codebook, problem.temperature * 20)

    check_fused(wide, None, matmul=matmul_in(latents))


@pytest.mark.parametrize("precision", REDUCED_PRECISION)
@pytest.mark.parametrize(("offset", "dim"), [(0.0, 48), (100.0, 48), (100.0, 200)])
def test_reduced_precision(precision, offset, dim):
    bounds = REDUCED_PRECISION[precision]
    for name, error in reduced_errors(fused, precision, offset, DEVICE, dim).items():
        bound = bounds["grad" if name.startswith("grad") else name]
        assert error < bound, f"{name}: {error:.2e}"


@pytest.mark.parametrize("offset", [10.0, 1e4])
def test_latents_far_from_zero(offset):
    check_fused(lambda: draw(1, 130, 67, 48, offset=offset))


def test_one_code_far_from_the_others():
    check_fused(lambda: far_code(1e3, DEVICE))


def test_near_ties():
    check_fused(lambda: Problem(*(x.to(DEVICE) for x in near_ties())))


COMBINATIONS = [c for n in range(1, 5) for c in itertools.combinations(ALL, n)]


@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_every_combination_of_incoming_gradients(names):
    check_fused(lambda: draw(2, 40, 48, 5, temperature=0.3), names=names)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
def test_only_needed_gradients_are_computed(needs):
    problem = draw(1, 20, 10, 4)
    incoming = [incoming_for(problem)[name] for name in ALL]
    every = fused.soft_backward(*problem, *incoming, True, True, True)
    some = fused.soft_backward(*problem, *incoming, *needs)
    for grad, expected, needed in zip(some, every, needs, strict=True):
        assert torch.equal(grad, expected) if needed else grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_lowest_index_wins_a_tie(dtype):
    codebook = torch.randn(1, 10, 20, device=DEVICE).to(dtype)
    codebook[:, 0] = 0
    z = codebook.clone()
    indices = fused.soft_forward(z, codebook.repeat(1, 20, 1), torch.ones((), device=DEVICE))[1]
    assert indices.tolist() == [list(range(10))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiny_temperature_is_the_nearest_code(dtype):
    problem = draw(1, 40, 130, 20, temperature=1e-7).to(dtype)
    quantized, indices, log_partition, entropy, _ = fused.soft_forward(*problem)
    distance = torch.cdist(problem.z.double(), problem.codebook.double())
    assert torch.equal(indices, distance.argmin(-1))
    torch.testing.assert_close(quantized[0], problem.codebook[0, indices[0]])
    expected = -distance.amin(-1).square() / problem.temperature
    torch.testing.assert_close(log_partition.double(), expected, rtol=1e-4, atol=0)
    assert entropy.abs().max() < 1e-5


@pytest.mark.parametrize("scale", [1e-9, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_of_any_size(dtype, scale):
    """Codes that only fill up a tile are far from all of them, and still finite over T."""

    def scaled() -> Problem:
        z, codebook, temperature = draw(1, 40, 30, 12)
        return Problem(z * scale, codebook * scale, temperature * scale**2)

    check_fused(scaled, dtype, **({} if dtype == torch.float32 else {"matmul": matmul_in(dtype)}))


def test_tiny_codes_and_a_huge_temperature():
    """Still no code that only fills up a tile has a share."""

    def flat() -> Problem:
        z, codebook, temperature = draw(1, 40, 30, 12)
        return Problem(z, codebook * 1e-7, temperature * 1e20)

    check_fused(flat)


def test_terms_of_the_codebook_gradient_larger_than_the_rows_say():
    """The first code's share is a half, and σ_n and its usage gradient are far from each other."""
    codes, others = 257, torch.tensor(256.0)
    codebook = normalize(torch.randn(1, codes, 8), dim=2) * others.log().sqrt()
    codebook[:, 0] = 0
    problem = Problem(0.01 * torch.randn(1, 40, 8), codebook, torch.ones(()))
    problem = Problem(*(x.to(DEVICE) for x in problem))
    usage = torch.ones(1, codes, device=DEVICE)
    usage[:, 0] = 0
    grads = fused.soft_backward(*problem, None, None, None, usage, True, True, True)
    truth = gradients(problem.to(torch.float64), {"usage": usage})
    for grad, expected in zip(grads, truth.values(), strict=True):
        largest = expected.abs().max().item()
        torch.testing.assert_close(grad.double(), expected, rtol=0, atol=1e-4 * largest)


def test_a_row_of_nan_spoils_no_other():
    problem = draw(1, 40, 30, 6)
    clean = fused.soft_forward(*problem)
    problem.z[:, 7] = torch.nan
    outputs = fused.soft_forward(*problem)
    others = torch.arange(40, device=DEVICE) != 7
    for output, expected in zip(outputs[:4], clean[:4], strict=True):
        assert torch.equal(output[:, others], expected[:, others])
    assert outputs[0][:, 7].isnan().all() and 0 <= outputs[1][0, 7] < 30


def test_views_and_expanded_gradients():
    base = draw(1, 60, 40, 12)
    z, codebook = base.z.mT.contiguous().mT, base.codebook.repeat(1, 2, 1)[:, ::2]
    rows = base.z.repeat(1, 2, 1)[:, ::2]
    grad = torch.ones((), device=DEVICE).expand(1, 60, 12)
    row = torch.ones((), device=DEVICE).expand(1, 60)
    for views in ((z, codebook, base.temperature), (rows, codebook, base.temperature)):
        plain = tuple(x.contiguous() for x in views)
        for a, b in zip(fused.soft_forward(*views), fused.soft_forward(*plain), strict=True):
            assert torch.equal(a, b)
        needs = (None, True, True, True)
        viewed = fused.soft_backward(*views, grad, row, row, *needs)
        expected = fused.soft_backward(*plain, grad.clone(), row.clone(), row.clone(), *needs)
        assert all(torch.equal(a, b) for a, b in zip(viewed, expected, strict=True))


def test_probability_sums_of_values():
    error = Errors()
    for _ in range(2):
        problem, values = draw(1, 130, 1000, 20, 100.0), torch.randn(1, 130, 20, device=DEVICE)
        sums = fused.probability_sums(*problem, values)
        plain, true = (
            reference.probability_sums(*(x.to(dtype) for x in (*problem, values)))
            for dtype in (torch.float32, torch.float64)
        )
        error.add(sums, plain, true)
    error.assert_no_worse(2, "Σ p·values")


def test_partial_sums_are_bounded():
    splits = partial(code_sweep._splits, programs=1, most=100, rows=10**6, together=8)
    assert splits(partial_bytes=2**10) == 8
    assert splits(partial_bytes=2**10, most=2) == 2
    assert splits(partial_bytes=2**21) == 4
    assert splits(partial_bytes=2**21, rows=10**4) == 8  # few rows need little else
    assert splits(partial_bytes=2**30) == 1
    assert splits(partial_bytes=2**10, programs=1000) == 1


def test_ranges_are_no_longer_than_they_may_be():
    splits = partial(code_sweep._splits, programs=1000, rows=10**6, together=8)
    assert splits(most=100, partial_bytes=2**10, least=30) == 30
    assert splits(most=20, partial_bytes=2**10, least=30) == 20
    assert splits(most=100, partial_bytes=2**20, least=30) == 8  # memory goes first


def test_programs_fill_the_processors():
    splits = partial(code_sweep._splits, most=100, partial_bytes=1, rows=1, together=264)
    assert splits(programs=8) == 32  # 256 programs, of 264 that run together
    assert splits(programs=8, most=10) == 10
    assert splits(programs=32) == 8  # of 288, 24 would run alone
    assert splits(programs=100) == 5  # two rounds of a fifth, not one of a half
    assert splits(programs=16, most=13, together=132) == 8  # not two rounds of a thirteenth
    assert splits(programs=2048) == 1


def test_every_tile_divides_the_padded_codebook():
    for tile in CHOICES.values():
        assert tiles.CODE_MULTIPLE % tile.codes == 0


@pytest.mark.parametrize("estimator", ["soft", "straight_through", "detached"])
def test_public_operator(estimator):
    z, codebook = torch.randn(4, 7, 2, 5, device=DEVICE), torch.randn(2, 10, 5, device=DEVICE)
    options = {"estimator": estimator}
    if estimator == "detached":
        options = {"detach_probabilities": True}
    results = []
    for backend in ("triton", "reference"):
        inputs = [z.clone().requires_grad_(), codebook.clone().requires_grad_()]
        temperature = torch.tensor(0.7, device=DEVICE, requires_grad=True)
        out = softvq.soft_quantize(*inputs, temperature, backend=backend, **options)
        loss = out.quantized.square().sum()
        if estimator != "detached":
            usage = softvq.code_usage(*inputs, temperature, backend=backend)
            loss = loss + out.log_partition.sum() + out.entropy.square().sum() + usage[0, 0]
        loss.backward()
        results.append((*out, *(x.grad for x in (*inputs, temperature))))
    for ours, expected in zip(*results, strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None:
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_no_rows():
    z = torch.zeros(0, 5, device=DEVICE, requires_grad=True)
    codebook = torch.randn(10, 5, device=DEVICE, requires_grad=True)
    temperature = torch.tensor(0.7, device=DEVICE, requires_grad=True)
    out = softvq.soft_quantize(z, codebook, temperature, backend="triton")
    assert out.quantized.shape == (0, 5) and out.indices.shape == (0,)
    (out.quantized.sum() + out.log_partition.sum() + out.entropy.sum()).backward()
    assert z.grad.shape == (0, 5)
    assert torch.equal(codebook.grad, torch.zeros_like(codebook)) and temperature.grad == 0
    usage, entropy = softvq.usage_and_entropy(z, codebook, temperature, backend="triton")
    assert usage.isnan().all() and entropy.shape == (0,)
    assert softvq.code_usage(z, codebook, temperature, backend="triton").isnan().all()


def test_what_the_kernels_do_not_take(monkeypatch):
    z, codebook = torch.randn(3, 300, device=DEVICE), torch.randn(4, 300, device=DEVICE)
    wide = softvq.soft_quantize(z, codebook, 1.0, backend="triton")
    assert torch.equal(
        wide.quantized, softvq.soft_quantize(z, codebook, 1.0, backend="streaming")[0]
    )
    with pytest.raises(ValueError, match="no float64"):
        softvq.soft_quantize(z.double(), codebook, 1.0, backend="triton")
    assert softvq.soft_quantize(z.double(), codebook, 1.0).quantized.dtype == torch.float64
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs CUDA tensors, got cpu"):
        softvq.soft_quantize(z.cpu(), codebook.cpu(), 1.0, backend="triton")
