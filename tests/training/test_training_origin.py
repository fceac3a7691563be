"""A run knows its data: others are told from those it was trained on, moved ones are not."""

import json
import shutil

import pytest

from softvq.cli import main
from softvq.training import commands
from softvq.training.run_folder import RunFolder
from softvq.training.trainer import train
from tests.pictures import paint, picture

TINY = ("--steps", "4", "--width", "2", "--latent-dim", "3", "--batch-size", "8", "--quiet")
FEW = ("--steps", "2", "--width", "4", "--layers", "1", "--quiet")  # of a prior


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with pictures of ant and cat, and finished runs on them: cvae, vqvae, pixelcnn."""
    folder = tmp_path_factory.mktemp("origin")
    paint(folder / "pictures", 40, ("ant", "cat"), size=(8, 8))
    data = ("--data", "folder", "--data-dir", str(folder / "pictures"), "--workers", "0", *TINY)
    for model in ("cvae", "vqvae"):
        assert main(["train", "--model", model, *data, "--out", str(folder / model)]) == 0
    prior = ("--tokenizer", str(folder / "vqvae"), "--out", str(folder / "pixelcnn"), *FEW)
    assert main(["train", "--model", "pixelcnn", *prior]) == 0
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    """A copy in another place, whose runs still name the old one as that of their data."""
    return shutil.copytree(trained, tmp_path / "copy")


def settle(folder):
    """Let the runs name the copy."""
    for model, place in (("cvae", "pictures"), ("vqvae", "pictures"), ("pixelcnn", "vqvae")):
        option = "--tokenizer" if model == "pixelcnn" else "--data-dir"
        again = ("--resume", option, str(folder / place), "--quiet")
        assert main(["train", "--out", str(folder / model), *again]) == 0


def add_class(folder):
    """Pictures of bees, between ants and cats."""
    for number in range(100, 120):
        path = folder / "pictures" / "bee" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture(number, (8, 8)))


def refused(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("model", ["cvae", "vqvae", "pixelcnn"])
def test_a_run_does_not_go_on_with_other_images(model, folder, capsys):
    settle(folder)
    add_class(folder)
    before = (folder / model / "metrics.jsonl").read_bytes()
    error = refused(capsys, "train", "--resume", "--out", folder / model, "--quiet")
    assert f"{folder / model}: the images are not those it began with" in error
    assert (folder / model / "metrics.jsonl").read_bytes() == before


def test_a_prior_does_not_go_on_with_another_tokenizer(folder, capsys):
    settle(folder)
    again = ["--seed", "1", "--overwrite", "--out", str(folder / "vqvae")]
    config = RunFolder(folder / "vqvae").config
    assert main(["train", "--config", str(config), *again, "--quiet"]) == 0
    error = refused(capsys, "train", "--resume", "--out", folder / "pixelcnn", "--quiet")
    assert "the tokenizer is not the model whose codes it has learned" in error


def test_eval_says_that_the_images_are_others(folder, capsys):
    settle(folder)
    capsys.readouterr()
    assert main(["eval", str(folder / "vqvae")]) == 0
    assert capsys.readouterr().err == ""
    add_class(folder)
    codes = folder / "codes.npz"
    for arguments in (["eval"], ["encode", "-o", str(codes)]):
        assert main([arguments[0], str(folder / "vqvae"), *arguments[1:]]) == 0
        error = capsys.readouterr().err
        assert error.startswith(f"warning: {folder / 'vqvae'}: the images are not those it was")
        assert error.count("\n") == 1


@pytest.mark.parametrize("model", ["cvae", "pixelcnn"])
def test_a_model_is_not_told_the_numbers_of_other_classes(model, folder, capsys):
    settle(folder)
    add_class(folder)
    error = refused(capsys, "eval", folder / model)
    assert "it has learned the classes ant, cat, but the images have ant, bee, cat" in error


@pytest.mark.parametrize("model", ["cvae", "vqvae"])
def test_samples_need_no_images_and_keep_the_names_of_their_classes(model, folder, monkeypatch):
    prior = ("--prior", str(folder / "pixelcnn")) if model == "vqvae" else ()
    out, drawn = ("-o", str(folder / "samples.png")), []
    monkeypatch.setattr(commands, "save_rows", lambda path, rows: drawn.extend(rows))
    sampling = ("sample", str(folder / model), *prior, "--count", "2", *out)
    add_class(folder)
    assert main([*sampling, "--class", "cat"]) == 0
    shutil.rmtree(folder / "pictures")
    assert main([*sampling, "--class", "cat"]) == 0
    assert [label for label, _ in drawn] == ["cat", "cat"]
    assert drawn[0][1].equal(drawn[1][1])


def test_a_run_follows_its_images_and_remembers_where_they_are(folder, capsys):
    moved = (folder / "pictures").rename(folder / "moved")
    run = RunFolder(folder / "vqvae")
    before = json.loads(run.summary.read_text())["test"]
    assert commands.evaluate_run(run, "test", moved) == pytest.approx(before)
    again = ("train", "--resume", "--out", str(run.path), "--quiet")
    assert main([*again, "--data-dir", str(moved)]) == 0
    assert run.read_config().data_dir == moved
    assert main(again) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command", ["eval", "encode", "train", "eval the prior"])
def test_what_helps_when_images_are_gone_or_torn(command, folder, capsys):
    settle(folder)
    run, moved = folder / "vqvae", folder / "moved"
    torn = moved / "ant" / "000.png"
    arguments = {
        "eval": ("eval", run),
        "encode": ("encode", run, "-o", folder / "codes.npz"),
        "train": ("train", "--model", "pixelcnn", "--tokenizer", run, "--out", folder / "new"),
        "eval the prior": ("eval", folder / "pixelcnn"),
    }[command]
    for change, *helps in (
        (lambda: (folder / "pictures").rename(moved), "--data-dir", moved),
        (lambda: torn.write_bytes(torn.read_bytes()[:-60]), "--on-bad-image", "skip"),
    ):
        change()
        error = refused(capsys, *arguments)
        advice = f"softvq train --out {run} --resume"
        assert error.endswith(f" (options for the images of {run} go to {advice})\n")
        again = ("train", "--out", run, "--resume", "--quiet", *helps)
        assert main([*map(str, again)]) == 0
    assert main([*map(str, arguments), *(FEW if command == "train" else ())]) == 0


def test_a_prior_follows_its_tokenizer(folder, capsys):
    settle(folder)
    moved = (folder / "vqvae").rename(folder / "moved")
    again = ("train", "--resume", "--out", str(folder / "pixelcnn"), "--quiet")
    assert "no run there" in refused(capsys, *again)
    error = refused(capsys, "eval", folder / "pixelcnn")
    assert f"vqvae: no run there, the tokenizer of {folder / 'pixelcnn'}; where it has " in error
    assert error.endswith(f" softvq train --out {folder / 'pixelcnn'} --resume --tokenizer\n")
    assert main([*again, "--tokenizer", str(moved)]) == 0
    assert RunFolder(folder / "pixelcnn").read_config().tokenizer == moved
    assert main(["eval", str(folder / "pixelcnn"), "--data-dir", str(folder / "pictures")]) == 0


def test_a_run_killed_before_its_first_validation_knows_its_images(folder, capsys):
    settle(folder)
    run = RunFolder(folder / "vqvae")
    run.model.unlink()
    add_class(folder)
    assert "not those it began with" in refused(
        capsys, "train", "--resume", "--out", run.path, "--quiet"
    )


def test_other_settings_of_a_resumed_run_are_kept(tiny_run, tmp_path):
    run = RunFolder(shutil.copytree(tiny_run, tmp_path / "run"))
    arguments = ["train", "--resume", "--out", str(run.path), "--quiet"]
    assert main([*arguments, "--on-nan", "skip"]) == 0
    assert run.read_config().on_nan == "skip"
    assert train(run.read_config(), run.path, resume=True, quiet=True)
