"""Batch norm over two ranks is that of the joint batch."""

import pytest
import torch
from torch import nn

from softvq.distributed.batch_norm import ReplicaBatchNorm, synchronise_batch_norms
from tests.distributed.worker import images_of_half_precision, network, normalised


def test_batch_norms_have_the_statistics_of_all_ranks(found):
    output, grads, statistics, evaluated = normalised(network(), slice(None), 1)
    for rank, results in enumerate(found):
        own_output, own_grads, own_statistics, own_evaluated = results["batch norm"]
        torch.testing.assert_close(own_output, output[4 * rank : 4 * rank + 4])
        torch.testing.assert_close(own_grads, grads)
        torch.testing.assert_close(own_statistics, statistics)
        torch.testing.assert_close(own_evaluated, evaluated)
    assert found[0]["batch norm"][2].keys() == network().state_dict().keys() - grads.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_of_half_precision(found, dtype):
    norm = nn.BatchNorm2d(3)
    wanted = norm(images_of_half_precision().float()).bfloat16()
    for rank, results in enumerate(found):
        output, variance = results["half precision", dtype]
        own = wanted[4 * rank : 4 * rank + 4]
        torch.testing.assert_close(output, own, rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(variance, norm.running_var.to(dtype))


def test_a_model_in_evaluation_stays_in_it():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)).eval()
    model[1].train()
    synchronise_batch_norms(model)
    assert [norm.training for norm in model] == [False, True]


def test_alone_a_replaced_batch_norm_is_the_one_it_replaces():
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.BatchNorm1d(4, eps=0.1, momentum=0.3)))
    other = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.BatchNorm1d(4, eps=0.1, momentum=0.3)))
    nn.init.normal_(model[1][0].weight)
    other.load_state_dict(model.state_dict())
    synchronise_batch_norms(other)
    assert isinstance(other[1][0], ReplicaBatchNorm)
    x = torch.randn(6, 3)
    assert torch.equal(model(x), other(x))
    assert torch.equal(model.eval()(x), other.eval()(x))
    for one, two in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert one[0] == two[0] and torch.equal(one[1], two[1])
