"""New images from a finished run, and what cannot be drawn."""

import itertools

import pytest
import torch

from softvq.training.commands import sample
from softvq.training.run_folder import RunError, RunFolder
from softvq.training.settings import ConfigError

WITHOUT_PRIOR = [("vae", None), ("cvae", None), ("ae", None)]
SAMPLED = [*WITHOUT_PRIOR, ("soft-vqvae", "pixelcnn"), ("vqvae2", "pixelcnn")]
sampled_models = pytest.mark.parametrize(("model", "prior"), SAMPLED)


@pytest.fixture
def draw(tiny_runs, saved_rows, tmp_path):
    """Sample a finished run: the bytes of the picture and its rows, label → images."""

    def call(model, prior=None, count=5, class_name=None, *, temperature=None, seed=0):
        out = tmp_path / "samples.png"
        prior = prior and RunFolder(tiny_runs(prior, model))
        run, options = RunFolder(tiny_runs(model)), {"temperature": temperature, "seed": seed}
        assert sample(run, prior, count, class_name, **options, out=out) == out
        names = [label for label, _ in saved_rows]
        starts = [i for i, name in enumerate(names) if name] + [len(names)]
        return out.read_bytes(), {
            names[i]: torch.cat([images for _, images in saved_rows[i:j]])
            for i, j in itertools.pairwise(starts)
        }

    return call


@sampled_models
def test_the_seed_repeats_the_samples_and_nothing_else_matters(draw, model, prior):
    one, _ = draw(model, prior, seed=3)
    torch.manual_seed(1234)
    again, _ = draw(model, prior, seed=3)
    other, _ = draw(model, prior, seed=4)
    assert one == again != other


@pytest.mark.parametrize("count", [1, 30])
@sampled_models
def test_as_many_images_as_asked(draw, model, prior, count):
    _, rows = draw(model, prior, count)
    images = torch.cat(list(rows.values()))
    assert images.shape == (count, 1, 8, 8)
    assert images.min() >= 0 and images.max() <= 1


@pytest.mark.parametrize(("model", "prior"), [("cvae", None), ("vqvae2", "pixelcnn")])
def test_all_classes_alike_or_one_alone(draw, model, prior):
    _, rows = draw(model, prior, 30)
    assert {name: len(images) for name, images in rows.items()} == dict.fromkeys("0123456789", 3)
    _, rows = draw(model, prior, 15, "7")
    assert {name: len(images) for name, images in rows.items()} == {"7": 15}


def test_a_model_without_classes_calls_them_samples(draw):
    assert list(draw("vae")[1]) == ["samples"]


def test_the_class_is_decoded(draw, tiny_runs):
    run = RunFolder(tiny_runs("cvae"))
    model = run.load_model(torch.device("cpu"))
    images = {name: draw("cvae", None, 4, name)[1][name] for name in "38"}
    for name, drawn in images.items():
        torch.manual_seed(0)
        assert torch.equal(model.sample(torch.full((4,), int(name))), drawn)
    assert not torch.equal(*images.values())


@pytest.mark.parametrize("model", ["soft-vqvae", "vqvae2"])
def test_samples_of_a_quantised_model_are_decoded_codes_of_the_prior(draw, tiny_runs, model):
    prior = RunFolder(tiny_runs("pixelcnn", model)).load_model(torch.device("cpu"))
    tokenizer = RunFolder(tiny_runs(model)).load_model(torch.device("cpu"))
    _, rows = draw(model, "pixelcnn", 6, "5")
    torch.manual_seed(0)
    codes = prior.sample(6, torch.full((6,), 5))
    with torch.no_grad():
        torch.testing.assert_close(rows["5"], tokenizer.decode_indices(codes))


def test_a_low_temperature_draws_the_likeliest_codes_alone(draw):
    def different(temperature):
        images = draw("vqvae2", "pixelcnn", 12, "5", temperature=temperature)[1]["5"]
        return len(images.flatten(1).unique(dim=0))

    assert different(1e-6) == 1
    assert different(1.0) > 1


@pytest.mark.parametrize(
    ("model", "prior", "message"),
    [
        ("vqvae2", None, "its codes need a prior; train one with softvq train --model pixelcnn"),
        ("vqvae2", ("vae",), "not a pixelcnn for the codes of .*vqvae2"),
        ("vqvae2", ("vqvae2",), "not a pixelcnn for the codes of .*vqvae2"),
        ("vqvae2", ("pixelcnn", "soft-vqvae"), "not a pixelcnn for the codes of"),
        ("soft-vqvae", ("pixelcnn", "vqvae2"), "not a pixelcnn for the codes of"),
        ("vae", ("pixelcnn",), "model vae has no codes for a prior"),
        ("pixelcnn", None, "a run of a pixelcnn; give the model it decodes with"),
    ],
)
def test_a_run_that_cannot_be_sampled_so(tiny_runs, tmp_path, model, prior, message):
    prior = prior and RunFolder(tiny_runs(*prior))
    with pytest.raises(RunError, match=message):
        sample_into(tmp_path, RunFolder(tiny_runs(model)), prior)


def sample_into(folder, run, prior=None, count=2, class_name=None, temperature=None):
    """Sample, and whatever happens leave no picture."""
    out = folder / "samples.png"
    try:
        sample(run, prior, count, class_name, temperature=temperature, seed=0, out=out)
    finally:
        assert not out.exists()


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("vae", {"count": 0}, "^count: 0 is not allowed; it must be at least 1"),
        ("vae", {"count": -3}, "^count: -3 is not allowed"),
        ("vae", {"temperature": 0.0}, r"^temperature: 0\.0 is not allowed; it must be from"),
        ("vae", {"temperature": 1e-39}, r"^temperature: 1e-39 is not allowed"),
        ("vae", {"temperature": -1.0}, r"^temperature: -1\.0 is not allowed"),
        ("vae", {"temperature": float("nan")}, "^temperature: nan is not allowed"),
        ("vae", {"temperature": float("inf")}, "^temperature: inf is not allowed"),
        ("vae", {"class_name": "7"}, "^class: '7' is not known: the model has none"),
        ("cvae", {"class_name": "ten"}, "^class: 'ten' is not one of 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"),
    ],
    ids=str,
)
def test_samples_that_cannot_be(tiny_runs, tmp_path, model, options, message):
    with pytest.raises(ConfigError, match=message):
        sample_into(tmp_path, RunFolder(tiny_runs(model)), **options)
