"""Annealing: the temperature of a SoftVQ, from start to end, by what its latents say."""

from itertools import pairwise

import pytest
import torch

from softvq.quantizers import Annealing, SoftVQ
from softvq.quantizers.annealing import FALLING, LOWEST, SPREAD, START

LATENTS = torch.randn(512, 4, generator=torch.Generator().manual_seed(1)) * torch.tensor(
    [3.0, 1.0, 1.0, 0.1]
)


def started(*schedule, **ends) -> tuple[Annealing, SoftVQ]:
    quantizer = SoftVQ(4, 32)
    annealing = Annealing(quantizer, *schedule, **ends)
    annealing.start(LATENTS)
    return annealing, quantizer


def critical() -> torch.Tensor:
    centred = LATENTS - LATENTS.mean(0)
    return 2 * torch.linalg.eigvalsh(centred.T @ centred / len(LATENTS))[-1]


@pytest.mark.parametrize(
    "options",
    [
        {"dim": 4},
        {"dim": 4, "use_cosine_sim": True},
        {"dim": 8, "heads": 2, "separate_codebook_per_head": True},
    ],
    ids=str,
)
def test_it_starts_just_under_the_critical_temperature_with_the_codes_at_the_mean(options):
    quantizer = SoftVQ(codebook_size=32, kmeans_init=True, **options)
    Annealing(quantizer).start(LATENTS)
    torch.testing.assert_close(quantizer.temperature, START * critical())
    distance = (quantizer._stored_codes - LATENTS.mean(0)).norm(dim=-1)
    assert 0 < distance.max() < 6 * SPREAD * (0.5 * critical()).sqrt()
    before = quantizer.codebook.clone()
    quantizer(torch.randn(64, quantizer.dim))  # no k-means moves them
    assert torch.equal(quantizer.codebook, before)


@pytest.mark.parametrize("latents", [torch.ones(9, 4), torch.full((9, 4), torch.nan), LATENTS[:1]])
def test_first_latents_that_have_no_temperature_move_nothing(latents):
    quantizer = SoftVQ(4, 32)
    annealing, codes = Annealing(quantizer), quantizer.codebook.clone()
    with pytest.raises(ValueError, match="latents must be finite and differ"):
        annealing.start(latents)
    assert torch.equal(quantizer.codebook, codes) and quantizer.temperature == 1
    annealing.start(LATENTS)
    assert quantizer.temperature.isfinite() and quantizer.temperature > 0


@pytest.mark.parametrize(
    "options", [{"heads": 2}, {"codebook_dim": 3}, {"channel_last": False}], ids=str
)
def test_latents_are_what_meets_the_codes(options):
    quantizer = SoftVQ(4, 32, **options)
    annealing = Annealing(quantizer)
    x = torch.randn(6, 4, 7) if options == {"channel_last": False} else torch.randn(6, 7, 4)
    with pytest.raises(ValueError, match=r"latents must be \(\.\.\., D\) with D = "):
        annealing.start(x[..., :1])
    annealing.start(quantizer.latents(x))
    out = quantizer.quantize(quantizer.latents(x))
    assert torch.equal(out.indices, quantizer(x)[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_it_stays_in_float32(dtype):
    quantizer = SoftVQ(4, 32)
    annealing = Annealing(quantizer)
    torch.nn.ModuleList([quantizer, annealing]).to(dtype)
    annealing.start(LATENTS.to(dtype))
    annealing.update(LATENTS.to(dtype), torch.tensor(0.1, dtype=dtype), 0.5)
    annealing.measure(0.5)
    floating = [x for x in annealing.state_dict().values() if x.is_floating_point()]
    assert floating and all(x.dtype == torch.float32 for x in floating)
    torch.testing.assert_close(annealing.critical_value, critical(), rtol=1e-2, atol=0)


def test_it_falls_to_twice_the_quantizing_error_and_stays():
    annealing, quantizer = started()
    error, values = torch.tensor(0.05), []
    for step in range(1, 1001):
        annealing.update(LATENTS, error, step / 1000)
        values.append(quantizer.temperature.item())
    assert all(a >= b for a, b in pairwise(values[10:]))
    assert values[-1] == pytest.approx(2 * 0.05, rel=0.01)
    assert values[int(1000 * FALLING)] == pytest.approx(values[-1], rel=0.05)


def test_codes_that_fit_exactly_do_not_bring_it_to_zero():
    annealing, quantizer = started()
    for _ in range(2000):
        annealing.update(LATENTS, torch.zeros(()), 1.0)
    torch.testing.assert_close(quantizer.temperature, LOWEST * START * critical())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_leaves_it_as_it_is(bad):
    annealing, quantizer = started()
    for _ in range(3):
        annealing.update(LATENTS, torch.tensor(0.05), 0.5)
    expected = quantizer.temperature.clone()
    annealing.update(torch.full_like(LATENTS, bad), torch.tensor(bad), 0.5)
    annealing.measure(0.5)
    torch.testing.assert_close(quantizer.temperature, expected, rtol=1e-3, atol=0)


def test_both_ends_can_be_given():
    annealing, quantizer = started(temperature=2.0, ratio=0.25)
    assert quantizer.temperature.item() == pytest.approx(2.0)
    annealing.update(LATENTS, torch.tensor(9.0), 1.0)
    assert quantizer.temperature.item() == pytest.approx(0.5)


def test_a_constant_one_stays_and_a_learned_one_is_left_alone():
    annealing, quantizer = started("constant", temperature=2.0)
    annealing.update(LATENTS, torch.tensor(9.0), 0.7)
    assert quantizer.temperature.item() == pytest.approx(2.0)
    annealing, quantizer = started("learned")
    quantizer.set_temperature(0.123)
    annealing.update(LATENTS, torch.tensor(9.0), 0.7)
    annealing.measure(0.7)
    assert quantizer.temperature.item() == pytest.approx(0.123)


def test_an_annealed_codebook_finds_the_clusters():
    """Where the default temperature, far above critical, leaves all codes at the mean."""
    centres = 0.3 * torch.randn(16, 4)
    quantizer = SoftVQ(4, 16)
    annealing = Annealing(quantizer)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.01)
    for step in range(600):
        latents = centres[torch.randint(16, (256,))] + 0.01 * torch.randn(256, 4)
        if step == 0:
            annealing.start(latents)
        quantized, _, loss = quantizer(latents)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress = (step + 1) / 600
        annealing.update(latents, (latents - quantized).square().mean(), progress)
        if step % 10 == 0:
            annealing.measure(progress)
    nearest = torch.cdist(centres, quantizer.codebook).min(1)
    assert nearest.values.max() < 0.05
    assert len(nearest.indices.unique()) == 16


def test_its_state_is_its_own():
    annealing, quantizer = started()
    assert not any("codebook" in name for name in annealing.state_dict())
    annealing.update(LATENTS, torch.tensor(0.05), 0.3)
    other = Annealing(quantizer)
    other.load_state_dict(annealing.state_dict())
    expected = quantizer.temperature.clone()
    other.measure(0.3)
    torch.testing.assert_close(quantizer.temperature, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "linear"}, "schedule must be one of constant, exponential.*'linear'"),
        ({"temperature": 0.0}, "temperature must be a number from 1e-20 to 1e.20, got 0"),
        ({"ratio": 2.0}, "ratio must be a number above 0, up to 1, got 2.0"),
    ],
    ids=str,
)
def test_bad_options_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Annealing(SoftVQ(4, 8), **arguments)
