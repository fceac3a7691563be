"""GumbelVQ: the distribution of its samples, its relaxation, and its memory."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import softvq
from softvq import losses
from softvq.quantizers import VQ, GumbelVQ, gumbel

DIM, CODES = 3, 8


def layer(**options):
    return GumbelVQ(**{"dim": DIM, "codebook_size": CODES} | options)


@pytest.mark.parametrize("temperature", [0.1, 5.0])
def test_samples_follow_the_probabilities_whatever_the_temperature(temperature):
    vq = layer(temperature=temperature, logits_temperature=2.0, straight_through=True)
    z, draws = 0.5 * torch.randn(DIM), 20_000
    _, indices, _ = vq(z.expand(draws, DIM))
    expected = draws * softvq.assignment_probabilities(z, vq.codebook, 2.0)
    counts = torch.bincount(indices, minlength=CODES)
    assert expected.min() > 5
    chi_square = ((counts - expected).square() / expected).sum()
    assert chi_square < 29.9  # one in 10,000 of 7 degrees of freedom


def test_evaluation_takes_the_nearest_code():
    vq, other, x = layer().eval(), VQ(DIM, CODES).eval(), torch.randn(50, DIM)
    other.codebook = vq.codebook
    assert torch.equal(vq(x)[0], other(x)[0]) and torch.equal(vq(x)[1], other(x)[1])


def test_without_straight_through_indices_are_the_nearest_codes():
    vq, x = layer(), torch.randn(50, DIM)
    assert torch.equal(vq(x)[1], softvq.nearest_codes(x, vq.codebook)[0])


def reference(vq, x, seed, block_rows, straight_through):
    """The same samples with N×K matrices, in float64, differentiated by autograd."""
    torch.manual_seed(seed)
    blocks = [torch.empty(1, len(b), CODES).double() for b in x.split(block_rows)]
    noise = -torch.cat([block.exponential_() for block in blocks], 1)[0].log()
    log_p = softvq.assignment_probabilities(x, vq.codebook, vq.logits_temperature).log()
    y = ((log_p + noise) / vq.temperature).softmax(-1)
    if straight_through:
        hard = torch.nn.functional.one_hot((log_p + noise).argmax(-1), CODES)
        y = y + (hard - y).detach()
    return y @ vq.codebook


@pytest.mark.parametrize("straight_through", [False, True])
def test_values_and_gradients_are_those_of_the_whole_matrix(monkeypatch, straight_through):
    monkeypatch.setattr(gumbel, "BLOCK_ELEMENTS", 16 * CODES)
    vq = layer(temperature=0.7, logits_temperature=1.5, straight_through=straight_through).double()
    x = torch.randn(50, DIM, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    quantized, _, _ = vq(x)
    wanted = reference(vq, x, 1, 16, straight_through)
    torch.testing.assert_close(quantized, wanted)
    weights, variables = torch.randn_like(quantized), (x, vq.codebook_parameter)
    given = torch.autograd.grad((quantized * weights).sum(), variables)
    if straight_through:  # the relaxation's gradient; y's value is hard, its derivative is not
        wanted = reference(vq, x, 1, 16, False)
    for a, b in zip(given, torch.autograd.grad((wanted * weights).sum(), variables), strict=True):
        torch.testing.assert_close(a, b)


def test_straight_through_values_are_codes_bit_by_bit():
    vq = layer(straight_through=True, heads=3)
    quantized, indices, _ = vq(torch.randn(50, DIM))
    assert torch.equal(quantized, vq.codebook[indices].flatten(-2))


def test_a_cold_relaxation_is_a_sample():
    vq = layer(temperature=1e-4, straight_through=True)
    x = torch.randn(200, DIM)
    torch.manual_seed(1)
    hard = vq(x)[0]
    vq.straight_through = False
    torch.manual_seed(1)
    torch.testing.assert_close(vq(x)[0], hard, atol=1e-2, rtol=0)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("straight_through", [False, True])
def test_gradients_are_finite(scale, straight_through):
    vq = layer(temperature=0.05, straight_through=straight_through, entropy_weight=1.0)
    x = (scale * torch.randn(50, DIM)).requires_grad_()
    quantized, _, loss = vq(x)
    (quantized.square().sum() + loss).backward()
    assert x.grad.isfinite().all() and vq.codebook_parameter.grad.isfinite().all()


@pytest.mark.parametrize("heads", [1, 3])
def test_no_more_than_a_block_is_held(monkeypatch, heads):
    rows, codes, block_rows = 600, 64, 20
    vq = layer(codebook_size=codes, heads=heads, separate_codebook_per_head=True)
    monkeypatch.setattr(gumbel, "BLOCK_ELEMENTS", block_rows * heads * codes)
    blocks, saved = [], {}
    sample = gumbel._relaxed_sample

    def watched(z, *rest):
        blocks.append(z.shape[:2])
        return sample(z, *rest)

    def keep(x):
        saved[x.untyped_storage().data_ptr()] = x.numel()
        return x

    monkeypatch.setattr(gumbel, "_relaxed_sample", watched)
    z = torch.randn(rows, *([heads] if heads > 1 else []), DIM // heads, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        quantized = vq.quantize(z).quantized
    assert sum(saved.values()) < rows * codes / 4
    quantized.sum().backward()
    assert blocks == 2 * (rows // block_rows) * [(heads, block_rows)]  # each is sampled twice


def test_blocks_compile_with_temperatures_that_change(monkeypatch):
    monkeypatch.setattr(gumbel, "BLOCK_ELEMENTS", 16 * CODES)
    torch.compiler.reset()
    vq = layer()
    compiled = torch.compile(vq, fullgraph=True, backend="aot_eager")
    for temperature in (1.0, 2.0, 3.0):
        vq.logits_temperature = temperature
        vq.set_temperature(temperature)
        x, results = torch.randn(50, DIM, requires_grad=True), []
        for module in (vq, compiled):
            torch.manual_seed(1)
            quantized, _, loss = module(x)
            results.append((quantized, *torch.autograd.grad(quantized.square().sum() + loss, x)))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("training", [True, False])
def test_a_logits_temperature_that_changes_compiles_twice_at_the_most(training):
    torch.compiler.reset()
    vq, x = layer().train(training), torch.randn(50, DIM)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(vq, fullgraph=True, backend=counter)
    for step in range(5):
        vq.logits_temperature = 1 / (1 + step)
        torch.testing.assert_close(compiled(x)[2], vq(x)[2])
    assert counter.frame_count <= 2  # once for a number, once for any


def test_the_kl_divergence_is_that_of_the_whole_matrix():
    vq = layer(logits_temperature=1.5, kl_weight=0.3).double()
    x = torch.randn(50, DIM, dtype=torch.float64, requires_grad=True)
    _, _, loss, parts = vq(x, return_loss_breakdown=True)
    p = softvq.assignment_probabilities(x, vq.codebook, 1.5)
    wanted = (p * (p * CODES).log()).sum(-1).mean()
    torch.testing.assert_close(parts.kl, wanted)
    torch.testing.assert_close(loss, 0.3 * wanted)
    for a, b in zip(
        torch.autograd.grad(loss, (x, vq.codebook_parameter)),
        torch.autograd.grad(0.3 * wanted, (x, vq.codebook_parameter)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_kl_of_what_is_known():
    entropy = torch.tensor([0.0, math.log(4)])
    assert losses.kl_to_uniform(entropy, 4).item() == pytest.approx(0.5 * math.log(4))
    assert layer(kl_weight=0.0)(torch.randn(5, DIM))[2] == 0


def test_the_temperature_is_a_buffer_that_can_be_set():
    vq = layer(temperature=2.0)
    assert [name for name, _ in vq.named_parameters()] == ["codebook_parameter"]
    held = vq.log_temperature
    for value in (0.3, torch.tensor(0.3)):
        vq.set_temperature(value)
        assert vq.temperature.item() == pytest.approx(0.3) and vq.log_temperature is held
    with pytest.raises(ValueError, match=r"temperature must be a number from .* got 0"):
        vq.set_temperature(0)


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.0}, {"logits_temperature": -1.0}, {"kl_weight": -1.0}],
    ids=str,
)
def test_bad_options_are_named(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name} must be .* got {value}"):
        layer(**options)


def test_a_bad_logits_temperature_set_later_is_named():
    vq = layer(kl_weight=0.0)
    vq.logits_temperature = 0.0
    with pytest.raises(ValueError, match=r"logits_temperature must be a number .*, got 0.0"):
        vq(torch.randn(5, DIM))
