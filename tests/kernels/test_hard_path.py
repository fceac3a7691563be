"""The fused nearest code and the sums of assigned rows, on a GPU or interpreted without one."""

import itertools

import pytest
import torch

from bench.bounds import nearest_excess
from bench.truth import Errors

pytest.importorskip("triton", reason="the fused kernels are written in Triton")

from softvq.kernels import streaming
from softvq.kernels.code_sums import CHUNK, code_sums
from softvq.kernels.nearest import nearest

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
]
UNIT = {torch.float32: 2**-24, torch.float16: 2**-11}  # relative rounding error


def draw(heads, rows, codes, dim, dtypes=DTYPES[0], offset=0.0):
    z = torch.randn(heads, rows, dim, device=DEVICE) + offset
    codebook = torch.randn(heads, codes, dim, device=DEVICE) + offset
    return z.to(dtypes[0]), codebook.to(dtypes[1])


def assert_nearest(z, codebook, indices, unit=UNIT[torch.float32], centred=True) -> None:
    """float32 arithmetic on centred inputs, or the exact products of 16-bit inputs."""
    assert indices.dtype == torch.int64 and indices.shape == z.shape[:2]
    assert indices.min() >= 0 and indices.max() < codebook.shape[1]
    for of_head in zip(z, codebook, indices, strict=True):
        assert nearest_excess(*of_head, unit, centred) <= 1


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 10.0, 1e4])
def test_dtypes_far_from_zero_too(dtypes, offset):
    for shape in [(1, 67, 130, 5), (3, 67, 67, 48), (2, 130, 130, 65)]:
        z, codebook = draw(*shape, dtypes, offset)
        centred = torch.float32 in dtypes
        assert_nearest(z, codebook, nearest(z, codebook), centred=centred)


@pytest.mark.parametrize(
    "shape", list(itertools.product([1, 3], [1, 67], [1, 130], [1, 3, 64, 130])), ids=str
)
def test_shapes(shape):
    z, codebook = draw(*shape)
    assert_nearest(z, codebook, nearest(z, codebook))


@pytest.mark.parametrize("codes", [127, 128, 129, 1000])
def test_a_codebook_that_ends_inside_a_tile(codes):
    z, codebook = draw(1, 130, codes, 256)
    assert_nearest(z, codebook, nearest(z, codebook))
    last = codebook[:, -1:].clone()
    assert nearest(last, codebook).item() == codes - 1


def test_precision():
    z, codebook = draw(1, 130, 300, 64)
    assert torch.equal(nearest(z, codebook, "high"), nearest(z, codebook, "highest"))
    assert_nearest(z, codebook, nearest(z, codebook, "medium"), unit=UNIT[torch.float16])


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e4, 1e12])
def test_the_scale_of_the_data_does_not_matter(scale):
    z, codebook = draw(1, 67, 130, 48)
    assert_nearest(z * scale, codebook * scale, nearest(z * scale, codebook * scale))


def test_rows_of_very_different_sizes_do_not_disturb_each_other():
    z, codebook = draw(1, 67, 130, 48)
    z *= torch.logspace(-6, 6, 67, device=DEVICE)[None, :, None]
    assert_nearest(z, codebook, nearest(z, codebook))


@pytest.mark.parametrize("dtypes", DTYPES[:2], ids=str)
def test_the_lowest_index_wins_a_tie(dtypes):
    """Small integers: every product and sum is exact, so equal codes have equal scores."""
    codes = torch.randint(-4, 5, (1, 40, 16), device=DEVICE).float()
    codes = torch.cat([codes, -codes], 1)  # their mean is zero
    z, codebook = codes.to(dtypes[0]), codes.repeat(1, 5, 1).to(dtypes[1])
    first = (codebook[:, None] == z[:, :, None]).all(3).float().argmax(2)
    assert torch.equal(nearest(z, codebook), first)


def test_near_ties():
    z, codebook = draw(1, 67, 64, 16)
    codebook = torch.cat([codebook, codebook * (1 + 1e-6)], 1)
    z = codebook[:, :64] + 1e-3
    assert_nearest(z, codebook, nearest(z, codebook))


def test_exact_hits():
    _, codebook = draw(2, 1, 300, 64)
    assert torch.equal(nearest(codebook, codebook), torch.arange(300, device=DEVICE).expand(2, 300))


def test_agrees_with_the_streaming_backend():
    z, codebook = draw(2, 300, 128, 8)
    assert torch.equal(nearest(z, codebook), streaming.nearest(z, codebook))


def test_views():
    z, codebook = draw(3, 67, 130, 20)
    expected = nearest(z, codebook)
    assert torch.equal(nearest(z.mT.contiguous().mT, codebook.mT.contiguous().mT), expected)
    heads_last = z.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(nearest(heads_last, codebook), expected)
    wide = torch.randn(3, 134, 40, device=DEVICE)
    wide[:, ::2, 10:30] = z
    assert torch.equal(nearest(wide[:, ::2, 10:30], codebook), expected)
    assert torch.equal(nearest(z, codebook[:1].expand(3, -1, -1))[0], expected[0])
    assert (nearest(z[:1, :1].expand(1, 67, 20), codebook[:1]) == expected[0, 0]).all()


def test_no_rows():
    z, codebook = draw(2, 0, 7, 5)
    assert nearest(z, codebook).shape == (2, 0)


def test_a_row_of_nan_gets_an_index_that_exists():
    z, codebook = draw(1, 67, 130, 16)
    expected = nearest(z, codebook)
    z[0, 5] = torch.nan
    z[0, 6, 3] = torch.inf
    indices = nearest(z, codebook)
    assert indices.min() >= 0 and indices.max() < 130
    others = [row for row in range(67) if row not in (5, 6)]
    assert torch.equal(indices[0, others], expected[0, others])


@pytest.mark.skipif(DEVICE == "cuda", reason="the real one runs below")
def test_offsets_of_64_bits(tmp_path):
    """A view into 2^31 elements and more, in a file with holes: only the rows in use exist."""
    z, codebook = draw(3, 5, 20, 16)
    stride = 2**30 + 16
    storage = torch.from_file(
        str(tmp_path / "holes"), shared=True, size=2 * stride + 80, dtype=torch.float16
    )
    far = storage.as_strided((3, 5, 16), (stride, 16, 1))
    far.copy_(z)
    assert torch.equal(nearest(far, codebook), nearest(far.contiguous(), codebook))


SUM_SHAPES = [
    *((1, 1, 1), (67, 70, 3), (130, 5, 65)),
    *((CHUNK, 1, 16), (3 * CHUNK + 1, 2, 16), (300, 7, 300)),
]


@pytest.mark.parametrize("shape", SUM_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_sums_and_counts(shape, dtype):
    rows, codes, dim = shape
    error = Errors()
    for _ in range(4):
        z = torch.randn(rows, dim, device=DEVICE).to(dtype)
        indices = torch.randint(0, codes, (rows,), device=DEVICE)
        sums, counts = code_sums(z, indices, codes)
        truth = z.new_zeros((codes, dim), dtype=torch.float64).index_add(0, indices, z.double())
        plain = sums.new_zeros((codes, dim)).index_add(0, indices, z.to(sums.dtype))
        error.add(sums, plain, truth)
        assert torch.equal(counts, torch.bincount(indices, minlength=codes).to(counts.dtype))
    assert sums.dtype == counts.dtype == torch.promote_types(dtype, torch.float32)
    error.assert_no_worse(2, "sums")


def test_one_code_that_takes_nearly_all_rows():
    z = torch.randn(5 * CHUNK, 8, device=DEVICE)
    indices = torch.full((5 * CHUNK,), 3, device=DEVICE)
    indices[::CHUNK] = 6
    sums, counts = code_sums(z, indices, 9)
    torch.testing.assert_close(sums[6], z[::CHUNK].sum(0))
    torch.testing.assert_close(sums[3] + sums[6], z.sum(0), rtol=1e-5, atol=1e-4)
    assert counts.tolist() == [0, 0, 0, 5 * CHUNK - 5, 0, 0, 5, 0, 0]
    assert (sums[counts == 0] == 0).all()


def test_sums_of_no_rows():
    sums, counts = code_sums(
        torch.zeros(0, 4, device=DEVICE), torch.zeros(0, dtype=torch.int64, device=DEVICE), 3
    )
    assert sums.shape == (3, 4) and not sums.any() and not counts.any()


def test_sums_of_views():
    z, indices = torch.randn(67, 20, device=DEVICE), torch.randint(0, 9, (67,), device=DEVICE)
    expected = code_sums(z, indices, 9)[0]
    assert torch.equal(code_sums(z.T.contiguous().T, indices, 9)[0], expected)
    assert torch.equal(code_sums(z.repeat(1, 2)[:, :20], indices, 9)[0], expected)
    wide = indices.repeat_interleave(2)
    assert torch.equal(code_sums(z, wide[::2], 9)[0], expected)
    row = code_sums(z[:1].expand(67, 20), indices, 9)[0]
    torch.testing.assert_close(row, torch.bincount(indices, minlength=9)[:, None] * z[:1])


def test_sums_repeat_the_same_bits():
    z = torch.randn(2000, 16, device=DEVICE)
    indices = torch.randint(0, 5, (2000,), device=DEVICE)
    first = code_sums(z, indices, 5)[0]
    assert all(torch.equal(code_sums(z, indices, 5)[0], first) for _ in range(3))


def test_sums_as_an_operator():
    """Schema, fake and gradient hold what PyTorch expects of an operator."""
    z = torch.randn(67, 20, device=DEVICE, requires_grad=True)
    indices = torch.randint(0, 9, (67,), device=DEVICE)
    torch.library.opcheck(code_sums, (z, indices, 9))
    weight = torch.randn(9, 20, device=DEVICE)
    (code_sums(z, indices, 9)[0] * weight).sum().backward()
    assert torch.equal(z.grad, weight[indices])
