"""What does not belong together, or cannot be, is refused in one line."""

import dataclasses
import shutil

import numpy as np
import pytest

from softvq.cli import main
from softvq.data import DataError
from softvq.training.commands import decode, encode, evaluate_run, sample
from softvq.training.run_folder import RunError, RunFolder
from softvq.training.trainer import train
from tests.refusals import refused


def test_levels_of_different_counts_are_refused(tiny_runs, tmp_path):
    run, path = RunFolder(tiny_runs("vqvae2")), tmp_path / "codes.npz"
    with np.load(encode(run, None, None, path)) as file:
        arrays = dict(file)
    np.savez(path, **(arrays | {"test_top": arrays["test_top"][:5]}))
    with pytest.raises(DataError, match=r"codes\.npz: .*test_bottom"):
        decode(run, path, "test", tmp_path / "out")


@pytest.fixture
def twin(tiny_runs, tmp_path):
    """A run of another model with codes of the same shape."""
    config = dataclasses.replace(RunFolder(tiny_runs("vqvae")).read_config(), seed=1)
    assert train(config, tmp_path / "twin", quiet=True)
    return RunFolder(tmp_path / "twin")


def test_a_prior_of_another_models_codes_is_refused(tiny_runs, twin, tmp_path):
    prior = RunFolder(tiny_runs("pixelcnn", "vqvae"))
    with pytest.raises(RunError, match="not a pixelcnn for"):
        sample(twin, prior, 2, None, temperature=1.0, seed=0, out=tmp_path / "samples.png")


@pytest.mark.parametrize("changes", [{"seed": 1}, {"codebook_size": 32}], ids=str)
def test_a_prior_whose_tokenizer_was_replaced_is_not_evaluated(tiny_runs, tmp_path, changes):
    tokenizer = RunFolder(shutil.copytree(tiny_runs("vqvae"), tmp_path / "codes"))
    config = RunFolder(tiny_runs("pixelcnn", "vqvae")).read_config()
    assert train(dataclasses.replace(config, tokenizer=tokenizer.path), tmp_path / "p", quiet=True)
    other = dataclasses.replace(tokenizer.read_config(), **changes)
    assert train(other, tokenizer.path, overwrite=True, quiet=True)
    with pytest.raises(RunError, match="codes"):
        evaluate_run(RunFolder(tmp_path / "p"), "test")


def test_a_seed_that_no_generator_takes_is_one_line(tiny_runs, tmp_path, capsys):
    out = tmp_path / "samples.png"
    assert "seed" in refused(capsys, "sample", tiny_runs("vae"), "--seed", 2**70, "-o", out)


def test_a_folder_as_the_picture_is_one_line(tiny_runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.png").mkdir()
    assert refused(capsys, "sample", tiny_runs("vae"), "-o", "d.png") == "d.png: Is a directory"


def test_a_gumbel_run_cannot_learn_its_temperature_and_says_so(capsys):
    error = refused(capsys, "train", "--model", "vqvae-gumbel", "--temperature-schedule", "learned")
    assert "vqvae-gumbel" in error and "None" not in error


def test_a_prior_of_the_folder_it_is_in_is_named_after_it(tiny_runs, tmp_path, monkeypatch):
    run = shutil.copytree(tiny_runs("vqvae"), tmp_path / "codes")
    monkeypatch.chdir(run)
    arguments = ["train", "--model", "pixelcnn", "--tokenizer", ".", "--layers", "1"]
    assert main([*arguments, "--width", "2", "--steps", "1", "--quiet"]) == 0
    assert (run / "runs" / "codes-pixelcnn").is_dir()


def test_the_temperature_of_a_prior_is_refused_where_there_is_none(tiny_runs, tmp_path, capsys):
    out = tmp_path / "samples.png"
    error = refused(capsys, "sample", tiny_runs("vae"), "--temperature", "0.5", "-o", out)
    assert "temperature" in error and not out.exists()


def test_the_weights_of_a_prior_in_the_run_of_an_image_model(tiny_runs, tmp_path):
    run = RunFolder(shutil.copytree(tiny_runs("vqvae"), tmp_path / "run"))
    shutil.copy(tiny_runs("pixelcnn") / "model.safetensors", run.model)
    with pytest.raises(RunError, match=r"model\.safetensors: does not fit the run's config\.toml"):
        evaluate_run(run, "test")


def test_a_report_between_training_line_and_validation(tmp_path):
    from softvq.training.report import write_report

    (tmp_path / "config.toml").write_text('model = "vae"\ndata = "digits"\n')
    line = '{"step": 1, "split": "train", "loss": 1.0, "reconstruction_error": 0.5}\n'
    (tmp_path / "metrics.jsonl").write_text(line)
    write_report(RunFolder(tmp_path))
