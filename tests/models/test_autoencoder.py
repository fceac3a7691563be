"""AE, VAE and conditional VAE: their losses, what is random, where the labels go."""

import pytest
import torch

from softvq import losses
from softvq.models import Autoencoder, LossWeights, Networks

SHAPE, GRID, DIM, CLASSES = (1, 8, 8), (2, 1), 3, 4
AE, VAE = LossWeights(reconstruction=1.0, kl=0.0), LossWeights(reconstruction=2.0, kl=0.5)


def build(weights=VAE, *, shape=SHAPE, architecture="conv", **options):
    networks = Networks(architecture, hidden=(12, 8), width=4)
    return Autoencoder(shape, GRID, DIM, weights=weights, networks=networks, **options)


@pytest.fixture
def images():
    return torch.rand(5, *SHAPE)


@pytest.fixture
def labels():
    return torch.tensor([0, 1, 2, 3, 3])


def test_the_loss_of_an_ae_is_its_reconstruction_alone(images):
    model = build(LossWeights(reconstruction=3.0, kl=0.0))
    seen = model(images)
    assert seen.losses.keys() == {"loss", "reconstruction_error"}
    torch.testing.assert_close(seen.losses["loss"], 3 * seen.losses["reconstruction_error"])
    assert model.eval().evaluate(images).values == {}


def test_a_loss_that_it_has_not_is_refused():
    message = "weights.reconstruction_quantizing must be 0: Autoencoder has no such loss"
    with pytest.raises(ValueError, match=message):
        build(LossWeights(reconstruction_quantizing=0.5))


@pytest.mark.parametrize("reconstruction_loss", ["squared", "absolute"])
def test_the_loss_of_a_vae_is_the_weighted_sum(images, reconstruction_loss):
    model = build(reconstruction_loss=reconstruction_loss).eval()  # z is the mean
    _, mean, logvar = model.encode(images)
    output = model.decode(mean)
    kl = 0.5 * (mean**2 + logvar.exp() - logvar - 1).flatten(1).sum(1).mean()
    error = losses.reconstruction_error(output, images, reconstruction_loss)
    seen = model(images)
    torch.testing.assert_close(seen.losses["loss"], 2 * error + 0.5 * kl)
    torch.testing.assert_close(seen.losses["kl"], kl)
    torch.testing.assert_close(
        seen.losses["reconstruction_error"], (output - images).square().mean()
    )


def test_the_kl_pulls_the_encoder_to_the_prior_and_nothing_else(images):
    model = build(LossWeights(reconstruction=0.0, kl=1.0))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    model.decoder.requires_grad_(False)
    for _ in range(60):
        optimizer.zero_grad()
        model(images).losses["loss"].backward()
        optimizer.step()
    _, mean, logvar = model.encode(images)
    assert mean.abs().max() < 0.3 and logvar.abs().max() < 0.3


def test_only_a_vae_in_training_samples(images):
    for model in (build(AE), build(VAE).eval(), build(AE).eval()):
        assert torch.equal(model.encode(images).z, model.encode(images).z)
        assert torch.equal(model.encode(images).z, model.encode(images).mean)
    model = build(VAE)
    first, second = model.encode(images), model.encode(images)
    assert torch.equal(first.mean, second.mean) and not torch.equal(first.z, second.z)


def test_the_sample_has_the_variance_that_the_encoder_says(images):
    model = build(VAE)
    features = torch.tensor([1.0, 2.0, 3.0, -2.0, 0.0, 1.0]).expand(20_000, *GRID, 2 * DIM)
    model.encoder.forward = lambda _: features
    z = model.encode(images).z.flatten(0, 2)
    torch.testing.assert_close(z.mean(0), torch.tensor([1.0, 2.0, 3.0]), rtol=0, atol=0.05)
    wanted = torch.tensor([-2.0, 0.0, 1.0]).exp()
    torch.testing.assert_close(z.var(0), wanted, rtol=0.05, atol=0)


def test_the_latents_of_an_ae_are_standardised():
    z = build(AE).encode(torch.rand(50, *SHAPE)).z.flatten(0, 2)
    torch.testing.assert_close(z.mean(0), torch.zeros(DIM), rtol=0, atol=1e-5)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(DIM), rtol=1e-2, atol=0)


@pytest.mark.parametrize("weights", [AE, VAE], ids=["ae", "vae"])
@pytest.mark.parametrize(
    ("architecture", "shape"), [("conv", (3, 12, 9)), ("dense", (2, 5, 7)), ("conv", SHAPE)]
)
def test_evaluate_reconstructs_from_the_mean(weights, architecture, shape):
    model = build(weights, architecture=architecture, shape=shape).eval()
    images = torch.rand(5, *shape)
    seen = model.evaluate(images)
    assert seen.outputs.keys() == {"reconstruction_error"} and seen.indices == {}
    output = seen.outputs["reconstruction_error"]
    torch.testing.assert_close(output, model.decode(model.encode(images).mean))
    assert output.shape == images.shape and not output.requires_grad
    assert output.min() >= 0 and output.max() <= 1


def test_the_output_lies_in_the_unit_interval_however_far_the_latents():
    output = build().eval().decode(1e4 * torch.randn(5, *GRID, DIM))
    assert output.min() >= 0 and output.max() <= 1
    assert output.max() - output.min() > 0.9


def test_there_are_no_codes(images):
    model = build()
    assert (model.quantizers, model.grids, model.levels) == ({}, {}, {})
    seen = model(images)
    assert seen.latents == seen.indices == {}
    with pytest.raises(NotImplementedError):
        model.encode_indices(images)
    with pytest.raises(NotImplementedError):
        model.decode_indices({})


def test_a_model_without_classes_does_not_look_at_labels(images, labels):
    model = build().eval()
    with_labels, without = (model.evaluate(images, y).outputs for y in (labels, None))
    assert torch.equal(with_labels["reconstruction_error"], without["reconstruction_error"])


def test_the_label_changes_what_the_encoder_and_the_decoder_say(images, labels):
    model = build(classes=CLASSES).eval()
    others = (labels + 1) % CLASSES
    one, other = model.encode(images, labels), model.encode(images, others)
    assert ((one.mean - other.mean).abs().flatten(1).amax(1) > 1e-4).all()
    assert ((one.logvar - other.logvar).abs().flatten(1).amax(1) > 1e-4).all()
    outputs = [model.decode(one.mean, y) for y in (labels, others)]
    assert ((outputs[0] - outputs[1]).abs().flatten(1).amax(1) > 1e-4).all()


def test_each_image_sees_its_own_label_alone(images, labels):
    model = build(classes=CLASSES).eval()
    changed = labels.clone()
    changed[2] = 0
    one, other = (
        model.evaluate(images, y).outputs["reconstruction_error"] for y in (labels, changed)
    )
    same = (one == other).flatten(1).all(1)
    assert same.tolist() == [True, True, False, True, True]


def test_the_label_reaches_both_losses(images, labels):
    model = build(classes=CLASSES).eval()
    one, other = (model(images, y).losses for y in (labels, labels.flip(0)))
    assert one["kl"] != other["kl"]
    assert one["reconstruction_error"] != other["reconstruction_error"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_labels_follow_a_converted_model(images, labels, dtype):
    model = build(classes=CLASSES).to(dtype)
    loss = model(images.to(dtype), labels).losses["loss"]
    assert loss.isfinite() and model.encode(images.to(dtype), labels).z.dtype == dtype
    assert model.eval().sample(labels).isfinite().all()


def test_a_missing_label_is_an_error(images):
    model = build(classes=CLASSES)
    for call in (model, model.evaluate, model.encode):
        with pytest.raises(ValueError, match="labels: a model of 4 classes needs them"):
            call(images)
    with pytest.raises(ValueError, match="labels: a model of 4 classes needs them"):
        model.decode(torch.zeros(2, *GRID, DIM))


def test_a_generator_repeats_a_sample(labels):
    model = build().eval()
    one, again, other = (
        model.sample(labels, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert one.shape == (5, *SHAPE) and not one.requires_grad
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert not torch.equal(one[0], one[1])


def test_a_sample_is_decoded_from_the_prior(labels):
    model = build(classes=CLASSES).eval()
    z = torch.randn(5, *GRID, DIM, generator=torch.Generator().manual_seed(3))
    wanted = model.decode(z, labels)
    sample = model.sample(labels, torch.Generator().manual_seed(3))
    assert torch.equal(sample, wanted)
    others = model.sample((labels + 1) % CLASSES, torch.Generator().manual_seed(3))
    assert not torch.isclose(others, sample).flatten(1).all(1).any()
