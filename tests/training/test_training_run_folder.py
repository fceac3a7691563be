"""The run folder: it holds a run and nothing else, and only what a run left is ever removed."""

import shutil

import pytest

from softvq.cli import main
from softvq.training import files
from softvq.training.config import TrainConfig
from softvq.training.run_folder import RunError, RunFolder
from softvq.training.trainer import train
from tests.pictures import paint

FOREIGN = ("photo.png", "eval-mine.json", "notes.txt", ".draft.tmp", "tensorboard/plan.txt",
           "checkpoints/other/model.pt", "checkpoints/last.ckpt")  # fmt: skip


@pytest.fixture
def config(tiny_run):
    return RunFolder(tiny_run).read_config()


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def add(folder, name):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    return path


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_other_files_is_refused(config, tmp_path, name, overwrite):
    add(tmp_path, name)
    before = contents(tmp_path)
    with pytest.raises(RunError, match=r"holds no run but other files, such as .*--out"):
        train(config, tmp_path, overwrite=overwrite, quiet=True)
    assert contents(tmp_path) == before


def test_pictures_are_not_lost_to_a_run_in_their_folder(tmp_path, capsys):
    folder = paint(tmp_path / "pictures", 10)
    flat = [path.rename(folder / path.name) for path in folder.rglob("*.png")]
    options = ["--data", "folder", "--data-dir", str(folder), "--out", str(folder)]
    with pytest.raises(SystemExit) as caught:
        main(["train", *options, "--steps", "1", "--quiet"])
    assert caught.value.code == 2
    assert f"{folder}: lies in the folder of the images" in capsys.readouterr().err
    assert all(path.is_file() for path in flat)


@pytest.mark.parametrize("model", ["soft-vqvae", "pixelcnn"])
def test_a_run_is_not_made_among_its_own_images(model, tiny_run, tmp_path, capsys):
    """Its pictures would be images of the next one, and keep it from going on itself."""
    folder = paint(tmp_path / "pictures", 20)
    options = ["--data", "folder", "--data-dir", str(folder)]
    if model == "pixelcnn":
        run = shutil.copytree(tiny_run, tmp_path / "run")
        text = RunFolder(run).config.read_text()
        text = text.replace('data = "digits"', f'data = "folder"\ndata_dir = "{folder}"')
        RunFolder(run).config.write_text(text)
        options = ["--tokenizer", str(run)]
    with pytest.raises(SystemExit):
        main(["train", "--model", model, *options, "--out", str(folder / "runs" / "a")])
    assert f"{folder / 'runs' / 'a'}: lies in the folder of the images" in capsys.readouterr().err
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("splits", [(".",), ("train", "test")], ids=str)
def test_a_run_is_not_made_among_images_behind_a_link(splits, tmp_path):
    elsewhere = paint(tmp_path / "elsewhere", 20, size=(8, 8))
    for split in splits:
        folder = tmp_path / "pictures" / split
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "class").symlink_to(elsewhere)
    config = TrainConfig(data="folder", data_dir=tmp_path / "pictures", steps=1, width=2, workers=0)
    with pytest.raises(RunError, match="lies in the folder of the images"):
        train(config, elsewhere / "run", quiet=True)
    assert train(config, tmp_path / "run", quiet=True)


def test_a_run_may_lie_beside_the_folders_of_the_splits(tmp_path):
    for split in ("train", "test"):
        paint(tmp_path / split, 20, size=(8, 8))
    config = TrainConfig(data="folder", data_dir=tmp_path, steps=1, width=2, workers=0)
    assert train(config, tmp_path / "runs" / "a", quiet=True)


def test_overwriting_removes_the_run_and_nothing_else(config, tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    kept = [add(run, name) for name in FOREIGN]
    gone = [add(run, name) for name in ("eval-test.json", "trace.json", "tensorboard/events.1")]
    run = RunFolder(run)
    run.check(overwrite=True)
    run.sweep()
    run.create(config)
    left = {path for path in run.path.rglob("*") if path.is_file()}
    assert left == {*kept, run.config}
    assert not {*gone} & left


def test_a_run_begins_where_another_was_killed_while_it_began(config, tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    (run / "config.toml").unlink()
    add(run, ".config.toml.123.tmp")
    add(run, "checkpoints/.step-9.tmp/state.json")
    assert train(config, run, quiet=True)
    assert not list(run.rglob("*.tmp"))


def test_a_file_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    path, synced = tmp_path / "summary.json", []
    monkeypatch.setattr(files, "sync", lambda place: synced.append((place, path.exists())))
    files.write_text(path, "{}")
    (content, named), folder = synced
    assert content.parent == tmp_path and not named
    assert folder == (tmp_path, True)
