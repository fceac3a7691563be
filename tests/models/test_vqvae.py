"""The VQ-VAE with each quantizer: which loss moves which part, and that codes are all it keeps."""

import pytest
import torch

from softvq import losses
from softvq.models import LEVEL, VQVAE, LossWeights, Networks
from softvq.quantizers import EMAVQ, VQ, GumbelVQ
from tests.models.learning import losses_of_training, moved

SHAPE, GRID, DIM, CODES = (1, 8, 8), (2, 2), 3, 6
QUANTIZER_ONLY = LossWeights(reconstruction=0.0, quantizing=1.0, kl=0.0)
RECONSTRUCTION_ONLY = LossWeights(reconstruction=1.0, quantizing=0.0, kl=0.0)
HARD_GUMBEL = {"straight_through": True}
QUANTIZERS = {"vq": (VQ, {}), "ema": (EMAVQ, {}), "gumbel": (GumbelVQ, HARD_GUMBEL)}
every_quantizer = pytest.mark.parametrize("kind", QUANTIZERS)


def build(kind, weights=None, *, shape=SHAPE, grid=GRID, architecture="conv", quantizer=None, **o):
    cls, options = QUANTIZERS[kind]
    networks = Networks(architecture, hidden=(12, 8), width=4)
    weights = weights or LossWeights(reconstruction=10.0, kl=0.0)
    vq = cls(DIM, CODES, **options | (quantizer or {}))
    return VQVAE(shape, grid, vq, weights=weights, networks=networks, **o)


@pytest.fixture
def images():
    return torch.rand(5, *SHAPE)


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("vq", {"encoder", "decoder"}),
        ("ema", {"encoder", "decoder"}),
        ("gumbel", {"encoder", "decoder", "codes"}),  # the relaxation's gradient is the codes' too
    ],
)
def test_what_the_reconstruction_moves(images, kind, parts):
    assert moved(build(kind, RECONSTRUCTION_ONLY), images) == parts


@pytest.mark.parametrize(
    ("kind", "options", "parts"),
    [
        ("vq", {}, {"encoder", "codes"}),
        ("vq", {"commitment_weight": 0.0}, {"codes"}),
        ("ema", {}, {"encoder"}),
        ("ema", {"commitment_weight": 0.0}, set()),
        ("gumbel", {}, {"encoder", "codes"}),
        ("gumbel", {"kl_weight": 0.0}, set()),
    ],
)
def test_what_the_quantizer_loss_moves(images, kind, options, parts):
    assert moved(build(kind, QUANTIZER_ONLY, quantizer=options), images) == parts


@pytest.mark.parametrize("kind", ["vq", "ema"])
def test_the_encoder_gets_the_gradient_at_the_decoders_input_unchanged(images, kind):
    model = build(kind, RECONSTRUCTION_ONLY)
    ends = {}

    def keep(name):
        def hook(_, given, returned):
            tensor = returned if name == "z" else given[0]
            tensor.retain_grad()
            ends[name] = tensor

        return hook

    model.standardise.register_forward_hook(keep("z"))
    model.decoder.register_forward_hook(keep("codes"))
    model(images).losses["loss"].backward()
    at_the_codes = ends["codes"].grad
    assert at_the_codes.abs().max() > 0
    assert torch.equal(ends["z"].grad.view_as(at_the_codes), at_the_codes)


@every_quantizer
@pytest.mark.parametrize("reconstruction_loss", ["squared", "absolute"])
def test_the_loss_is_the_weighted_sum(images, kind, reconstruction_loss):
    weights = LossWeights(reconstruction=3.0, quantizing=0.5, kl=0.0)
    # In eval mode nothing is random and batch norm is fixed, so each term can be computed apart.
    model = build(kind, weights, reconstruction_loss=reconstruction_loss).eval()
    z = model.encode(images).z
    quantized, indices, quantizer_loss = model.quantizer(z)
    output = model.decode(quantized)
    error = losses.reconstruction_error(output, images, reconstruction_loss)

    seen = model(images)
    assert quantizer_loss > 0
    torch.testing.assert_close(seen.losses["loss"], 3 * error + 0.5 * quantizer_loss)
    squared = (output - images).square().mean()
    torch.testing.assert_close(seen.losses["reconstruction_error"], squared)
    torch.testing.assert_close(seen.losses["quantizing_error"], (z - quantized).square().mean())
    assert torch.equal(seen.indices[LEVEL], indices)
    torch.testing.assert_close(seen.latents[LEVEL], z)
    assert not seen.latents[LEVEL].requires_grad


@every_quantizer
@pytest.mark.parametrize(
    ("architecture", "shape", "grid"),
    [
        ("conv", (3, 12, 9), (3, 3)),
        ("conv", SHAPE, (1, 1)),
        ("dense", (2, 5, 7), (1, 1)),
        ("dense", SHAPE, (2, 3)),
    ],
)
def test_evaluate_and_indices_agree(kind, architecture, shape, grid):
    model = build(kind, architecture=architecture, shape=shape, grid=grid).eval()
    images = torch.rand(5, *shape)
    seen = model.evaluate(images)
    indices = seen.indices[LEVEL]
    assert indices.shape == (5, *grid) and indices.dtype == torch.int64
    assert (model.levels[LEVEL].grid, model.levels[LEVEL].codebook_size) == (grid, CODES)
    distances = torch.cdist(model.encode(images).mean.flatten(0, 2), model.quantizer.codebook)
    assert torch.equal(distances.argmin(1), indices.flatten())
    assert torch.equal(model.encode_indices(images)[LEVEL], indices)

    output = seen.outputs["reconstruction_hard_error"]
    torch.testing.assert_close(model.decode_indices(seen.indices), output)
    assert output.shape == images.shape and not output.requires_grad
    assert output.min() >= 0 and output.max() <= 1


@every_quantizer
def test_the_hard_output_is_the_models_own(images, kind):
    outputs = build(kind).eval().evaluate(images).outputs
    assert outputs.keys() == {"reconstruction_error", "reconstruction_hard_error"}
    assert outputs["reconstruction_error"] is outputs["reconstruction_hard_error"]


@every_quantizer
def test_evaluate_measures_the_distance_to_the_codes(images, kind):
    model = build(kind).eval()
    seen = model.evaluate(images)
    codes = model.quantizer.codebook[seen.indices[LEVEL]]
    wanted = (model.encode(images).mean - codes).square().mean()
    assert seen.values.keys() == {"quantizing_error"}
    torch.testing.assert_close(seen.values["quantizing_error"], wanted)


@every_quantizer
def test_the_decoder_knows_nothing_but_the_codes(kind):
    model = build(kind).eval()
    images = torch.rand(60, *SHAPE)
    seen = model.evaluate(images)
    output = seen.outputs["reconstruction_error"]
    grids, which = seen.indices[LEVEL].flatten(1).unique(dim=0, return_inverse=True)
    assert len(grids) < 60  # some images share all their codes
    first = torch.stack([output[which == group][0] for group in range(len(grids))])
    torch.testing.assert_close(output, first[which])


@every_quantizer
def test_evaluation_leaves_the_model_as_it_is(images, kind):
    model = build(kind, quantizer={"kmeans_init": True})
    model.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.evaluate(images)
    model.encode_indices(images)
    model(images)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("options", [{"channel_last": False}, {"accept_image_fmap": True}], ids=str)
def test_a_quantizer_that_would_read_another_axis_is_refused(options):
    """Where the grid is as high as the latent is long, its shape would do."""
    with pytest.raises(ValueError, match="quantizer must have channel_last=True and accept_image"):
        build("vq", grid=(DIM, 2), quantizer=options)


@pytest.mark.parametrize("name", ["kl", "reconstruction_quantizing"])
def test_a_loss_that_it_has_not_is_refused(name):
    with pytest.raises(ValueError, match=f"weights.{name} must be 0: VQVAE has no such loss"):
        build("vq", LossWeights(**{"kl": 0.0, name: 0.5}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reconstruction_loss": "l1"}, "reconstruction_loss must be one of squared, absolute"),
        ({"architecture": "cnn"}, "architecture must be one of conv, dense; got 'cnn'"),
    ],
    ids=str,
)
def test_unknown_names_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build("vq", **options)


def test_training_moves_the_running_means(images):
    model = build("ema")
    names = ("means", "counts")
    before = {name: getattr(model.quantizer, name).clone() for name in names}
    model(images)
    assert all(not torch.equal(getattr(model.quantizer, name), before[name]) for name in names)


def test_a_gumbel_quantizer_samples_only_in_training(images):
    model = build("gumbel", quantizer={"logits_temperature": 10.0})
    first, second = (model(images).indices[LEVEL] for _ in range(2))
    assert not torch.equal(first, second)
    model.eval()
    first, second = (model(images).indices[LEVEL] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(("kind", "options"), [("vq", {}), ("ema", {"decay": 0.9})])
def test_training_lowers_the_error_and_the_distance_to_the_codes(kind, options):
    images = torch.rand(64, *SHAPE).round()
    model = build(kind, quantizer=options)
    history = losses_of_training(model, images)
    assert history[-1]["reconstruction_error"] < 0.9 * history[0]["reconstruction_error"]
    assert history[-1]["quantizing_error"] < 0.7 * history[0]["quantizing_error"]
