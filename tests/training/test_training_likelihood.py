"""Bits per dimension against distributions whose entropy is known."""

import math

import pytest
import torch

from softvq.training.likelihood import (
    SCALES,
    bits_per_dimension,
    discretised_logistic_log_likelihood,
    fit_scales,
    logistic_log_probability,
    order0_bits_per_latent,
)

VALUES = torch.arange(256, dtype=torch.uint8)


def probabilities(mean, scale):
    """p(v) of all 256 values, (256,) float64."""
    mean = torch.tensor(mean, dtype=torch.float64)
    return logistic_log_probability(mean, VALUES, torch.tensor(scale, dtype=torch.float64)).exp()


@pytest.mark.parametrize("mean", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("scale", [2**-12, 0.01, 1.0, 100.0])
def test_probabilities_of_all_values_sum_to_one(mean, scale):
    assert probabilities(mean, scale).sum().item() == pytest.approx(1, abs=1e-12)


def test_probability_is_the_difference_of_two_logistics():
    lower, upper = (math.exp(x) / (1 + math.exp(x)) for x in (-0.5 / 25.5, 0.5 / 25.5))
    assert probabilities(100 / 255, 0.1)[100].item() == pytest.approx(upper - lower)
    first = 1 / (1 + math.exp((100 - 0.5) / 25.5))  # all mass below a half
    assert probabilities(100 / 255, 0.1)[0].item() == pytest.approx(first)


def test_log_probability_is_finite_where_the_probability_is_not_above_zero():
    far = logistic_log_probability(torch.tensor(0.0), VALUES, torch.tensor(SCALES[0]))
    assert far.isfinite().all()
    # e^(−(v − ½)/255s): the tail falls by the same factor from value to value.
    steps = far.double()[2:254].diff()
    torch.testing.assert_close(
        steps, torch.full_like(steps, -1 / (255 * SCALES[0])), rtol=1e-3, atol=0
    )


def drawn(output, scales, count):
    """Images (count, C, H, W) from the very model, by its inverse distribution function."""
    uniform = torch.rand(count, *output.shape, dtype=torch.float64)
    values = output + scales * torch.logit(uniform)
    return (values * 255).round().clamp(0, 255).to(torch.uint8)


def test_bits_of_images_from_a_known_logistic_are_its_entropy():
    count = 3000
    output = torch.tensor([0.0, 0.02, 0.5, 0.9], dtype=torch.float64).view(1, 2, 2)
    true = torch.tensor([SCALES[20], SCALES[40], SCALES[30], SCALES[55]]).double().view(1, 2, 2)
    images = drawn(output, true, count)
    repeated = output.expand(count, 1, 2, 2)
    batches = zip(repeated.split(1000), images.split(1000), strict=True)
    scales = fit_scales(batches)
    assert ((scales / true).log().abs() < 0.2).all()  # at most one place of the list away

    entropy = sum(
        torch.special.entr(probabilities(m.item(), s.item())).sum().item()
        for m, s in zip(output.flatten(), true.flatten(), strict=True)
    ) / (4 * math.log(2))
    log_likelihood = discretised_logistic_log_likelihood(repeated, images, scales)
    assert log_likelihood.shape == (count,)
    bits = bits_per_dimension(log_likelihood, 4)
    assert bits.mean().item() == pytest.approx(entropy, abs=4 * bits.std().item() / count**0.5)


def test_scales_do_not_depend_on_the_batches():
    output, images = torch.rand(12, 2, 3, 3), torch.randint(256, (12, 2, 3, 3), dtype=torch.uint8)
    whole = fit_scales([(output, images)])
    assert whole.shape == (2, 3, 3) and len(whole.unique()) > 3
    assert torch.equal(whole, fit_scales(zip(output.split(5), images.split(5), strict=True)))


def test_uniform_pixels_cost_eight_bits_and_what_the_logistic_cannot_say():
    images = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1)
    output = torch.full((256, 1, 1, 1), 0.5)
    scales = fit_scales([(output, images)])
    bits = bits_per_dimension(discretised_logistic_log_likelihood(output, images, scales), 1)
    assert 8 < bits.mean() < 8.3


def test_black_images_cost_next_to_nothing():
    images = torch.zeros(10, 1, 2, 2, dtype=torch.uint8)
    output = torch.zeros(10, 1, 2, 2)
    bits = discretised_logistic_log_likelihood(output, images, fit_scales([(output, images)]))
    assert (bits.abs() < 0.01).all()


def test_order0_by_hand():
    train, test = torch.tensor([[[0, 1], [1, 1]]]), torch.tensor([[[1, 0], [2, 1]]])
    # Counts 1, 3, 0 and one more of each: 2/7, 4/7, 1/7.
    expected = -(2 * math.log2(4 / 7) + math.log2(2 / 7) + math.log2(1 / 7)) / 4
    assert order0_bits_per_latent(train, test, 3) == pytest.approx(expected)


def test_order0_of_a_known_distribution_reaches_its_entropy():
    odds = torch.tensor([0.5, 0.25, 0.125, 0.125])  # 1.75 bits
    codes = odds.multinomial(40_000, replacement=True).view(-1, 2, 5)
    bits = order0_bits_per_latent(codes[:2000], codes[2000:], 4)
    assert bits == pytest.approx(1.75, abs=0.02)
