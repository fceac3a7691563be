"""How the temperature falls, and the critical temperature it starts from."""

import itertools
import math
from typing import get_args

import pytest
import torch

from softvq.schedules import CriticalTemperature, Schedule, annealed

FALLING = ("exponential", "cosine")


def test_every_schedule_is_tested():
    assert set(get_args(Schedule)) == {*FALLING, "constant", "learned"}


@pytest.mark.parametrize("schedule", FALLING)
def test_falls_from_start_to_end_and_stays(schedule):
    values = [annealed(schedule, i / 20, 8.0, 0.5) for i in range(21)]
    assert values[0] == 8.0 and values[-1] == pytest.approx(0.5)
    assert all(a > b for a, b in itertools.pairwise(values))
    assert annealed(schedule, 1.7, 8.0, 0.5) == values[-1]
    assert annealed(schedule, -0.3, 8.0, 0.5) == 8.0


def test_halfway():
    assert annealed("exponential", 0.5, 8.0, 0.5) == pytest.approx(math.sqrt(8.0 * 0.5))
    assert annealed("cosine", 0.5, 8.0, 0.5) == pytest.approx((8.0 + 0.5) / 2)


@pytest.mark.parametrize("schedule", ["constant", "learned"])
@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0, 2.0])
def test_others_stay_at_the_start(schedule, progress):
    assert annealed(schedule, progress, 8.0, 0.5) == 8.0


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match=r"schedule must be one of constant, .*; got 'linear'"):
        annealed("linear", 0.5, 8.0, 0.5)


def exact(z):
    return 2 * torch.linalg.eigvalsh(torch.cov(z.flatten(0, -2).double().T, correction=0))[-1]


def test_critical_temperature_is_zero_before_the_first_batch():
    assert CriticalTemperature(3).value() == 0


def test_critical_temperature_of_batches_is_that_of_their_union():
    scale = torch.tensor([0.1, 1.0, 3.0, 0.5])
    # Each batch around another mean: what lies between the batches counts too.
    batches = [torch.randn(8, 5, 4) * scale + 2 * torch.randn(4) + 50 for _ in range(6)]
    critical = CriticalTemperature(4)
    for number, batch in enumerate(batches, 1):
        critical.update(batch)
        wanted = exact(torch.stack(batches[:number]))
        torch.testing.assert_close(critical.value().double(), wanted, rtol=1e-4, atol=0)


def test_critical_temperature_is_exact_under_autocast():
    batch, critical = 4 * torch.randn(8192, 4), CriticalTemperature(4)
    with torch.autocast("cpu", torch.float16):
        critical.update(batch)
    torch.testing.assert_close(critical.value().double(), exact(batch), rtol=1e-4, atol=0)


def test_critical_temperature_follows_latents_that_drift():
    critical = CriticalTemperature(4, decay=0.8)
    for _ in range(50):
        critical.update(torch.randn(64, 4) * 5)
    still = torch.randn(512, 4) * 0.2 - 3
    for _ in range(100):
        critical.update(still)
    torch.testing.assert_close(critical.value().double(), exact(still), rtol=1e-3, atol=0)
    torch.testing.assert_close(critical.mean, still.mean(0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "bad", [torch.full((5, 4), torch.nan), torch.ones(0, 4)], ids=["nan", "no"]
)
def test_critical_temperature_leaves_out_a_batch_that_has_none(bad, first):
    critical, batch = CriticalTemperature(4), torch.randn(20, 4)
    for latents in (bad, batch) if first else (batch, bad):
        critical.update(latents)
    torch.testing.assert_close(critical.value().double(), exact(batch), rtol=1e-4, atol=0)
    assert critical.batches == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"dim": 4, "decay": 1.0}, "decay must be a number from 0 up, below 1, got 1.0"),
    ],
)
def test_critical_temperature_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        CriticalTemperature(**options)
