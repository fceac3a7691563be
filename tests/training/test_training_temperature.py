"""What steers a soft run: its temperature, from start to end, and the restart of dead codes."""

from itertools import pairwise

import pytest
import torch

from softvq.models import LEVEL, TrainingStep
from softvq.quantizers import SoftVQ
from softvq.training.config import TrainConfig
from softvq.training.steering import RESTART_EVERY, RESTART_FROM, RESTART_UNTIL, SoftSteering
from softvq.training.temperature import (
    FALLING,
    LOWEST,
    MEASURE_EVERY,
    SPREAD,
    START,
    Temperature,
)

LATENTS = torch.randn(512, 4, generator=torch.Generator().manual_seed(1)) * torch.tensor(
    [3.0, 1.0, 1.0, 0.1]
)


def started(**settings) -> tuple[Temperature, SoftVQ]:
    quantizer = SoftVQ(4, 32)
    temperature = Temperature(TrainConfig(**settings), quantizer)
    temperature.start(quantizer, LATENTS)
    return temperature, quantizer


def critical() -> torch.Tensor:
    centred = LATENTS - LATENTS.mean(0)
    return 2 * torch.linalg.eigvalsh(centred.T @ centred / len(LATENTS))[-1]


def test_it_starts_just_under_the_critical_temperature_with_the_codes_at_the_mean():
    _, quantizer = started()
    torch.testing.assert_close(quantizer.temperature, START * critical())
    distance = (quantizer.codebook - LATENTS.mean(0)).norm(dim=1)
    assert 0 < distance.max() < 6 * SPREAD * (0.5 * critical()).sqrt()


def test_it_falls_to_twice_the_quantizing_error_and_stays():
    temperature, quantizer = started()
    error, values = torch.tensor(0.05), []
    for step in range(1, 1001):
        temperature.update(quantizer, LATENTS, error, step / 1000)
        values.append(quantizer.temperature.item())
    assert all(a >= b for a, b in pairwise(values[10:]))
    assert values[-1] == pytest.approx(2 * 0.05, rel=0.01)
    assert values[int(1000 * FALLING)] == pytest.approx(values[-1], rel=0.05)


def test_codes_that_fit_exactly_do_not_bring_it_to_zero():
    temperature, quantizer = started()
    for _ in range(2000):
        temperature.update(quantizer, LATENTS, torch.zeros(()), 1.0)
    torch.testing.assert_close(quantizer.temperature, LOWEST * START * critical())


def test_both_ends_can_be_given():
    temperature, quantizer = started(temperature="2.0", temperature_ratio="0.25")
    assert quantizer.temperature.item() == pytest.approx(2.0)
    temperature.update(quantizer, LATENTS, torch.tensor(9.0), 1.0)
    assert quantizer.temperature.item() == pytest.approx(0.5)


def test_a_constant_one_stays_and_a_learned_one_is_left_alone():
    temperature, quantizer = started(temperature="2.0", temperature_schedule="constant")
    temperature.update(quantizer, LATENTS, torch.tensor(9.0), 0.7)
    assert quantizer.temperature.item() == pytest.approx(2.0)
    temperature, quantizer = started(temperature_schedule="learned", codebook_loss="likelihood")
    quantizer.set_temperature(0.123)
    temperature.update(quantizer, LATENTS, torch.tensor(9.0), 0.7)
    assert quantizer.temperature.item() == pytest.approx(0.123)


def steered(**settings) -> tuple[SoftSteering, SoftVQ]:
    quantizer = SoftVQ(4, 8)
    steering = SoftSteering(TrainConfig(codebook_size=8, **settings), quantizer)
    steering.temperature.start(quantizer, LATENTS)
    return steering, quantizer


def step_of(latents: torch.Tensor) -> TrainingStep:
    """One whose latents all have the first code."""
    indices = torch.zeros(len(latents), dtype=torch.int64)
    return TrainingStep(
        {"quantizing_error": torch.tensor(0.05)}, {LEVEL: latents}, {LEVEL: indices}
    )


def test_the_critical_temperature_is_measured_again_as_the_latents_grow():
    steering, quantizer = steered(temperature_ratio="1")
    larger = step_of(3 * LATENTS)
    for _ in range(500):
        steering.follow(larger, 0.1)
    steering.correct(larger, MEASURE_EVERY + 1, 0.1)
    torch.testing.assert_close(quantizer.temperature, START * critical())
    steering.correct(larger, 2 * MEASURE_EVERY, 0.1)
    torch.testing.assert_close(quantizer.temperature, START * 9 * critical(), rtol=1e-3, atol=0)


def test_dead_codes_move_now_and_then_in_the_middle_of_the_run():
    steering, quantizer = steered()
    seen = step_of(LATENTS)
    for _ in range(100):
        steering.follow(seen, 0.5)
    for step, progress, moves in (
        (RESTART_EVERY, RESTART_FROM - 0.01, False),
        (RESTART_EVERY, RESTART_UNTIL + 0.01, False),
        (RESTART_EVERY + 1, 0.5, False),
        (2 * RESTART_EVERY, 0.5, True),
    ):
        before = quantizer.codebook.detach().clone()
        steering.correct(seen, step, progress)
        moved = (quantizer.codebook != before).any(1)
        assert moved.tolist() == [False] + 7 * [moves]
