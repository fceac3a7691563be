"""Every model through the same training loop: files, metrics, steering, settings."""

import dataclasses
import json
import tomllib

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from softvq.data import DataError, load_data
from softvq.models import LossWeights
from softvq.quantizers import EMAVQ, VQ, GumbelVQ
from softvq.training import images
from softvq.training.build import build_data, build_model, build_quantizer
from softvq.training.checkpoint import read_checkpoint
from softvq.training.commands import evaluate_run
from softvq.training.config import TrainConfig
from softvq.training.families import CONTINUOUS, IMAGES, MODELS, QUANTISED
from softvq.training.history import read_metrics
from softvq.training.load import load_task
from softvq.training.optimizer import build_optimizer
from softvq.training.pictures import save_rows
from softvq.training.run_folder import RunFolder
from softvq.training.trainer import train

every_model = pytest.mark.parametrize("model", IMAGES)
CPU = torch.device("cpu")
OWN, HARD = "reconstruction_error", "reconstruction_hard_error"
USAGE = {f"codebook_usage{share}" for share in ("", "_quarter", "_double")}
OF_CODES = {"quantizing_error", "perplexity", *USAGE}
SOFT_ONLY = {"reconstruction_quantizing_error", "max_probability"}


def levels(model):
    """What ends the names of the metrics and pictures of each level of codes."""
    if model in CONTINUOUS:
        return ()
    return ("_top", "_bottom") if model == "vqvae2" else ("",)


def promised_metrics(model):
    names = {OWN, "psnr"} | {f"{name}{level}" for name in OF_CODES for level in levels(model)}
    if model in QUANTISED:
        names |= {HARD, "psnr_hard", "l1_hard"}
    if model == "soft-vqvae":
        names |= SOFT_ONLY
    if model in ("soft-vqvae", "vae", "cvae"):
        names.add("kl")
    return names


def lines_of(run, split):
    return [line for line in read_metrics(run / "metrics.jsonl")[0] if line["split"] == split]


def config_of(run, **changes):
    return dataclasses.replace(RunFolder(run).read_config(), **changes)


@pytest.mark.parametrize("model", MODELS)
def test_a_run_leaves_all_its_files(model, tiny_runs):
    run = tiny_runs(model)
    pictures = {"samples.png"}
    if model in IMAGES:
        usage = {f"codebook_usage{level}.png" for level in levels(model)}
        pictures |= {"reconstructions.png"} | usage
    assert {path.name for path in run.iterdir()} == pictures | {
        "config.toml",
        "metrics.jsonl",
        "checkpoints",
        "model.safetensors",
        "report.html",
        "summary.json",
    }
    for name in pictures:
        Image.open(run / name).verify()
    assert tomllib.loads((run / "config.toml").read_text())["steps"] == 12
    assert "step-12" in {path.name for path in (run / "checkpoints").iterdir()}
    assert (run / "report.html").read_text().lower().startswith("<!doctype html>")
    RunFolder(run).load_model(CPU)


@every_model
def test_the_metrics_have_the_promised_names(model, tiny_runs):
    run = tiny_runs(model)
    for line in lines_of(run, "validation") + lines_of(run, "test"):
        assert line.keys() == {"step", "split"} | promised_metrics(model)
        assert all(value >= 0 for name, value in line.items() if name != "split")
        for level in levels(model):
            assert 0 < line[f"codebook_usage{level}"] <= 1
            assert 1 <= line[f"perplexity{level}"] <= 8 * line[f"codebook_usage{level}"] + 1e-6
        if model in QUANTISED and model != "soft-vqvae":
            assert line[HARD] == line[OWN]
    for line in lines_of(run, "train"):
        assert line.keys() >= {"loss", OWN, "learning_rate", "images_per_second"}
        assert line.keys() >= {f"quantizing_error{level}" for level in levels(model)}


@every_model
def test_training_lowers_the_error(model, tiny_runs, tmp_path):
    run = tmp_path / "run"
    settings = {"steps": 60, "width": 4, "evaluate_every": 20, "checkpoint_every": 60}
    assert train(config_of(tiny_runs(model), **settings), run, quiet=True)
    errors = [line[OWN] for line in lines_of(run, "train")]
    assert errors[-1] < 0.9 * errors[0]


@every_model
def test_the_best_model_is_the_one_of_the_judging_metric(model, tiny_runs, tmp_path, monkeypatch):
    run, judge = tmp_path / "run", HARD if model in QUANTISED else OWN
    config = config_of(tiny_runs(model), evaluate_every=4)
    good_at_first, better_and_better = iter([0.1, 0.3, 0.2]), iter([0.3, 0.2, 0.1])
    evaluate = images.ImageTask.evaluate

    def staged(task, split):
        values = dict.fromkeys(evaluate(task, split), next(better_and_better))
        return values | {judge: next(good_at_first)}

    monkeypatch.setattr(images.ImageTask, "evaluate", staged)
    assert train(config, run, quiet=True)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["best_step"] == 4
    assert summary["test"] == pytest.approx(evaluate_run(RunFolder(run), "test"), rel=1e-5)
    (run / "eval-test.json").unlink()
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        "step-4",
        "step-8",
        "step-12",
    }
    task = load_task(RunFolder(run).read_config(), CPU)[1]
    rows = task._reconstructed(RunFolder(run).load_model(CPU), task.data.test)
    save_rows(tmp_path / "of-the-best.png", rows)
    pictures = (run / "reconstructions.png", tmp_path / "of-the-best.png")
    assert len({path.read_bytes() for path in pictures}) == 1
    best = read_checkpoint(run / "checkpoints", 4)["model"]
    saved = load_file(run / "model.safetensors")
    assert saved.keys() == best.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in best.items())


def test_the_temperature_of_a_gumbel_run_falls_as_its_settings_say(tiny_runs, tmp_path):
    run = tmp_path / "run"
    settings = {"temperature": "2", "temperature_ratio": "0.25", "evaluate_every": 1}
    assert train(config_of(tiny_runs("vqvae-gumbel"), **settings), run, quiet=True)
    temperatures = [line["temperature"] for line in lines_of(run, "train")]
    assert temperatures == sorted(temperatures, reverse=True)
    assert 1.5 < temperatures[0] < 2
    assert temperatures[-3:] == pytest.approx([0.5] * 3)  # reached at 0.8 of the run


@every_model
def test_what_is_steered_is_logged(model, tiny_runs):
    gauges = {"soft-vqvae": {"temperature", "critical_temperature"}}
    gauges["vqvae-gumbel"] = {"temperature"}
    for line in lines_of(tiny_runs(model), "train"):
        logged = {name for name in line if "temperature" in name}
        assert logged == gauges.get(model, set())


def test_a_cvae_needs_the_class_of_every_image(tiny_runs, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(10):
        Image.new("L", (8, 8), 20 * number).save(folder / f"{number}.png")
    config = config_of(tiny_runs("cvae"), data="folder", data_dir=folder)
    with pytest.raises(DataError, match=r"^folder: a cvae needs the class of every image"):
        train(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "config.toml").exists()
    unlabelled = config_of(tiny_runs("vae"), data="folder", data_dir=folder, batch_size=4)
    assert train(unlabelled, tmp_path / "run", quiet=True)


@pytest.mark.parametrize(
    ("model", "kind", "settings", "wanted"),
    [
        ("vqvae", VQ, {"commitment_weight": 0.5}, {"commitment_weight": 0.5}),
        ("vqvae-ema", EMAVQ, {"decay": 0.5}, {"decay": 0.5, "commitment_weight": 0.25}),
        # Rows per batch at an even share: 32 images of 2×3 latents over 8 codes.
        (
            "vqvae-ema",
            EMAVQ,
            {"dead_code_threshold": 0.5},
            {"threshold_ema_dead_code": 0.5 * 32 * 6 / 8},
        ),
        ("vqvae2", EMAVQ, {"dead_code_threshold": 0.0}, {"threshold_ema_dead_code": 0.0}),
        ("vqvae-gumbel", GumbelVQ, {"estimator": "soft"}, {"straight_through": False}),
        ("vqvae-gumbel", GumbelVQ, {"entropy_weight": 0.3}, {"entropy_weight": 0.3}),
    ],
    ids=str,
)
def test_settings_reach_the_quantizer(model, kind, settings, wanted):
    config = TrainConfig(model=model, latent_dim=3, codebook_size=8, batch_size=32, **settings)
    quantizer = build_quantizer(config, (2, 3))
    assert type(quantizer) is kind
    assert (quantizer.dim, quantizer.codebook_size) == (3, 8)
    assert {name: getattr(quantizer, name) for name in wanted} == wanted


def test_settings_reach_the_losses():
    config = TrainConfig(
        reconstruction_weight=3.0,
        quantizing_weight=0.4,
        kl_weight=0.5,
        reconstruction_quantizing_weight=0.6,
        reconstruction_loss="absolute",
        quantized_codes="soft",
        decoder_input="quantized",
    )
    model = build_model(config.resolved(100, (1, 8, 8)), {"image_shape": (1, 8, 8), "classes": 2})
    assert model.weights == LossWeights(3.0, 0.4, 0.5, 0.6)
    assert model.reconstruction_loss == "absolute"
    assert (model.quantized_codes, model.decoder_input) == ("soft", "quantized")


def test_settings_reach_the_data():
    sizes = {"validation_fraction": 0.3, "seed": 5}
    built = build_data(TrainConfig(**sizes, image_size="6x5"))
    assert len(built.validation) == round(0.3 * 1437)
    assert built.image_shape == (1, 6, 5)
    assert built.fingerprint == load_data("digits", **sizes).fingerprint


@pytest.mark.parametrize("model", ["vqvae", "vqvae-ema", "vqvae2"])
@pytest.mark.parametrize("start", ["random", "kmeans"])
def test_codes_start_where_the_setting_says(model, start):
    config = TrainConfig(model=model, codebook_start=start)
    assert bool(build_quantizer(config, (2, 2)).initialised) == (start == "random")


@every_model
def test_codes_that_are_parameters_have_a_rate_of_their_own_and_no_decay(model, tiny_runs):
    run = RunFolder(tiny_runs(model))
    trained = run.load_model(CPU)
    config = dataclasses.replace(run.read_config(), weight_decay=0.5)
    rest, *codes = build_optimizer(config, trained).param_groups
    assert rest["weight_decay"] == 0.5
    by_gradient = model in ("soft-vqvae", "vqvae", "vqvae-gumbel")
    assert [(group["weight_decay"], len(group["params"])) for group in codes] == (
        [(0.0, 1)] if by_gradient else []
    )
    if by_gradient:
        assert codes[0]["params"][0] is trained.quantizer.codebook_parameter
