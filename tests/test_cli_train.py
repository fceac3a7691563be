"""What `softvq train` refuses: one clear line and exit status 2, and nothing is lost."""

import shutil
from pathlib import Path

import pytest

from tests.pictures import plain
from tests.refusals import refused

pytestmark = pytest.mark.usefixtures("elsewhere")


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--codebok-size", "8"), "unknown option --codebok-size, did you mean --codebook-size?"),
        (("--codebok-size=8",), "unknown option --codebok-size=8, did you mean --codebook-size?"),
        (("--xyzzy",), "unknown option --xyzzy"),
        (("--step", "3"), "unknown option --step, did you mean --steps?"),
        (("--model", "gan"), "argument --model: invalid choice: 'gan' (choose from "),
        (("--data", "digit"), "argument --data: invalid choice: 'digit' (choose from "),
        (("--steps", "0"), "steps: 0 is not allowed; it must be from 1 to 2^48"),
        (("--steps", "many"), "argument --steps: invalid int value: 'many'"),
        (("--steps",), "argument --steps: expected one argument"),
        (("--temperature", "0"), "temperature: 0 is not allowed; it must be auto or a number"),
        (("--temperature", "-1"), "temperature: -1 is not allowed"),
        (("--temperature", "nan"), "temperature: nan is not allowed"),
        (("--codebook-size", "0"), "codebook_size: 0 is not allowed"),
        (("--lr", "nan"), "lr: nan is not allowed"),
        (("--batch-size", "1"), "batch_size: 1 is not allowed"),
        (("--seed", "99999999999999999999"), "seed: 99999999999999999999 is not allowed"),
        (("--latent-grid", "9x2"), "latent_grid: latent grid 9x2 must lie between 1x1 and "),
        (("--data", "folder"), "folder: needs the folder of the images; give it with --data-dir"),
        (("--data", "folder", "--data-dir", "gone"), "gone: no such folder"),
        (
            ("--data-dir", "pictures"),
            "data_dir: pictures does not apply to data digits, which have no folder; for one of ",
        ),
        (("--config", "gone.toml"), "gone.toml: cannot read the configuration"),
        (("--resume",), "--resume needs the run folder: --out RUN"),
        (("--resume", "--out", "gone"), "gone: no run there (no config.toml)"),
        (
            ("--model", "vae", "--codebook-size", "8"),
            "codebook_size: 8 does not apply to model vae, only to soft-vqvae, vqvae, ",
        ),
        (("--decay", "0.9"), "decay: 0.9 does not apply to model soft-vqvae, only to vqvae-ema"),
        (
            ("--model", "vqvae", "--tokenizer", "run"),
            "tokenizer: run does not apply to model vqvae, only to pixelcnn",
        ),
        (
            ("--model", "pixelcnn", "--tokenizer", "run", "--data", "digits"),
            "data: digits does not apply to model pixelcnn, only to ",
        ),
        (("--model", "pixelcnn"), "tokenizer: a pixelcnn learns the codes of a trained model"),
        (("--model", "pixelcnn", "--tokenizer", "gone"), "gone: no run there (no config.toml)"),
        (("--resume", "--overwrite"), "argument --overwrite: not allowed with argument --resume"),
        (("--out", "/proc/x"), "/proc/x: cannot write a run there ("),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_train_refuses(arguments, message, capsys, tmp_path):
    line = refused(capsys, "train", *arguments)
    assert line.startswith(message)
    assert ("did you mean" in line) == ("did you mean" in message)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_images(tmp_path, capsys):
    folder = plain(tmp_path / "empty", [])
    line = refused(capsys, "train", "--data", "folder", "--data-dir", folder)
    assert line.startswith(f"{folder}: no images there")


def test_images_of_several_sizes(tmp_path, capsys):
    folder = plain(tmp_path / "mixed", [(8, 8)] * 9 + [(9, 8)])
    line = refused(capsys, "train", "--data", "folder", "--data-dir", folder)
    assert "9.png: 8x9 pixels, but" in line and "--image-size" in line


def test_a_truncated_idx_file(tmp_path, capsys):
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (tmp_path / f"{name}-ubyte").write_bytes(b"\0\0\x08\x03\0\0\0\x05\0\0\0\x1c")
    line = refused(capsys, "train", "--data", "mnist", "--data-dir", tmp_path)
    assert line.startswith(f"{tmp_path}/train-images-idx3-ubyte: is not an idx file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = = 2", "c.toml: not valid TOML ("),
        ("stepz = 2", "c.toml: unknown setting 'stepz', did you mean steps?"),
        ("steps = 'two'", "c.toml: steps: 'two' is not a whole number"),
        ("data_dir = 3", "c.toml: data_dir: 3 is not a path"),
        ("steps = 0", "c.toml: steps: 0 is not allowed; it must be from 1 to 2^48"),
        ("dropout = 0.5", "c.toml: dropout: 0.5 does not apply to model soft-vqvae, only to"),
    ],
)
def test_a_bad_configuration_file(text, message, capsys):
    Path("c.toml").write_text(text)
    assert refused(capsys, "train", "--config", "c.toml").startswith(message)


def test_a_run_is_not_overwritten_unasked(run, capsys):
    before = files(run)
    line = refused(capsys, "train", "--out", run)
    assert line.startswith(f"{run}: already holds a run; continue it with --resume")
    assert files(run) == before


def test_overwriting_with_bad_data_loses_nothing(run, capsys):
    before = files(run)
    arguments = ("--overwrite", "--out", run, "--data", "folder", "--data-dir", "gone")
    assert refused(capsys, "train", *arguments).startswith("gone: no such folder")
    assert refused(capsys, "train", "--overwrite", "--out", run, "--latent-grid", "99")
    assert files(run) == before


@pytest.mark.parametrize("below", ["", "run"])
def test_a_run_folder_that_cannot_be_made(below, tmp_path, capsys):
    (tmp_path / "file").write_text("here already")
    out = tmp_path / "file" / below
    line = refused(capsys, "train", "--out", out)
    assert line.startswith(f"{out}: cannot write a run there (")


def test_resume_keeps_the_settings(run, capsys):
    before = files(run)
    line = refused(capsys, "train", "--resume", "--out", run, "--lr", "0.5")
    assert line.startswith("lr: 0.5 differs from the run's 0.002")
    Path("c.toml").write_text("lr = 0.5")
    assert refused(capsys, "train", "--resume", "--out", run, "--config", "c.toml") == line
    assert files(run) == before


@pytest.mark.parametrize(
    ("option", "value"), [("temperature", "0.5"), ("latent-grid", "2x1"), ("latent-grid", "two")]
)
def test_resume_refuses_other_values_as_text(option, value, run, capsys):
    line = refused(capsys, "train", "--resume", "--out", run, f"--{option}", value)
    assert line.startswith(f"{option.replace('-', '_')}: {value} differs from the run's ")


def test_resume_without_a_usable_checkpoint(run, capsys):
    states = sorted((run / "checkpoints").rglob("tensors.safetensors"))
    for state in states:
        state.write_bytes(b"garbage" * 10)
    line = refused(capsys, "train", "--resume", "--out", run, "--quiet")
    assert line.startswith(f"{run}/checkpoints/step-12: damaged checkpoint (tensors.safetensors ")
    shutil.rmtree(run / "checkpoints")
    line = refused(capsys, "train", "--resume", "--out", run, "--quiet")
    assert line.startswith(f"{run}: no checkpoint to resume from")
