"""VQ: van den Oord et al. 2017, eq. 1 to 3."""

import pytest
import torch
from torch.nn.functional import normalize

from softvq.quantizers import EMAVQ, VQ
from softvq.quantizers.straight_through import straight_through

DIM, CODES = 6, 10


def by_hand():
    """Codes 0 and 4 on a line, latents 1 and 3: z − e = 1 and −1."""
    vq = VQ(1, 2, commitment_weight=0.5)
    vq.codebook = torch.tensor([[0.0], [4.0]])
    return vq, torch.tensor([[1.0], [3.0]], requires_grad=True)


def test_the_nearest_code_is_chosen():
    vq = VQ(DIM, CODES)
    x = torch.randn(50, DIM)
    _, indices, _ = vq(x)
    assert torch.equal(indices, torch.cdist(x, vq.codebook).argmin(-1))


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_value_is_the_code_and_gradient_the_identity_bit_by_bit(scale):
    vq = VQ(DIM, CODES)
    x = (scale * torch.randn(2, 30, DIM)).requires_grad_()
    quantized, indices, _ = vq(x)
    assert torch.equal(quantized, vq.codebook[indices])
    grad = torch.randn_like(x)
    assert torch.equal(torch.autograd.grad(quantized, x, grad)[0], grad)
    assert straight_through(x.bfloat16(), vq.codebook[indices]).dtype == torch.bfloat16


def rotation(z, codes):
    """‖code‖/‖z‖ times the rotation from z to code, (N, D, D)."""
    start, end = normalize(z, dim=-1), normalize(codes, dim=-1)
    middle = normalize(start + end, dim=-1)
    outer = end[:, :, None] * start[:, None] - middle[:, :, None] * middle[:, None]
    turn = torch.eye(z.shape[-1], dtype=z.dtype) + 2 * outer
    return turn * (codes.norm(dim=-1) / z.norm(dim=-1))[:, None, None]


@pytest.mark.parametrize("dim", [1, 2, 17])
def test_a_rotated_gradient_is_that_of_the_rotation_from_latent_to_code(dim):
    z, codes, grad = torch.randn(3, 30, dim, dtype=torch.float64)
    map_ = rotation(z, codes)
    assert torch.allclose((map_ @ z[..., None])[..., 0], codes)
    quantized = straight_through(z.requires_grad_(), codes, rotated=True)
    assert torch.equal(quantized, codes)
    (found,) = torch.autograd.grad(quantized, z, grad)
    assert torch.allclose(found, (map_.mT @ grad[..., None])[..., 0])


def test_where_there_is_no_rotation_the_gradient_is_finite():
    z = torch.tensor([[0.0, 0.0], [1.0, 2.0], [1.0, 2.0]], requires_grad=True)
    codes = torch.tensor([[1.0, 2.0], [0.0, 0.0], [-2.0, -4.0]])  # the last is behind the origin
    grad = torch.randn(3, 2)
    (found,) = torch.autograd.grad(straight_through(z, codes, rotated=True), z, grad)
    assert torch.equal(found[:2], grad[:2])
    assert torch.allclose(found[2].norm(), 2 * grad[2].norm())


@pytest.mark.parametrize("kind", [VQ, EMAVQ])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rotation_trick_changes_the_gradient_alone(kind, dtype):
    vq = kind(DIM, CODES, rotation_trick=True).eval()
    x = torch.randn(2, 30, DIM).to(dtype).requires_grad_()
    quantized, indices, _ = vq(x)
    codes = vq.codebook[indices].detach()
    assert torch.equal(quantized, codes.to(dtype))
    grad = torch.randn_like(x)
    expected = torch.autograd.grad(straight_through(x, codes, rotated=True), x, grad)
    found = torch.autograd.grad(quantized, x, grad)
    assert torch.equal(found[0], expected[0]) and not torch.equal(found[0], grad)


def test_the_output_trains_no_code():
    vq = VQ(DIM, CODES)
    quantized, _, _ = vq(torch.randn(5, DIM, requires_grad=True))
    (grad,) = torch.autograd.grad(quantized.sum(), vq.codebook_parameter, allow_unused=True)
    assert grad is None


def test_losses_by_hand():
    vq, x = by_hand()
    _, indices, loss, parts = vq(x, return_loss_breakdown=True)
    assert indices.tolist() == [0, 1]
    assert parts.codebook == parts.commitment == 1.0  # the mean of 1² and (−1)²
    assert loss == 1.5


def test_beta_scales_the_latents_gradient_and_not_the_codes():
    vq, x = by_hand()
    to_x, to_codes = torch.autograd.grad(vq(x)[2], (x, vq.codebook_parameter))
    # 2β(z − e)/2 elements, and −2(z − e)/2 without β.
    assert torch.equal(to_x, torch.tensor([[0.5], [-0.5]]))
    assert torch.equal(to_codes[0], torch.tensor([[-1.0], [1.0]]))


@pytest.mark.parametrize("commitment_weight", [0.0, 0.25, 2.0])
def test_gradients_of_several_dimensions_and_heads(commitment_weight):
    vq = VQ(
        DIM,
        CODES,
        heads=2,
        separate_codebook_per_head=True,
        commitment_weight=commitment_weight,
    ).double()
    x = torch.randn(50, DIM, dtype=torch.float64, requires_grad=True)
    _, indices, loss = vq(x)
    z, codes = x.unflatten(-1, (2, 3)), vq.codebook[torch.arange(2), indices]
    wanted = (z.detach() - codes).square().mean()
    wanted = wanted + commitment_weight * (z - codes.detach()).square().mean()
    torch.testing.assert_close(loss, wanted)
    variables = (x, vq.codebook_parameter)
    for a, b in zip(
        torch.autograd.grad(loss, variables), torch.autograd.grad(wanted, variables), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_training_finds_the_clusters():
    centres = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]])
    x = centres.repeat(40, 1) + 0.1 * torch.randn(120, 2)
    vq = VQ(2, 3, kmeans_init=True, kmeans_iters=0)
    optimizer = torch.optim.SGD(vq.parameters(), lr=0.5)
    for _ in range(50):
        optimizer.zero_grad()
        vq(x)[2].backward()
        optimizer.step()
    order = torch.cdist(centres, vq.codebook).argmin(-1)
    assert torch.allclose(vq.codebook[order], centres, atol=0.1)


def test_the_codebook_loss_of_a_half_precision_module_does_not_overflow():
    vq = VQ(64, CODES).half()
    _, _, _, parts = vq((40 * torch.randn(30, 64)).half(), return_loss_breakdown=True)
    assert parts.codebook.dtype == torch.float32
    torch.testing.assert_close(parts.codebook, parts.commitment)


def test_bad_weight_is_named():
    with pytest.raises(ValueError, match=r"commitment_weight must be .* from 0 up, got -0.5"):
        VQ(DIM, CODES, commitment_weight=-0.5)
