"""Sums and means over two ranks, with the gradients that data-parallel training needs."""

import torch

from softvq.distributed.collectives import mean_over_replicas, sum_over_replicas


def test_sums_means_and_their_gradients(found):
    for results in found:
        total, mean, grad = results["collectives"]
        assert total.tolist() == [1, 14]
        assert mean.tolist() == [1.0, 2.5]
        # The mean of the losses is 1.5 Σ mean²; the ranks average their gradients.
        assert (grad / 2).tolist() == [0.5 * 1.5 * 2 * 1.0, 0.5 * 1.5 * 2 * 2.5]


def test_alone_they_are_what_they_are():
    x = torch.randn(3)
    assert sum_over_replicas(x) is x and mean_over_replicas(x) is x
