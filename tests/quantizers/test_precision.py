"""The precision of what quantizers keep and return, under autocast and in converted models."""

import pytest
import torch

import softvq
from softvq.quantizers import EMAVQ, VQ, DeadCodeRestart, GumbelVQ, SoftVQ

DIM, CODES = 6, 10
each = pytest.mark.parametrize("kind", [SoftVQ, VQ, EMAVQ, GumbelVQ])


def layer(kind, **options):
    return kind(DIM, CODES, **options)


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_statistics_and_losses_in_float32(kind, dtype):
    vq = layer(kind, codebook_dim=4, entropy_weight=0.1)
    x = torch.randn(40, DIM).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype):
        quantized, _, loss = vq(x)
    assert quantized.dtype == dtype and loss.dtype == torch.float32
    (quantized.float().sum() + loss).backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() > 0
    for value in vq.state_dict().values():
        assert value.dtype == torch.float32 and value.isfinite().all()


@each
def test_masked_positions_follow_the_output_to_half_precision(kind):
    vq, x, mask = layer(kind, codebook_dim=4), torch.randn(4, 10, DIM), torch.rand(4, 10) < 0.6
    with torch.autocast("cpu", torch.bfloat16):
        quantized, _, _ = vq(x, mask=mask)
    assert quantized.dtype == torch.bfloat16
    assert torch.equal(quantized[~mask], x[~mask].bfloat16())


@each
def test_directions_of_half_precision_may_be_long_or_none(kind):
    """The length of the first is above what a float16 can be, 1/length of the second."""
    vq = layer(kind, use_cosine_sim=True).half().eval()
    x = torch.stack([torch.full((DIM,), 6e4), torch.zeros(DIM)]).half()
    quantized, indices, loss = vq(x)
    assert quantized.isfinite().all() and loss.isfinite()
    assert indices[0] == vq.codebook.float().sum(-1).argmax()


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"codebook_dim": 4, "heads": 2}], ids=str)
def test_a_converted_module_decodes_indices_in_its_own_precision(kind, dtype, options):
    vq = layer(kind, **options).to(dtype).eval()
    if kind is SoftVQ:
        vq.estimator = "straight_through"
    quantized, indices, _ = vq(torch.randn(40, DIM).to(dtype))
    output = vq.get_output_from_indices(indices)
    assert output.dtype == quantized.dtype == dtype
    assert torch.equal(output, quantized)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (SoftVQ, {}),
        (SoftVQ, {"learn_temperature": True, "codebook_loss": "likelihood"}),
        (GumbelVQ, {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_temperature_does_not_follow_a_model_to_half_precision(kind, options, dtype):
    vq = layer(kind, temperature=2.02, **options).to(dtype)
    assert vq.codebook.dtype == dtype
    torch.testing.assert_close(vq.temperature, torch.tensor(2.02))
    vq.set_temperature(1e5)
    torch.testing.assert_close(vq.temperature, torch.tensor(1e5))
    quantized, _, loss = vq(torch.randn(40, DIM).to(dtype))
    assert quantized.dtype == dtype and loss.isfinite()
    loss.backward()
    assert vq.double().temperature.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_the_temperature_does_not_follow_either(dtype):
    vq = layer(SoftVQ, learn_temperature=True, codebook_loss="likelihood")
    vq(torch.randn(40, DIM))[2].backward()
    grad = vq.log_temperature.grad.clone()
    vq.to(dtype)
    assert vq.codebook_parameter.grad.dtype == dtype
    assert torch.equal(vq.log_temperature.grad, grad)
    torch.optim.SGD(vq.parameters(), lr=0.1).step()
    assert vq.double().log_temperature.grad.dtype == torch.float64


@pytest.fixture
def half_by_default():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("build", "kept"),
    [
        (lambda: SoftVQ(DIM, CODES), {"log_temperature"}),
        (lambda: GumbelVQ(DIM, CODES), {"log_temperature"}),
        (lambda: EMAVQ(DIM, CODES), {"means", "counts"}),
        (lambda: DeadCodeRestart(CODES, 0.5), {"share"}),
    ],
)
def test_what_is_kept_precise_is_so_from_the_start(build, kept, half_by_default):
    state = build().state_dict()
    assert {name for name, value in state.items() if value.dtype == torch.float32} == kept


def test_a_temperature_is_not_rounded_to_half_precision_first(half_by_default):
    assert SoftVQ(DIM, CODES, temperature=2.02).temperature.item() == pytest.approx(2.02)


@each
def test_double_precision_stays_double(kind):
    vq = layer(kind, codebook_dim=4, heads=2, entropy_weight=0.1).double()
    quantized, _, loss = vq(torch.randn(40, DIM, dtype=torch.float64))
    assert quantized.dtype == loss.dtype == torch.float64
    dtypes = {value.dtype for value in vq.state_dict().values()}
    assert dtypes == {torch.float64}


def test_autocast_does_not_lower_what_a_sample_is_drawn_from():
    vq, x, samples = layer(GumbelVQ), 3 * torch.randn(40, DIM), []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            samples.append(vq(x)[0])
    assert torch.equal(*samples)


def test_nothing_is_surer_than_certain():
    """At a small T a probability is the exponential of a difference of two large numbers."""
    vq = SoftVQ(64, 256, temperature=1e-3)
    for _ in range(10):
        vq.codebook = torch.randn(256, 64)
        assert vq.assign(3 * torch.randn(500, 64)).max_probability.max() <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_converted_module_is_as_sure_of_its_codes_as_a_precise_one(dtype):
    vq = SoftVQ(64, CODES).to(dtype)
    x = (4 * torch.randn(40, 64)).to(dtype)  # squared distances of 1,000, whose halves round
    p = softvq.assignment_probabilities(x.double(), vq.codebook.double(), 1.0)
    wanted = p.amax(-1).float()
    assert (wanted < 0.9).any()
    torch.testing.assert_close(vq.assign(x).max_probability, wanted, rtol=1e-3, atol=1e-3)
