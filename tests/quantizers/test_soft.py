"""SoftVQ: its call, its layouts, and where its gradients go."""

from typing import get_args

import pytest
import torch

import softvq
from softvq.quantizers import SoftVQ
from softvq.quantizers.soft import CodebookLoss

DIM, CODES = 6, 10
LOSSES = get_args(CodebookLoss)


def layer(**options):
    return SoftVQ(**{"dim": DIM, "codebook_size": CODES, "temperature": 2.0} | options)


def test_one_head_is_the_operator():
    vq, x = layer(), torch.randn(2, 7, DIM)
    out = softvq.soft_quantize(x, vq.codebook, 2.0)
    quantized, indices, loss, breakdown = vq(x, return_loss_breakdown=True)
    torch.testing.assert_close(quantized, out.quantized)
    assert torch.equal(indices, out.indices)
    assert breakdown.codebook is loss and len(vq(x)) == 3
    torch.testing.assert_close(breakdown.entropy, out.entropy.mean())


def test_a_projection_leads_to_the_codes_and_back():
    vq, x = layer(codebook_dim=4), torch.randn(5, DIM)
    out = softvq.soft_quantize(vq.project_in(x), vq.codebook, 2.0)
    torch.testing.assert_close(vq(x)[0], vq.project_out(out.quantized))
    assert isinstance(layer(heads=2).project_in, torch.nn.Identity)


def test_codes_are_their_own_nearest():
    vq = layer(temperature=1e-3)
    indices = torch.tensor([[3, 0, 9]])
    codes = vq.get_codes_from_indices(indices)
    assert torch.equal(codes, vq.codebook[indices])
    assert torch.equal(vq(codes)[1], indices)
    heads = layer(heads=3, separate_codebook_per_head=True)
    indices = torch.tensor([[3, 0, 9]])
    codes = heads.get_codes_from_indices(indices)
    assert torch.equal(codes[0, 1], heads.codebook[1, 0]) and codes.shape == (1, 3, 2)


@pytest.mark.parametrize("estimator", ["soft", "straight_through"])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(
    ("codebook_loss", "learned"), [*((loss, False) for loss in LOSSES), ("likelihood", True)]
)
def test_commitment_weight_scales_what_reaches_x_and_only_that(
    codebook_loss, learned, heads, estimator
):
    options = {"codebook_loss": codebook_loss, "heads": heads, "estimator": estimator}
    options["learn_temperature"] = learned
    full = layer(**options, commitment_weight=1.0).double()
    x = torch.randn(20, DIM, dtype=torch.float64, requires_grad=True)
    loss = full(x)[2]
    dx, *same = torch.autograd.grad(loss, (x, *full.parameters()))
    assert all(grad.abs().max() > 0 for grad in (dx, *same))
    for weight in (0.0, 0.25, 3.0):
        vq = layer(**options, commitment_weight=weight).double()
        vq.load_state_dict(full.state_dict())
        assert torch.equal(vq(x)[2], loss)
        grads = torch.autograd.grad(vq(x)[2], (x, *vq.parameters()))
        torch.testing.assert_close(grads, (weight * dx, *same), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("commitment_weight", [0.0, 0.25])
def test_q_passes_its_gradient_to_x_whatever_the_commitment(commitment_weight):
    vq, x = layer(commitment_weight=commitment_weight), torch.randn(5, DIM, requires_grad=True)
    grad = torch.randn(5, DIM)
    (given,) = torch.autograd.grad(vq(x)[0], x, grad)
    wanted = torch.autograd.grad(softvq.soft_quantize(x, vq.codebook, 2.0).quantized, x, grad)
    torch.testing.assert_close(given, wanted[0])


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("codebook_loss", ["free_energy", "likelihood"])
def test_one_pass_trains_codes_on_latents_and_latents_through_q(codebook_loss, weight, monkeypatch):
    vq = layer(codebook_loss=codebook_loss, commitment_weight=weight)
    x = torch.randn(5, DIM, requires_grad=True)
    grad = torch.randn(5, DIM)
    tensors = (x, vq.codebook_parameter)
    alone = torch.autograd.grad(vq(x.detach())[2], vq.codebook_parameter)[0]
    (committed,) = torch.autograd.grad(vq(x)[2], x)
    dx, dc = torch.autograd.grad(vq(x)[0], tensors, grad)

    def quantize(*arguments, **options):
        passes.append(1)
        return softvq.soft_quantize(*arguments, **options)

    passes = []
    monkeypatch.setattr("softvq.quantizers.soft.soft_quantize", quantize)
    quantized, _, loss = vq(x)
    together = torch.autograd.grad(loss + (grad * quantized).sum(), tensors)
    assert len(passes) == 1
    torch.testing.assert_close(together, (dx + committed, dc + alone))


def test_losses_have_the_value_they_are_named_after():
    x = torch.randn(20, DIM)
    vq = layer()
    out = softvq.soft_quantize(x, vq.codebook, 2.0)
    for codebook_loss, wanted in {
        "free_energy": -2.0 * out.log_partition.mean() / DIM,
        "quantizing_error": (x - out.quantized).square().mean(),
        "detached_quantizing_error": (x - out.quantized).square().mean(),
        "likelihood": (
            0.5 * torch.log(torch.tensor(2.0 * torch.pi))
            + (torch.log(torch.tensor(1.0 * CODES)) - out.log_partition.mean()) / DIM
        ),
    }.items():
        other = layer(codebook_loss=codebook_loss)
        other.load_state_dict(vq.state_dict())
        torch.testing.assert_close(other(x)[2], wanted)


def test_detached_loss_is_weighted_least_squares_in_the_codes():
    vq = layer(codebook_loss="detached_quantizing_error")
    x = torch.randn(20, DIM, requires_grad=True)
    quantized, _, loss = vq(x)
    loss.backward()
    p = softvq.assignment_probabilities(x.detach(), vq.codebook.detach(), 2.0)
    wanted = p.T @ (2 * (quantized - x).detach() / x.numel())
    torch.testing.assert_close(vq.codebook_parameter.grad[0], wanted)
    assert torch.equal(x.grad, torch.zeros_like(x))  # commitment_weight is 0
    (through_q,) = torch.autograd.grad(vq(x)[0].sum(), x, allow_unused=True)
    assert through_q is None


def test_quantizing_error_differentiates_the_probabilities_too():
    vq = layer(codebook_loss="quantizing_error")
    x = torch.randn(20, DIM)
    given = torch.autograd.grad(vq(x)[2], vq.codebook_parameter)[0][0]
    codebook = vq.codebook.detach().requires_grad_()
    p = softvq.assignment_probabilities(x, codebook, 2.0)
    wanted = torch.autograd.grad((x - p @ codebook).square().mean(), codebook)[0]
    torch.testing.assert_close(given, wanted)


def test_a_learned_temperature_falls_to_the_spread_of_tight_clusters():
    vq = layer(codebook_loss="likelihood", learn_temperature=True)
    assert any(p is vq.log_temperature for p in vq.parameters())
    indices = torch.arange(CODES).repeat(50)
    x = vq.codebook.detach()[indices] + 0.1 * torch.randn(500, DIM)
    optimizer = torch.optim.Adam([vq.log_temperature], lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        vq(x)[2].backward()
        optimizer.step()
    assert vq.temperature.item() == pytest.approx(2 * 0.1**2, rel=0.1)


def test_a_fixed_temperature_is_a_buffer():
    vq = layer()
    assert [name for name, _ in vq.named_parameters()] == ["codebook_parameter"]
    vq(torch.randn(3, DIM))[2].backward()
    assert not vq.temperature.requires_grad


@pytest.mark.parametrize("value", [0.3, torch.tensor(0.3)], ids=["float", "tensor"])
@pytest.mark.parametrize("learned", [False, True])
def test_set_temperature(value, learned):
    vq = layer(codebook_loss="likelihood", learn_temperature=learned)
    held = vq.log_temperature
    vq.set_temperature(value)
    assert vq.log_temperature is held
    assert vq.temperature.item() == pytest.approx(0.3)
    x = torch.randn(4, DIM)
    torch.testing.assert_close(
        vq(x)[0], softvq.soft_quantize(x, vq.codebook, 0.3).quantized, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("learned", [False, True])
def test_state_dict_holds_codes_and_temperature(learned):
    vq = layer(codebook_loss="likelihood", learn_temperature=learned)
    vq.set_temperature(0.37)
    other = layer(codebook_loss="likelihood", learn_temperature=learned, temperature=5.0)
    other.load_state_dict(vq.state_dict())
    assert torch.equal(other.temperature, vq.temperature)
    assert torch.equal(other.codebook, vq.codebook)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"codebook_size": 0}, "codebook_size must be at least 1, got 0"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"codebook_dim": 0}, "codebook_dim must be at least 1, got 0"),
        ({"heads": 4}, "dim 6 does not divide into 4 heads; give codebook_dim"),
        ({"estimator": "hard"}, "estimator must be one of soft, straight_through; got 'hard'"),
        ({"codebook_loss": "kl"}, "codebook_loss must be one of free_energy, .*; got 'kl'"),
        ({"learn_temperature": True}, "learn_temperature needs codebook_loss='likelihood'"),
        ({"temperature": 0.0}, r"temperature must be a number from 1e-20 to 1e\+20, got 0\.0"),
        ({"temperature": -1.0}, "temperature .* got -1.0"),
        ({"temperature": float("nan")}, "temperature .* got nan"),
        ({"temperature": float("inf")}, "temperature .* got inf"),
        ({"commitment_weight": -0.5}, "commitment_weight must be .* got -0.5"),
        ({"commitment_weight": float("nan")}, "commitment_weight must be .* got nan"),
    ],
    ids=str,
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        layer(**options)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.tensor(-1.0), "temperature must be a number from 1e-20 to 1e.20, got -1.0"),
        (torch.ones(1), r"temperature must be a number or a 0-d .* shape \(1,\)"),
    ],
    ids=str,
)
def test_bad_temperatures_to_set_are_named(value, message):
    with pytest.raises(ValueError, match=message):
        SoftVQ(DIM, CODES).set_temperature(value)
