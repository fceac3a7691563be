"""A pixelcnn learns the codes of a finished run: its metrics, its pictures, its tokenizer."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
from PIL import Image

from softvq.cli import main
from softvq.data import load_data
from softvq.models import CodePrior
from softvq.training.codes import encode_splits
from softvq.training.commands import evaluate_run
from softvq.training.config import TrainConfig
from softvq.training.history import read_metrics
from softvq.training.likelihood import (
    discretised_logistic_log_likelihood,
    fit_scales,
    order0_bits_per_latent,
)
from softvq.training.prior_evaluation import code_metrics, prior_metrics
from softvq.training.run_folder import RunFolder
from softvq.training.trainer import train

CPU = torch.device("cpu")
CODED = ("soft-vqvae", "vqvae2")
LEVELS = {"soft-vqvae": ("",), "vqvae2": ("_top", "_bottom")}
LATENTS = {"soft-vqvae": {"": 4}, "vqvae2": {"_top": 1, "_bottom": 4}}
every_tokenizer = pytest.mark.parametrize("tokenizer", CODED)


def lines_of(run, split):
    return [line for line in read_metrics(run / "metrics.jsonl")[0] if line["split"] == split]


def results_of(run):
    return json.loads((run / "summary.json").read_text())["test"]


def loaded(run):
    """Prior, tokenizer, images and their codes of a run."""
    source = RunFolder(RunFolder(run).read_config().tokenizer)
    tokenizer, images = source.load_model(CPU), load_data("digits")
    return RunFolder(run).load_model(CPU), tokenizer, images, encode_splits(tokenizer, images, CPU)


@every_tokenizer
def test_the_prior_is_of_the_levels_and_classes_of_its_tokenizer(tokenizer, tiny_runs):
    prior, model, _, codes = loaded(tiny_runs("pixelcnn", tokenizer))
    assert isinstance(prior, CodePrior) and prior.classes == 10
    assert prior.levels == model.levels == codes.levels


@every_tokenizer
def test_the_metrics_have_the_promised_names(tokenizer, tiny_runs):
    run = tiny_runs("pixelcnn", tokenizer)
    levels = LEVELS[tokenizer]
    bits = {"bits_per_latent", *(f"bits_per_latent{level}" for level in levels)}
    for line in lines_of(run, "train"):
        assert line.keys() == bits | {
            *("step", "split", "loss", "gradient_norm", "learning_rate"),
            *("images_per_second", "peak_memory"),
        }
        assert line["loss"] == pytest.approx(line["bits_per_latent"] * math.log(2))
    for line in lines_of(run, "validation"):
        assert line.keys() == bits | {"step", "split"}
    compared = {
        f"{kind}_bits_per_latent{level}" for kind in ("order0", "uniform") for level in levels
    }
    wanted = bits | compared | {"bits_per_dim", "bits_per_dim_of_codes"}
    assert results_of(run).keys() == wanted
    assert all(math.isfinite(value) and value > 0 for value in results_of(run).values())


@every_tokenizer
def test_training_makes_the_codes_cheaper_than_at_the_uniform_start(tokenizer, tiny_runs, tmp_path):
    config = RunFolder(tiny_runs("pixelcnn", tokenizer)).read_config()
    run = tmp_path / "run"
    longer = dataclasses.replace(config, steps=60, width=16, evaluate_every=30)
    assert train(longer, run, quiet=True)
    bits = [line["bits_per_latent"] for line in lines_of(run, "validation")]
    assert math.log2(8) > bits[0] > bits[1]
    results = results_of(run)
    for level in LEVELS[tokenizer]:
        assert results[f"uniform_bits_per_latent{level}"] == 3
        assert results[f"bits_per_latent{level}"] < 3


def test_the_bits_of_two_levels_are_averaged_by_their_latents(tiny_runs):
    test = results_of(tiny_runs("pixelcnn", "vqvae2"))
    both = 1 * test["bits_per_latent_top"] + 4 * test["bits_per_latent_bottom"]
    assert test["bits_per_latent"] == pytest.approx(both / 5)


@every_tokenizer
def test_the_codes_share_of_the_bits_per_dimension(tokenizer, tiny_runs):
    run = tiny_runs("pixelcnn", tokenizer)
    test, latents = results_of(run), sum(LATENTS[tokenizer].values())
    # 64 pixels; the class of an image, one of ten, is sent too.
    wanted = (latents * test["bits_per_latent"] + math.log2(10)) / 64
    assert test["bits_per_dim_of_codes"] == pytest.approx(wanted)
    assert test["bits_per_dim"] > test["bits_per_dim_of_codes"]


@torch.no_grad()
@every_tokenizer
def test_an_image_costs_its_codes_and_what_is_left_of_it(tokenizer, tiny_runs):
    """By the scales that fit the validation images best."""
    _, model, images, codes = loaded(tiny_runs("pixelcnn", tokenizer))
    decoded = {
        split: model.decode_indices(getattr(codes, split).batch(slice(None))[0])
        for split in ("validation", "test")
    }
    scales = fit_scales([(decoded["validation"], images.validation.images)])
    nats = discretised_logistic_log_likelihood(decoded["test"], images.test.images, scales)
    test = results_of(tiny_runs("pixelcnn", tokenizer))
    left = test["bits_per_dim"] - test["bits_per_dim_of_codes"]
    assert left == pytest.approx(-nats.mean().item() / 64 / math.log(2), rel=1e-6)


@every_tokenizer
def test_the_model_of_order_0_counts_the_training_codes(tokenizer, tiny_runs):
    run = tiny_runs("pixelcnn", tokenizer)
    _, _, _, codes = loaded(run)
    for level, suffix in zip(codes.levels, LEVELS[tokenizer], strict=True):
        counts = torch.bincount(codes.train.codes[level].flatten(), minlength=8) + 1
        sent = codes.test.codes[level].flatten().long()
        bits = -(counts / counts.sum()).log2()[sent].mean().item()
        assert results_of(run)[f"order0_bits_per_latent{suffix}"] == pytest.approx(bits, rel=1e-5)


@every_tokenizer
def test_evaluation_finds_what_the_prior_says_of_each_image(tokenizer, tiny_runs):
    prior, _, images, codes = loaded(tiny_runs("pixelcnn", tokenizer))
    grids, labels = codes.test.batch(slice(None))
    assert torch.equal(labels, images.test.labels)
    nats = prior.log_likelihood(grids, labels).mean().item()
    for size in (1000, 350):  # all at once, and a last batch of 10
        bits = code_metrics(prior, codes.test, size, CPU)["bits_per_latent"]
        assert bits == pytest.approx(-nats / math.log(2) / prior.latents, rel=1e-5)
    unlabelled = prior.log_likelihood(grids).mean().item()
    assert unlabelled != pytest.approx(nats, rel=1e-6)


def test_evaluation_keeps_the_mode_of_the_model(tiny_runs):
    prior, _, _, codes = loaded(tiny_runs("pixelcnn"))
    for module in prior.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    quiet = code_metrics(prior, codes.validation, 1000, CPU)
    prior.train()
    assert code_metrics(prior, codes.validation, 1000, CPU) == quiet  # nothing was dropped
    assert prior.training


@pytest.mark.parametrize("split", ["validation", "test"])
@every_tokenizer
def test_eval_measures_what_training_measured(tokenizer, split, tiny_runs):
    run = RunFolder(tiny_runs("pixelcnn", tokenizer))
    prior, model, images, codes = loaded(run.path)
    wanted = prior_metrics(prior, model, images, codes, split, CPU)
    if split == "test":
        assert wanted == pytest.approx(results_of(run.path), rel=1e-6)
    else:
        best = min(line["bits_per_latent"] for line in lines_of(run.path, split))
        assert wanted["bits_per_latent"] == pytest.approx(best, rel=1e-6)
    assert evaluate_run(run, split) == pytest.approx(wanted, rel=1e-6)
    assert json.loads((run.path / f"eval-{split}.json").read_text()).keys() == wanted.keys()
    (run.path / f"eval-{split}.json").unlink()


def test_images_that_do_not_all_have_a_class_make_a_prior_without_classes(tmp_path):
    folder = tmp_path / "images"
    (folder / "some").mkdir(parents=True)
    for number in range(20):
        path = folder / ("some" if number % 2 else "") / f"{number}.png"
        Image.linear_gradient("L").resize((8, 8)).rotate(18 * number).save(path)
    small = {"steps": 2, "batch_size": 4, "device": "cpu", "width": 2}
    data = {"data": "folder", "data_dir": folder, "latent_dim": 2, "codebook_size": 4}
    assert train(TrainConfig(model="vqvae", **data, **small), tmp_path / "codes", quiet=True)
    config = TrainConfig(model="pixelcnn", tokenizer=tmp_path / "codes", layers=1, **small)
    assert train(config, tmp_path / "prior", quiet=True)
    assert RunFolder(tmp_path / "prior").load_model(CPU).classes == 0
    test = results_of(tmp_path / "prior")
    assert test["bits_per_dim_of_codes"] == pytest.approx(4 * test["bits_per_latent"] / 64)


@pytest.fixture
def refused(tmp_path, capsys):
    """What `softvq train --model pixelcnn` says of a tokenizer it cannot have."""

    def call(tokenizer):
        out = tmp_path / "prior"
        arguments = ["train", "--model", "pixelcnn", "--steps", "2", "--out", str(out)]
        with pytest.raises(SystemExit) as caught:
            main([*arguments, "--tokenizer", str(tokenizer)])
        assert caught.value.code == 2 and not (out / "config.toml").exists()
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error.strip().removeprefix("softvq train: error: ")

    return call


@pytest.mark.parametrize("model", ["ae", "vae", "cvae", "pixelcnn"])
def test_a_tokenizer_without_codes_of_images_is_refused(model, tiny_runs, refused):
    run = tiny_runs(model)
    assert refused(run) == f"{run}: a run of model {model}, which makes no codes of images"


def test_a_tokenizer_that_is_not_there_is_refused(tmp_path, refused):
    gone = tmp_path / "gone"
    assert refused(gone) == f"{gone}: no run there (no config.toml)"
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.toml").write_text(TrainConfig(model="vqvae").to_toml())
    line = refused(tmp_path / "begun")
    assert line == f"{tmp_path}/begun: no model.safetensors; the run has not finished"


def test_a_prior_does_not_take_the_place_of_its_tokenizer(tiny_runs, tmp_path, capsys):
    run = shutil.copytree(tiny_runs("vqvae"), tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    arguments = ["train", "--model", "pixelcnn", "--tokenizer", str(run), "--overwrite", "--out"]
    with pytest.raises(SystemExit):
        main([*arguments, str(run / ".." / "run")])
    assert "run: is the tokenizer's own run folder; choose another" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_tokenizer_that_has_gone_since_is_named_by_eval(tiny_runs, tmp_path, capsys):
    run = RunFolder(tmp_path / "prior")
    config = RunFolder(tiny_runs("pixelcnn")).read_config()
    assert train(config, run.path, quiet=True)
    moved = dataclasses.replace(config, tokenizer=tmp_path / "gone")
    run.config.write_text(moved.to_toml())
    with pytest.raises(SystemExit) as caught:
        main(["eval", str(run.path)])
    assert caught.value.code == 2
    line = f"softvq eval: error: {tmp_path}/gone: no run there, the tokenizer of {run.path}; "
    assert capsys.readouterr().err.startswith(line)


def test_the_order_0_bits_of_known_codes():
    train_codes = torch.tensor([[[0, 0], [0, 1]]])  # counted 4, 2, 1 and 1 of 8 with one more each
    assert order0_bits_per_latent(train_codes, torch.tensor([[[0, 1], [2, 3]]]), 4) == 2.25
