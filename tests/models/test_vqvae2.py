"""VQ-VAE-2: bottom depends on top, the decoder reads both, and both are trained."""

import pytest
import torch

from softvq import losses
from softvq.models import VQVAE2, LossWeights, Networks
from softvq.models.networks import halved
from softvq.models.vqvae2 import BOTTOM, TOP
from softvq.quantizers import EMAVQ, VQ
from tests.models.learning import losses_of_training

SHAPE, GRID, DIM, CODES = (1, 8, 8), (4, 4), 3, 6
LEVELS = (TOP, BOTTOM)
RECONSTRUCTION_ONLY = LossWeights(reconstruction=1.0, quantizing=0.0, kl=0.0)


def build(weights=None, *, shape=SHAPE, grid=GRID, cls=EMAVQ, architecture="conv", **options):
    networks = Networks(architecture, hidden=(12, 8), width=4)
    weights = weights or LossWeights(reconstruction=10.0, kl=0.0)
    quantizers = (cls(DIM, CODES, **options) for _ in LEVELS)
    return VQVAE2(shape, grid, *quantizers, weights=weights, networks=networks)


@pytest.fixture
def images():
    return torch.rand(5, *SHAPE)


def test_the_top_encoder_reads_standardised_features():
    """Their scale would else be the bottom encoder's to choose."""
    model, seen = build(), []
    model.top_encoder.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    model(torch.rand(32, *SHAPE))
    variance = seen[0].var((0, 2, 3), correction=0)
    torch.testing.assert_close(variance, torch.ones_like(variance), rtol=1e-2, atol=0)


def changed(indices):
    """Other codes at every place."""
    return (indices + 1) % CODES


@pytest.mark.parametrize(
    ("shape", "grid", "top"),
    [
        (SHAPE, (4, 4), (2, 2)),
        ((3, 12, 9), (3, 5), (2, 3)),
        (SHAPE, (1, 4), (1, 2)),
        (SHAPE, (1, 1), (1, 1)),
        (SHAPE, (8, 8), (4, 4)),
    ],
)
@pytest.mark.parametrize("architecture", ["conv", "dense"])
def test_evaluate_and_indices_agree(architecture, shape, grid, top):
    model = build(shape=shape, grid=grid, architecture=architecture).eval()
    images = torch.rand(5, *shape)
    seen = model.evaluate(images)
    assert list(seen.indices) == list(model.levels) == [TOP, BOTTOM]  # coarsest first
    assert model.grids == {TOP: top, BOTTOM: grid} and top == halved(grid)
    encoded = model.encode_indices(images)
    for name, level in model.levels.items():
        assert level.codebook_size == CODES
        assert seen.indices[name].shape == (5, *level.grid)
        assert seen.indices[name].dtype == torch.int64
        assert torch.equal(encoded[name], seen.indices[name])

    output = seen.outputs["reconstruction_hard_error"]
    assert seen.outputs.keys() == {"reconstruction_error", "reconstruction_hard_error"}
    assert output is seen.outputs["reconstruction_error"]
    torch.testing.assert_close(model.decode_indices(seen.indices), output)
    assert output.shape == images.shape and not output.requires_grad
    assert output.min() >= 0 and output.max() <= 1


def test_the_indices_are_those_of_the_nearest_codes(images):
    model = build().eval()
    latents = model(images).latents
    for name, quantizer in model.quantizers.items():
        distances = torch.cdist(latents[name].flatten(0, 2), quantizer.codebook)
        assert torch.equal(distances.argmin(1), model.encode_indices(images)[name].flatten())


def test_the_bottom_latents_follow_the_top_codes(images):
    model = build().eval()
    before = model(images).latents
    model.top.codebook = model.top.codebook.flip(0) + 1
    after = model(images).latents
    assert torch.equal(before[TOP], after[TOP])
    assert ((before[BOTTOM] - after[BOTTOM]).abs().flatten(1).amax(1) > 1e-3).all()


def test_the_top_does_not_follow_the_bottom_codes(images):
    model = build().eval()
    before = model(images)
    model.bottom.codebook = model.bottom.codebook + 1
    after = model(images)
    for seen, other in ((before.latents, after.latents), (before.indices, after.indices)):
        assert torch.equal(seen[TOP], other[TOP])
    assert torch.equal(before.latents[BOTTOM], after.latents[BOTTOM])


@pytest.mark.parametrize("level", LEVELS)
def test_the_decoder_reads_the_codes_of_each_level(images, level):
    model = build().eval()
    indices = model.encode_indices(images)
    before = model.decode_indices(indices)
    after = model.decode_indices(indices | {level: changed(indices[level])})
    assert ((before - after).abs().flatten(1).amax(1) > 1e-4).all()


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 12, 20)], ids=str)
def test_a_top_code_stands_for_its_own_part_of_the_bottom_grid(shape):
    grid = (shape[1] // 2, shape[2] // 2)
    model = build(shape=shape, grid=grid).eval()
    received = []
    model.decoder.register_forward_pre_hook(lambda _, given: received.append(given[0]))
    top, bottom = (torch.zeros(1, *model.grids[name], DIM) for name in LEVELS)
    top[0, 0, 0], top[0, -1, -1], bottom[0, 0, 1] = 1.0, 2.0, 3.0
    model.decode(top, bottom)
    joined = received[0][0]
    assert (joined[:2, :2, :DIM] == 1).all() and (joined[-2:, -2:, :DIM] == 2).all()
    assert (joined[..., :DIM] != 0).all(-1).sum() == 8
    assert torch.equal(joined[..., DIM:], bottom[0])


def test_the_reconstruction_reaches_every_part_but_the_codes(images):
    model = build(RECONSTRUCTION_ONLY, cls=VQ)
    model(images).losses["loss"].backward()
    for name, parameter in model.named_parameters():
        if name.endswith("codebook_parameter"):
            assert parameter.grad is None or not parameter.grad.any(), name
        elif parameter.dim() > 1:  # a bias before a batch norm moves nothing
            assert parameter.grad.any(), name


@pytest.mark.parametrize("level", LEVELS)
def test_each_levels_codes_alone_bring_the_reconstruction_to_its_encoder(images, level):
    """The other level's codes are cut from the graph before the decoder sees them."""
    model = build(RECONSTRUCTION_ONLY)
    decode = model.decode

    def decode_one(top, bottom):
        return decode(top, bottom.detach()) if level == TOP else decode(top.detach(), bottom)

    model.decode = decode_one
    model(images).losses["loss"].backward()
    for part in (model.encoder, model.top_encoder):
        assert all(p.grad.any() for p in part.parameters() if p.dim() > 1)
    for part in (model.top_decoder, model.join):
        assert all(p.grad.any() == (level == BOTTOM) for p in part.parameters() if p.dim() > 1)


def test_the_loss_is_the_weighted_sum_of_both_levels(images):
    weights = LossWeights(reconstruction=3.0, quantizing=0.5, kl=0.0)
    model = build(weights, cls=VQ).eval()
    seen = model(images)
    quantized, errors, total = {}, {}, 0
    for name, quantizer in model.quantizers.items():
        z = seen.latents[name]
        assert not z.requires_grad
        quantized[name], indices, loss = quantizer(z)
        assert torch.equal(indices, seen.indices[name]) and loss > 0
        errors[f"quantizing_error_{name}"] = (z - quantized[name]).square().mean()
        total = total + loss
    error = losses.reconstruction_error(model.decode(quantized[TOP], quantized[BOTTOM]), images)
    torch.testing.assert_close(seen.losses["loss"], 3 * error + 0.5 * total)
    torch.testing.assert_close(seen.losses["reconstruction_error"], error)
    assert seen.losses.keys() == {"loss", "reconstruction_error", *errors}
    values = model.evaluate(images).values
    assert values.keys() == errors.keys()
    for name, wanted in errors.items():
        torch.testing.assert_close(seen.losses[name], wanted)
        torch.testing.assert_close(values[name], wanted)


def test_the_latents_of_both_levels_are_standardised():
    for z in build()(torch.rand(80, *SHAPE)).latents.values():
        rows = z.flatten(0, 2)
        torch.testing.assert_close(rows.mean(0), torch.zeros(DIM), rtol=0, atol=1e-4)
        torch.testing.assert_close(rows.std(0, correction=0), torch.ones(DIM), rtol=1e-2, atol=0)


@pytest.mark.parametrize("level", LEVELS)
def test_training_moves_the_running_means_of_both_and_evaluation_neither(images, level):
    model = build()
    means = model.quantizers[level].means
    before = means.clone()
    model.eval().evaluate(images)
    model.encode_indices(images)
    assert torch.equal(means, before)
    model.train()(images)
    assert not torch.equal(means, before)


def test_training_brings_the_codes_of_both_to_their_latents():
    images = torch.rand(64, *SHAPE).round()
    model = build(decay=0.9)
    history = losses_of_training(model, images)
    assert history[-1]["reconstruction_error"] < 0.9 * history[0]["reconstruction_error"]
    for level in LEVELS:
        errors = [seen[f"quantizing_error_{level}"] for seen in history]
        assert errors[-1] < 0.7 * errors[0], level


def test_quantizers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="top must have channel_last=True and accept_image_fmap"):
        build(channel_last=False)
    with pytest.raises(ValueError, match="top and bottom must have one dim, got 2 and 3"):
        VQVAE2(SHAPE, GRID, VQ(2, CODES), VQ(DIM, CODES))


@pytest.mark.parametrize("name", ["kl", "reconstruction_quantizing"])
def test_a_loss_that_it_has_not_is_refused(name):
    with pytest.raises(ValueError, match=f"weights.{name} must be 0: VQVAE2 has no such loss"):
        build(LossWeights(**{"kl": 0.0, name: 0.5}))


def test_a_grid_larger_than_the_image_is_refused():
    with pytest.raises(ValueError, match="latent grid 9x2 must lie between"):
        build(grid=(9, 2))
