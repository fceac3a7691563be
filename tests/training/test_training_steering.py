"""What steers a soft run: its annealing, now and then measured again, and its dead codes."""

import pytest
import torch

from softvq.models import LEVEL, TrainingStep
from softvq.quantizers import SoftVQ
from softvq.training.config import TrainConfig
from softvq.training.steering import (
    MEASURE_EVERY,
    RESTART_EVERY,
    RESTART_FROM,
    RESTART_UNTIL,
    SoftSteering,
)

LATENTS = torch.randn(512, 4, generator=torch.Generator().manual_seed(1)) * torch.tensor(
    [3.0, 1.0, 1.0, 0.1]
)


def steered(**settings) -> tuple[SoftSteering, SoftVQ]:
    quantizer = SoftVQ(4, 8)
    steering = SoftSteering(TrainConfig(codebook_size=8, **settings), quantizer)
    steering.annealing.start(LATENTS)
    return steering, quantizer


def step_of(latents: torch.Tensor) -> TrainingStep:
    """One whose latents all have the first code."""
    indices = torch.zeros(len(latents), dtype=torch.int64)
    return TrainingStep(
        {"quantizing_error": torch.tensor(0.05)}, {LEVEL: latents}, {LEVEL: indices}
    )


def test_the_settings_give_both_ends():
    steering, quantizer = steered(temperature="2.0", temperature_ratio="0.25")
    assert quantizer.temperature.item() == pytest.approx(2.0)
    steering.follow(step_of(LATENTS), 1.0)
    assert quantizer.temperature.item() == pytest.approx(0.5)


def test_the_critical_temperature_is_measured_again_as_the_latents_grow():
    steering, quantizer = steered(temperature_ratio="1")
    first, larger = quantizer.temperature.clone(), step_of(3 * LATENTS)
    for _ in range(500):
        steering.follow(larger, 0.1)
    steering.correct(larger, MEASURE_EVERY + 1, 0.1)
    torch.testing.assert_close(quantizer.temperature, first)
    steering.correct(larger, 2 * MEASURE_EVERY, 0.1)
    torch.testing.assert_close(quantizer.temperature, 9 * first, rtol=1e-3, atol=0)


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
