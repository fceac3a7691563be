"""The Soft VQ-VAE: which loss moves which part, and how it is evaluated."""

import pytest
import torch
from torch.nn.functional import normalize

import softvq
from softvq import losses
from softvq.models import LEVEL, LossWeights, Networks, SoftVQVAE
from softvq.quantizers import VQ, SoftVQ
from tests.models.learning import moved

DIM, CODES, GRID, SHAPE = 4, 6, (2, 2), (1, 8, 8)
OWN, SOFT, HARD = (
    "reconstruction_error",
    "reconstruction_quantizing_error",
    "reconstruction_hard_error",
)
QUANTIZER_ONLY = LossWeights(reconstruction=0.0, quantizing=1.0, kl=0.0)
RECONSTRUCTION_ONLY = LossWeights(reconstruction=1.0, quantizing=0.0, kl=0.0)


def build(weights=None, *, shape=SHAPE, grid=GRID, quantizer=None, architecture="conv", **options):
    vq = SoftVQ(DIM, CODES, **{"temperature": 1.5} | (quantizer or {}))
    weights = weights or LossWeights(reconstruction_quantizing=1.0)
    networks = Networks(architecture, hidden=(12, 8), width=4)
    return SoftVQVAE(shape, grid, vq, weights=weights, networks=networks, **options)


@pytest.fixture
def images():
    return torch.rand(5, *SHAPE)


def test_latent_the_quantizer_loss_moves_the_codes_alone(images):
    assert moved(build(QUANTIZER_ONLY), images) == {"codes"}
    committed = build(QUANTIZER_ONLY, quantizer={"commitment_weight": 1.0})
    assert moved(committed, images) == {"codes"}


def test_latent_the_quantizer_reads_the_mean_and_not_the_sample(images):
    model = build(LossWeights(kl=1.0))
    read = model(images).latents[LEVEL]
    latents = model.encode(images)
    torch.testing.assert_close(read, latents.mean.detach())
    assert (latents.z - latents.mean).abs().max() > 0.1


def test_latent_the_reconstruction_leaves_the_codes_alone(images):
    assert moved(build(RECONSTRUCTION_ONLY), images) == {"encoder", "decoder"}


def test_quantized_the_reconstruction_passes_through_q_to_the_encoder(images):
    model = build(RECONSTRUCTION_ONLY, decoder_input="quantized")
    assert moved(model, images) == {"encoder", "decoder", "codes"}


@pytest.mark.parametrize(
    ("commitment_weight", "parts"), [(0.0, {"codes"}), (0.25, {"codes", "encoder"})]
)
def test_quantized_commitment_moves_the_encoder(images, commitment_weight, parts):
    model = build(
        QUANTIZER_ONLY,
        decoder_input="quantized",
        quantizer={"commitment_weight": commitment_weight},
    )
    assert moved(model, images) == parts


@pytest.mark.parametrize("quantized_codes", ["nearest", "soft"])
@pytest.mark.parametrize("decoder_input", ["latent", "quantized"])
def test_the_fourth_loss_trains_only_the_decoder(images, decoder_input, quantized_codes):
    """With fixed batch norms: in training, latents and codes share their statistics."""
    gradients = []
    for weight in (0.0, 1.0):
        torch.manual_seed(3)
        model = build(
            LossWeights(1.0, 0.0, 0.0, weight),
            decoder_input=decoder_input,
            quantized_codes=quantized_codes,
        ).eval()
        model(images).losses["loss"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, without in gradients[0].items():
        if not name.startswith("decoder."):
            torch.testing.assert_close(gradients[1][name], without, msg=name)
    name = "decoder.layers.0.weight"
    assert not torch.allclose(gradients[1][name], gradients[0][name], rtol=1e-2)


def decoded(model, images):
    """How many latents per image the decoder was given while training."""
    sizes = []
    model.decoder.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    step = model(images)
    return sum(sizes) / len(images), step


def test_weight_zero_leaves_the_fourth_decoding_out(images):
    assert decoded(build(LossWeights(reconstruction_quantizing=1.0)), images)[0] == 2
    assert decoded(build(LossWeights(reconstruction_quantizing=0.0)), images)[0] == 1


def test_weight_zero_of_the_kl_makes_the_encoder_deterministic(images):
    model = build(LossWeights(kl=0.0))
    assert "kl" not in model(images).losses
    assert model.encode(images).logvar is None
    assert torch.equal(model.encode(images).z, model.encode(images).z)
    z = model.encode(torch.rand(50, *SHAPE)).z.flatten(0, 2)
    torch.testing.assert_close(z.mean(0), torch.zeros(DIM), rtol=0, atol=1e-5)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(DIM), rtol=1e-2, atol=0)


def test_a_variational_encoder_samples_only_in_training(images):
    model = build(LossWeights(kl=1.0))
    assert not torch.equal(model.encode(images).z, model.encode(images).z)
    latents = model.eval().encode(images)
    assert torch.equal(latents.z, latents.mean)


@pytest.mark.parametrize("reconstruction_loss", ["squared", "absolute"])
@pytest.mark.parametrize("decoder_input", ["latent", "quantized"])
def test_the_loss_is_the_weighted_sum(images, decoder_input, reconstruction_loss):
    weights = LossWeights(3.0, 0.5, 0.7, 2.0)
    options = {"decoder_input": decoder_input, "reconstruction_loss": reconstruction_loss}
    # In eval mode nothing is random and batch norm is fixed, so each term can be computed apart.
    model = build(weights, **options).eval()
    mean, logvar = model.encode(images)[1:]
    quantized, indices, quantizer_loss = model.quantizer(mean)
    output = model.decode(mean if decoder_input == "latent" else quantized)
    code_output = model.decode(model.quantizer.codebook[indices])
    kl = losses.kl_divergence(mean, logvar)
    error = losses.reconstruction_error(output, images, reconstruction_loss)
    code_error = losses.reconstruction_error(code_output, images, reconstruction_loss)
    wanted = 3.0 * error + 0.5 * quantizer_loss + 0.7 * kl + 2.0 * 3.0 * code_error

    step = model(images)
    torch.testing.assert_close(step.losses["loss"], wanted)
    torch.testing.assert_close(step.losses["kl"], kl)
    squared = losses.reconstruction_error(output, images)
    torch.testing.assert_close(step.losses["reconstruction_error"], squared)
    torch.testing.assert_close(step.losses["quantizing_error"], (mean - quantized).square().mean())
    assert torch.equal(step.indices[LEVEL], indices)
    torch.testing.assert_close(step.latents[LEVEL], mean)
    assert not step.latents[LEVEL].requires_grad


@pytest.mark.parametrize(
    ("architecture", "shape", "grid"),
    [
        ("conv", (3, 12, 9), (3, 3)),
        ("conv", (1, 8, 8), (1, 1)),
        ("dense", (2, 5, 7), (1, 1)),
        ("dense", (1, 8, 8), (2, 3)),
    ],
)
def test_evaluate_and_indices_agree(architecture, shape, grid):
    model = build(shape=shape, grid=grid, architecture=architecture).eval()
    images = torch.rand(5, *shape)
    seen = model.evaluate(images)
    indices, outputs = seen.indices[LEVEL], seen.outputs
    assert indices.shape == (5, *grid) and indices.dtype == torch.int64
    assert torch.equal(model.encode_indices(images)[LEVEL], indices)
    torch.testing.assert_close(model.decode_indices(seen.indices), outputs[HARD])
    codes = model.quantizer.get_codes_from_indices(indices)
    torch.testing.assert_close(model.decode(codes), outputs[HARD])

    z = model.encode(images).mean
    soft = softvq.soft_quantize(z, model.quantizer.codebook, 1.5).quantized
    torch.testing.assert_close(model.decode(soft), outputs[SOFT])
    torch.testing.assert_close(model.decode(z), outputs[OWN])
    torch.testing.assert_close(seen.values["quantizing_error"], (z - soft).square().mean())
    p = softvq.assignment_probabilities(z, model.quantizer.codebook, 1.5)
    torch.testing.assert_close(seen.values["max_probability"], p.amax(-1).mean())
    for output in outputs.values():
        assert output.shape == images.shape and not output.requires_grad
        assert output.min() >= 0 and output.max() <= 1


@pytest.mark.parametrize(("estimator", "own"), [("soft", SOFT), ("straight_through", HARD)])
def test_a_quantized_model_reconstructs_from_its_own_q(images, estimator, own):
    model = build(decoder_input="quantized", quantizer={"estimator": estimator}).eval()
    outputs = model.evaluate(images).outputs
    assert torch.equal(outputs[OWN], outputs[own])
    assert not torch.equal(outputs[SOFT], outputs[HARD])


@pytest.mark.parametrize("estimator", ["soft", "straight_through"])
@pytest.mark.parametrize(
    "quantizer",
    [
        {"heads": 2},
        {"heads": 2, "separate_codebook_per_head": True, "codebook_dim": 3},
        {"codebook_dim": 2},
        {"use_cosine_sim": True},
    ],
    ids=str,
)
def test_evaluation_goes_through_the_quantizer(images, quantizer, estimator):
    quantizer = quantizer | {"estimator": estimator}
    model = build(quantizer=quantizer, decoder_input="quantized").eval()
    seen, z, vq = model.evaluate(images), model.encode(images).mean, model.quantizer
    indices = vq(z)[1]
    assert torch.equal(seen.indices[LEVEL], indices)
    torch.testing.assert_close(seen.outputs[HARD], model.decode_indices({LEVEL: indices}))
    vq.estimator = "soft"
    soft = vq(z)[0]
    torch.testing.assert_close(seen.outputs[SOFT], model.decode(soft))
    torch.testing.assert_close(seen.values["quantizing_error"], (z - soft).square().mean())
    latents = vq.project_in(z)
    if vq.heads == 2:
        latents = latents.unflatten(-1, (2, -1))
    if vq.use_cosine_sim:
        latents = normalize(latents, dim=-1)
    p = softvq.assignment_probabilities(latents, vq.codebook, vq.temperature)
    torch.testing.assert_close(seen.values["max_probability"], p.amax(-1).mean())


@pytest.mark.parametrize("temperature", [1e-6, 1.0, 1e6])
def test_max_probability_lies_between_even_and_certain(images, temperature):
    model = build(quantizer={"temperature": temperature}).eval()
    value = model.evaluate(images).values["max_probability"].item()
    assert 1 / CODES * 0.999 <= value <= 1
    if temperature != 1.0:
        assert value == pytest.approx(1 if temperature < 1 else 1 / CODES, rel=0.05)


def test_latents_and_codes_are_decoded_together(images):
    """Batch norm then sees both kinds in one batch, as it does in evaluation."""
    model, seen = build(), []
    model.decoder.register_forward_hook(lambda module, given, output: seen.append(len(given[0])))
    model(images)
    assert seen == [2 * len(images)]


def test_a_deterministic_model_has_no_kl(images):
    assert "kl" not in build(LossWeights(kl=0.0)).eval().evaluate(images).values
    assert build(LossWeights(kl=1.0)).eval().evaluate(images).values["kl"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder_input": "quantised"}, "decoder_input must be one of latent, quantized"),
        ({"quantized_codes": "hard"}, "quantized_codes must be one of nearest, soft"),
    ],
    ids=str,
)
def test_unknown_names_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_projections_that_nothing_would_train_are_refused():
    with pytest.raises(ValueError, match="quantizer projects 4 features to 2, which nothing"):
        build(quantizer={"codebook_dim": 2})
    build(quantizer={"codebook_dim": 2, "heads": 2})


def test_another_quantizer_is_refused():
    with pytest.raises(TypeError, match="quantizer must be a SoftVQ, got a VQ"):
        SoftVQVAE(SHAPE, GRID, VQ(DIM, CODES))


@pytest.mark.parametrize("architecture", ["conv"])
def test_a_grid_larger_than_the_image_is_refused(architecture):
    with pytest.raises(ValueError, match="latent grid 9x2 must lie between"):
        build(grid=(9, 2), architecture=architecture)
