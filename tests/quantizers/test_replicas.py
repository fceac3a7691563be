"""Two replicas of a data-parallel run hold the same codebook, that of the joint batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import softvq
from softvq.losses import entropy_regulariser
from softvq.quantizers import EMAVQ, VQ
from tests.quantizers.replica import (
    CASES,
    CODES,
    COUNTED,
    DIM,
    FIRST,
    ROWS,
    TRAINED,
    Net,
    batch,
    counted,
    run,
)

WORKER = Path(__file__).with_name("replica.py")
APART = {"apart": "means", "kmeans apart": "codebook_parameter"}
SYNCED = [case for case in CASES if case not in APART]


@pytest.fixture(scope="module")
def replicas(tmp_path_factory):
    """What both replicas ended with."""
    if not torch.distributed.is_available():
        pytest.skip("needs torch.distributed")
    folder = tmp_path_factory.mktemp("replicas")
    environment = os.environ | {"PYTHONPATH": str(WORKER.parents[2]), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", [*SYNCED, "annealed"])
def test_replicas_hold_the_same_bits(replicas, case):
    first, second = (results[case] for results in replicas)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("case", ["statistics", "heads"])
def test_they_are_those_of_the_joint_batch(replicas, case):
    joint = run(case, slice(0, ROWS), seed=0)
    for name, value in joint.items():
        torch.testing.assert_close(replicas[0][case][name], value, rtol=1e-5, atol=1e-6)


def test_codes_restart_at_latents_that_only_the_other_replica_has(replicas):
    codes, counts = replicas[0]["restart"]["means"][0], replicas[0]["restart"]["counts"][0]
    restarted, rows = codes[counts == 2 * 5.0], batch(2)[FIRST:]
    assert len(restarted) > 0
    assert all((rows == code).all(-1).any() for code in restarted)


@pytest.mark.parametrize(("case", "codes"), list(APART.items()))
def test_without_synchronisation_they_part(replicas, case, codes):
    first, second = (results[case][codes] for results in replicas)
    assert not torch.equal(first, second)


def losses_of_both(net, step):
    """What the losses of both replicas are, in one process."""
    weight, net.vq.entropy_weight = net.vq.entropy_weight, 0.0
    net.vq._learn = lambda *_: None
    latents, entropies, losses = [], [], []
    for rank in range(2):
        x, mask = counted(step, rank)
        latents.append(net.vq.project_in(net.linear(x[mask])))
        entropy = softvq.soft_quantize(latents[rank], net.vq.codebook, 1.0).entropy
        entropies.append(entropy.mean() if mask.any() else torch.zeros(()))
        torch.manual_seed(step)
        losses.append(net(x, mask) if mask.any() else torch.zeros(()))
    usage = softvq.code_usage(torch.cat(latents), net.vq.codebook, 1.0)
    usage_entropy = -(usage * usage.log()).sum()
    return [
        loss + weight * (entropy - usage_entropy)
        for loss, entropy in zip(losses, entropies, strict=True)
    ]


@pytest.mark.parametrize("case", TRAINED)
def test_losses_and_gradients_are_right_however_many_rows_each_masks(replicas, case):
    for step in range(len(COUNTED)):
        net = Net(case)
        net.load_state_dict(replicas[0][case][step][0])
        wanted = losses_of_both(net, step)
        (sum(wanted) / 2).backward()
        for rank in range(2):
            _, loss, grads = replicas[rank][case][step]
            torch.testing.assert_close(loss, wanted[rank].detach())
            for name, parameter in net.named_parameters():
                torch.testing.assert_close(grads[name], parameter.grad, msg=name)


def test_without_rows_the_regulariser_is_that_of_the_other_replicas_usage(replicas):
    torch.manual_seed(0)
    codebook, (x, mask) = VQ(DIM, CODES).codebook, counted(1, 0)
    assert COUNTED[1][1] == 0
    usage, entropy = softvq.usage_and_entropy(x[mask], codebook, 1.0)
    usage_entropy = -(usage * usage.log()).sum()
    wanted = (entropy.mean() - usage_entropy, -usage_entropy)
    for results, value in zip(replicas, wanted, strict=True):
        torch.testing.assert_close(results["regulariser"], value.detach())


def test_one_replica_evaluates_alone(replicas):
    torch.manual_seed(0)
    codebook, rows = VQ(DIM, CODES).codebook, batch(0)
    usage, entropy = softvq.usage_and_entropy(rows, codebook, 1.0)
    alone = softvq.code_usage(rows[:FIRST], codebook, 1.0)
    (evaluated, first), (second,) = (results["evaluated by one"] for results in replicas)
    for value, part, mean in (
        (evaluated, entropy[:FIRST], alone),
        (first, entropy[:FIRST], usage),
        (second, entropy[FIRST:], usage),
    ):
        torch.testing.assert_close(value, entropy_regulariser(part, mean).detach())


def test_shares_are_counted_over_both(replicas):
    for results in replicas:
        wanted = torch.zeros(CODES)
        wanted[:2] = torch.tensor([0.25, 0.75])
        assert torch.equal(results["shares"]["counted"], wanted)
    first, second = (results["shares"]["codebook"] for results in replicas)
    assert torch.equal(first, second) and len(first.unique(dim=0)) == CODES - 1


def test_synchronisation_without_a_process_group_is_an_error():
    with pytest.raises(ValueError, match="sync_codebook=True needs an initialised"):
        EMAVQ(3, 4, sync_codebook=True)(torch.randn(5, 3))
