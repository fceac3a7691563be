"""A codebook split over two ranks is the whole one."""

import pytest
import torch

from softvq import nearest_codes
from softvq.distributed import split_soft_quantize
from tests.distributed.worker import DTYPES, SCALES, SIZES, close_codes, problem, whole

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_split_codebook_is_the_whole_one(found, dtype, scale):
    indices, *outputs, z_grad, codebook_grad, temperature_grad = whole(dtype, scale)
    start, codebook = 0, problem(dtype, scale)[1]
    for results, size in zip(found, SIZES, strict=True):
        split_indices, *others = results[dtype, scale]
        wanted = [*outputs, z_grad, codebook_grad[start : start + size], temperature_grad]
        assert torch.equal(codebook[split_indices], codebook[indices])
        for one, other in zip(others, wanted, strict=True):
            assert one.dtype == other.dtype
            size_of_it = other.abs().max().item()
            torch.testing.assert_close(
                one, other, rtol=0, atol=TOLERANCE[dtype] * max(1.0, size_of_it)
            )
        start += size


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_lowest_index_wins_a_tie(found, dtype):
    z, codebook, _ = problem(dtype)
    assert torch.equal(codebook[2], codebook[9]) and torch.equal(z[0, 0], codebook[9])
    assert found[0][dtype, 1.0][0][0, 0] == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_ranks_have_the_same_bits(found, dtype):
    one, other = (results[dtype, 1.0] for results in found)
    for number in (0, 1, 2, 3, 4, 6):  # all but the gradient of the own codes
        assert torch.equal(one[number], other[number])


def test_parts_compare_distances_of_half_precision_in_float32(found):
    wanted, _ = nearest_codes(*close_codes())
    for results in found:
        assert (results["close codes"] == wanted).all()


def test_a_group_is_asked_and_nobody_else(found):
    for results, scale in zip(found, SCALES, strict=True):
        for one, other in zip(results["own group"], whole(torch.float64, scale), strict=True):
            torch.testing.assert_close(one, other)


def test_heads_are_refused():
    with pytest.raises(ValueError, match=r"codebook_shard must be \(K, D\)"):
        split_soft_quantize(torch.randn(5, 2, 3), torch.randn(2, 4, 3), 1.0)
