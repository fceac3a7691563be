"""The entropy regulariser: low per latent, high on average, without the matrix."""

import pytest
import torch

import softvq
from softvq import losses
from softvq.quantizers import EMAVQ, VQ, GumbelVQ, SoftVQ
from softvq.quantizers.snapshot import snapshot

DIM, CODES = 6, 10


@pytest.mark.parametrize("options", [{}, {"heads": 2}, {"heads": 2, "separate": True}], ids=str)
def test_the_entropy_regulariser_is_that_of_the_whole_matrix(options):
    separate = options.pop("separate", False)
    vq = VQ(
        DIM,
        CODES,
        entropy_weight=0.3,
        entropy_temperature=0.7,
        separate_codebook_per_head=separate,
        **options,
    ).double()
    x = torch.randn(40, DIM, dtype=torch.float64, requires_grad=True)
    _, _, loss, parts = vq(x, return_loss_breakdown=True)

    z = x if vq.heads == 1 else x.unflatten(-1, (2, -1))
    p = softvq.assignment_probabilities(z, vq.codebook, 0.7)
    mean = p.mean(0) if separate or vq.heads == 1 else p.flatten(0, 1).mean(0)
    wanted = -(p * p.log()).sum(-1).mean() + (mean * mean.log()).sum(-1).mean()
    torch.testing.assert_close(parts.entropy_regulariser, wanted)
    torch.testing.assert_close(loss, parts.codebook + 0.25 * parts.commitment + 0.3 * wanted)
    variables = (x, vq.codebook_parameter)
    for a, b in zip(
        torch.autograd.grad(parts.entropy_regulariser, variables),
        torch.autograd.grad(wanted, variables),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", [SoftVQ, VQ, EMAVQ, GumbelVQ])
def test_the_entropy_regulariser_is_added_to_every_loss(kind):
    vq, x = kind(DIM, CODES, entropy_weight=2.0).eval(), torch.randn(40, DIM)
    plain = kind(DIM, CODES).eval()
    plain.load_state_dict(vq.state_dict())
    _, _, loss, parts = vq(x, return_loss_breakdown=True)
    assert parts.entropy_regulariser < 0
    torch.testing.assert_close(loss, plain(x)[2] + 2 * parts.entropy_regulariser)
    assert plain(x, return_loss_breakdown=True)[3].entropy_regulariser == 0


def test_an_unused_code_leaves_the_regulariser_finite():
    usage = torch.tensor([1.0, 0.0], requires_grad=True)
    value = losses.entropy_regulariser(torch.zeros(3), usage)
    value.backward()
    assert value == 0 and usage.grad.isfinite().all()


def test_opcheck_of_the_copy():
    x = torch.randn(3, 4, requires_grad=True)
    for view in (x, x.mT, x[:, ::2], x[:1].expand(5, 4)):
        torch.library.opcheck(snapshot, (view,))
