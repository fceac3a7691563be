"""Metrics against values worked out by hand."""

import math

import pytest
import torch

from softvq import metrics


def test_codebook_usage_is_the_share_of_codes_seen():
    assert metrics.codebook_usage(torch.tensor([7, 0, 1, 0, 0])) == pytest.approx(2 / 5)
    assert metrics.codebook_usage(torch.tensor([[1, 1], [3, 0]])) == 0.75


def test_codebook_usage_of_a_share_compares_with_even_use():
    counts = torch.tensor([[10, 4, 1, 1, 0, 8], [1, 1, 1, 1, 1, 1]])  # even use: 4, and 1
    expected = {0: 11, 0.25: 11, 0.3: 9, 1: 9, 1.1: 2, 2: 2, 2.6: 0}
    for share, codes in expected.items():
        assert metrics.codebook_usage(counts, share) == codes / 12
    assert metrics.codebook_usage(torch.tensor([0, 1, 0, 0, 0]), 0.25) == 1 / 5


@pytest.mark.parametrize(
    ("counts", "value"),
    [
        ([5, 5, 5, 5], 4.0),
        ([9, 0, 0, 0], 1.0),
        ([3, 1], math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))),
        ([[5, 5], [8, 0]], 1.5),  # the mean over heads
    ],
)
def test_perplexity(counts, value):
    assert metrics.perplexity(torch.tensor(counts)) == pytest.approx(value)


def test_psnr():
    assert metrics.psnr(0.01) == pytest.approx(20)
    assert metrics.psnr(1.0) == 0
    assert metrics.psnr(0.0) == 200  # not infinite: JSON has no word for it


def test_mean_weighs_batches_by_their_size_and_starts_anew():
    mean = metrics.Mean()
    mean.add({"a": torch.tensor(1.0), "b": torch.tensor(2.0)}, 3)
    mean.add({"a": torch.tensor(5.0), "b": torch.tensor(2.0)}, 1)
    assert mean.read() == {"a": 2.0, "b": 2.0}
    assert mean.read() == {}
    mean.add({"a": torch.tensor(7.0)}, 2)
    assert mean.read() == {"a": 7.0}


def test_mean_keeps_no_graph_and_sums_in_double():
    mean = metrics.Mean()
    for _ in range(1000):
        mean.add({"a": torch.tensor(0.1, requires_grad=True)}, 1)
    assert not mean.state_dict()["sums"]["a"].requires_grad
    assert mean.read()["a"] == pytest.approx(torch.tensor(0.1).item(), abs=1e-15)


def test_mean_goes_on_from_a_saved_state():
    mean, other = metrics.Mean(), metrics.Mean()
    mean.add({"a": torch.tensor(1.0)}, 3)
    other.load_state_dict(mean.state_dict())
    other.add({"a": torch.tensor(5.0)}, 1)
    assert other.read() == {"a": 2.0}
