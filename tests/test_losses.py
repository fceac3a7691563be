"""The losses against values worked out by hand or by torch.distributions."""

import math

import pytest
import torch
from torch.distributions import (
    Categorical,
    Independent,
    MixtureSameFamily,
    Normal,
    kl_divergence,
)

import softvq
from softvq import losses

DIM, CODES = 3, 5


def clusters():
    z = torch.randn(40, DIM, dtype=torch.float64)
    codebook = torch.randn(CODES, DIM, dtype=torch.float64, requires_grad=True)
    return z, codebook


def test_reconstruction_error_is_a_mean_over_elements():
    output, images = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.0]])
    assert losses.reconstruction_error(output, images).item() == (0.25 + 1) / 2
    assert losses.reconstruction_error(output, images, "absolute").item() == (0.5 + 1) / 2


def test_an_unknown_kind_of_difference_is_refused():
    with pytest.raises(ValueError, match="kind must be one of squared, absolute; got 'l1'"):
        losses.reconstruction_error(torch.zeros(2), torch.zeros(2), "l1")


def test_kl_is_summed_over_an_image_and_averaged_over_the_batch():
    mean = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    logvar = torch.tensor([[0.0, 0.0], [math.log(4), 0.0]])
    # Image 0: ½·2². Image 1: ½(4 − log 4 − 1).
    by_hand = (2 + 0.5 * (3 - math.log(4))) / 2
    assert losses.kl_divergence(mean, logvar).item() == pytest.approx(by_hand)


def test_kl_agrees_with_torch_distributions():
    mean, logvar = torch.randn(2, 4, 3, 3, DIM, dtype=torch.float64)
    posterior = Normal(mean, (0.5 * logvar).exp())
    wanted = kl_divergence(posterior, Normal(0.0, 1.0)).sum((1, 2, 3)).mean()
    torch.testing.assert_close(losses.kl_divergence(mean, logvar), wanted)


def test_quantizing_error_is_a_mean_with_a_finite_gradient_at_zero():
    z = torch.tensor([[1.0, 2.0]], requires_grad=True)
    assert losses.quantizing_error(z, torch.tensor([[0.0, 4.0]])).item() == (1 + 4) / 2
    losses.quantizing_error(z, z.detach()).backward()
    assert torch.equal(z.grad, torch.zeros(1, 2))


@pytest.mark.parametrize(
    "loss", [losses.reconstruction_error, losses.kl_divergence, losses.quantizing_error]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(loss, dtype):
    pair = torch.randn(2, 37, 5, DIM).to(dtype)
    torch.testing.assert_close(loss(*pair), loss(*pair.float()), rtol=1e-6, atol=0)


def test_free_energy_of_a_cold_codebook_is_the_squared_distance_per_element():
    z, codebook = clusters()
    temperature = torch.tensor(1e-4, dtype=torch.float64)
    log_partition = softvq.soft_quantize(z, codebook, temperature).log_partition
    _, squared_distance = softvq.nearest_codes(z, codebook)
    torch.testing.assert_close(
        losses.free_energy(log_partition, temperature, DIM),
        squared_distance.mean() / DIM,
        rtol=1e-3,
        atol=0,
    )


def test_free_energy_moves_the_codes_by_soft_k_means():
    z, codebook = clusters()
    temperature = torch.tensor(0.8, dtype=torch.float64)
    log_partition = softvq.soft_quantize(z, codebook, temperature).log_partition
    losses.free_energy(log_partition, temperature, DIM).backward()
    p = softvq.assignment_probabilities(z, codebook.detach(), temperature)
    means = p.T @ z / p.sum(0)[:, None]
    step = 2 * p.mean(0)[:, None] * (codebook.detach() - means) / DIM
    torch.testing.assert_close(codebook.grad, step)


def mixture_nll(z, codebook, temperature):
    log_partition = softvq.soft_quantize(z, codebook, temperature).log_partition
    return losses.mixture_negative_log_likelihood(log_partition, temperature, DIM, len(codebook))


@pytest.mark.parametrize("temperature", [0.05, 1.3])
def test_mixture_likelihood_agrees_with_torch_distributions(temperature):
    z, codebook = clusters()
    mixture = MixtureSameFamily(
        Categorical(logits=torch.zeros(CODES, dtype=torch.float64)),
        Independent(Normal(codebook, math.sqrt(temperature / 2)), 1),
    )
    nll = mixture_nll(z, codebook, torch.tensor(temperature, dtype=torch.float64))
    torch.testing.assert_close(nll, -mixture.log_prob(z).mean() / DIM)


def test_mixture_likelihood_is_stationary_where_T_matches_the_spread():
    z, codebook = clusters()
    temperature = torch.tensor(1.0, dtype=torch.float64)
    for _ in range(300):  # EM: T = 2·E_p‖z−c‖²/D
        p = softvq.assignment_probabilities(z, codebook.detach(), temperature)
        squared = torch.cdist(z, codebook.detach()).square()
        temperature = 2 * (p * squared).sum(1).mean() / DIM

    def slope(factor):
        t = (factor * temperature).detach().requires_grad_()
        return torch.autograd.grad(mixture_nll(z, codebook.detach(), t), t)[0].item()

    assert abs(slope(1.0)) < 1e-9
    assert slope(0.9) < -1e-3 and slope(1.1) > 1e-3
