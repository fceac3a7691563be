"""Runs whose pictures are decoded when they are needed: the same bits as from memory."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from softvq.cli import main
from softvq.training import build, machine, ranks
from softvq.training.advice import memory_advice
from softvq.training.build import build_data
from softvq.training.checkpoint import read_checkpoint
from softvq.training.commands import encode, evaluate_run
from softvq.training.config import STREAM_ABOVE, TrainConfig
from softvq.training.guards import TrainingError
from softvq.training.load import load_task
from softvq.training.run_folder import RunFolder
from softvq.training.settings import ConfigError
from softvq.training.trainer import Trainer, batches, train
from tests.launch import RANKS, launch
from tests.pictures import packed, paint
from tests.runs import metrics_of

CPU = torch.device("cpu")
TINY = {"steps": 12, "evaluate_every": 5, "checkpoint_every": 4, "width": 2, "device": "cpu"}
EVERY = {"soft-vqvae": {"codebook_size": 8, "latent_dim": 3}, "cvae": {"latent_dim": 3}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return paint(tmp_path_factory.mktemp("pictures"), 60, size=(8, 8))


def config_of(folder, model="soft-vqvae", **settings):
    options = {"data": "folder", "data_dir": folder, "batch_size": 8, "workers": 0}
    return TrainConfig(model=model, **TINY | EVERY[model] | options | settings)


@pytest.fixture(scope="module")
def in_memory(folder, tmp_path_factory):
    """The finished run of each model, from memory. Copy it before changing it."""
    out = tmp_path_factory.mktemp("in-memory")
    for model in EVERY:
        assert train(config_of(folder, model, stream="off"), out / model, quiet=True)
    return out


def same_runs(one, other):
    """Both left the same weights, metrics and pictures."""
    assert metrics_of(one) == metrics_of(other)
    for name in ("model.safetensors", "reconstructions.png", "samples.png"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize(("model", "workers"), [*((m, 0) for m in EVERY), ("soft-vqvae", 2)])
def test_a_streamed_run_is_the_run_from_memory(folder, in_memory, tmp_path, model, workers):
    config = config_of(folder, model, stream="on", workers=workers)
    _, task = load_task(config, CPU)
    assert task.streamed
    assert train(config, tmp_path / "run", quiet=True)
    same_runs(tmp_path / "run", in_memory / model)


def test_so_is_one_from_shards(folder, in_memory, tmp_path):
    shards = packed(folder, tmp_path / "shards", 25)
    assert train(config_of(shards, stream="on"), tmp_path / "run", quiet=True)
    same_runs(tmp_path / "run", in_memory / "soft-vqvae")


def test_a_killed_run_goes_on_exactly(folder, in_memory, tmp_path, monkeypatch):
    """An epoch has 5 steps: the newest checkpoint, of step 8, lies in the middle of one."""
    config, run, step = config_of(folder, stream="on", workers=2), tmp_path / "run", Trainer._step

    def step_and_cut_the_power(self, batch):
        step(self, batch)
        if self.progress.step == 9:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_step", step_and_cut_the_power)
        train(config, run, quiet=True)
    assert [path.name for path in sorted(run.glob("checkpoints/*"))][-1] == "step-8"
    assert train(config, run, resume=True, quiet=True)
    same_runs(run, in_memory / "soft-vqvae")


def test_a_prior_of_streamed_images(folder, in_memory, tmp_path):
    left = []
    for stream in ("off", "on"):
        tokenizer = shutil.copytree(in_memory / "soft-vqvae", tmp_path / stream)
        RunFolder(tokenizer).config.write_text(config_of(folder, stream=stream).resolved(
            60, (3, 8, 8)).to_toml())  # fmt: skip
        config = TrainConfig(
            model="pixelcnn", tokenizer=tokenizer, **TINY | {"width": 4}, batch_size=8, layers=2
        )
        assert train(config, tmp_path / f"prior-{stream}", quiet=True)
        left.append(tmp_path / f"prior-{stream}")
    assert metrics_of(left[0]) == metrics_of(left[1])
    one, other = ((run / "model.safetensors").read_bytes() for run in left)
    assert one == other


@pytest.fixture
def streamed_run(folder, in_memory, tmp_path):
    """A finished run, as one that has streamed."""
    run = RunFolder(shutil.copytree(in_memory / "cvae", tmp_path / "streamed"))
    run.config.write_text(run.config.read_text().replace('stream = "off"', 'stream = "on"'))
    assert run.read_config().stream == "on"
    return run


def test_what_can_be_done_afterwards(folder, in_memory, streamed_run, tmp_path):
    values = evaluate_run(streamed_run, "train")
    assert values == evaluate_run(RunFolder(in_memory / "cvae"), "train")
    out = ["-o", str(tmp_path / "samples.png")]
    assert main(["sample", str(streamed_run.path), "--count", "4", "--class", "bee", *out]) == 0

    run = RunFolder(shutil.copytree(in_memory / "soft-vqvae", tmp_path / "coded"))
    left = []
    for stream in ("off", "on"):
        text = run.config.read_text()
        run.config.write_text(re.sub('stream = ".*"', f'stream = "{stream}"', text))
        with np.load(encode(run, None, None, tmp_path / f"{stream}.npz")) as file:
            left.append({name: file[name] for name in file})
    for name, array in left[0].items():
        assert np.array_equal(array, left[1][name])
    picture = str(next(folder.rglob("*.png")))
    out = ["-o", str(tmp_path / "pictures")]
    assert main(["reconstruct", str(run.path), picture, *out]) == 0


def test_other_data_have_no_such_settings(in_memory, tmp_path):
    run = RunFolder(shutil.copytree(in_memory / "soft-vqvae", tmp_path / "run"))
    assert encode(run, "digits", None, tmp_path / "codes.npz").is_file()


# When to stream.


@pytest.mark.parametrize(
    ("setting", "value"), [("stream", "on"), ("workers", 2), ("on_bad_image", "skip")]
)
def test_only_for_folders(setting, value):
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**{setting: value})
    assert str(caught.value) == f"{setting}: {value} does not apply to data digits, only to folder"
    TrainConfig(data="folder", **{setting: value})
    with pytest.raises(ConfigError, match=f"^{setting}: {value} does not apply to model pixelcnn"):
        TrainConfig(model="pixelcnn", tokenizer=Path("run"), **{setting: value})


def test_auto_is_a_matter_of_memory(folder, monkeypatch):
    size = build_data(config_of(folder, stream="off")).train.decoded_bytes
    for memory, streamed in ((size / STREAM_ABOVE, False), (size / STREAM_ABOVE - 9, True)):
        monkeypatch.setattr(machine, "memory", lambda device, memory=memory: memory)
        assert build_data(config_of(folder)).train.streamed == streamed


def test_memory_and_cores(monkeypatch, tmp_path):
    alone = machine.memory(CPU)
    assert alone > 1e8
    for text, limit in (("max\n", alone), ("5000000\n", 5_000_000)):
        (tmp_path / "memory.max").write_text(text)
        monkeypatch.setattr(machine, "CONTAINER", tmp_path / "memory.max")
        assert machine.memory(CPU) == limit
    available = machine.cores()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert machine.cores() == max(1, available // 2)


def test_as_many_processes_as_cores(folder, monkeypatch):
    readings = []
    monkeypatch.setattr(build, "load_data", lambda *_, reading, **__: readings.append(reading))
    for cores in (3, 100):
        monkeypatch.setattr(machine, "cores", lambda cores=cores: cores)
        build_data(config_of(folder, workers=None))
    assert [reading.workers for reading in readings] == [3, 8]


def test_a_dry_run_says_it(folder, capsys):
    arguments = ["train", "--dry-run", "--data", "folder", "--data-dir", str(folder)]
    assert main([*arguments, "--stream", "on"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("43 images to train on, from folder; 0.0 MB streamed")
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("43 images to train on, from folder; 0.0 MB in memory")


# Pictures that cannot be read, and processes that are lost.


@pytest.fixture
def torn(folder, tmp_path):
    """The data with a picture whose header is good, and its path: it comes in step 3."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = config_of(folder, stream="off")
    chosen = list(zip(range(3), batches(43, 8, config.seed, 0), strict=False))[2][1][5]
    first = build_data(config).train.images[chosen]
    bad = next(p for p in sorted(copy.rglob("*.png")) if int(p.stem) == first[0, 0, 0])
    bad.write_bytes(bad.read_bytes()[:-60])
    return copy, bad


def test_a_bad_picture_ends_the_run_which_can_go_on_without(torn, tmp_path, capsys):
    folder, bad = torn
    settings = config_of(folder, stream="on", checkpoint_every=1)
    (tmp_path / "config.toml").write_text(settings.to_toml())
    run = tmp_path / "run"
    options = ["--out", str(run), "--quiet"]
    with pytest.raises(SystemExit) as caught:
        main(["train", "--config", str(tmp_path / "config.toml"), *options])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"softvq train: error: {bad}: cannot read this image")
    assert error.count("\n") == 1
    assert read_checkpoint(run / "checkpoints", 2)
    assert main(["train", "--resume", "--on-bad-image", "skip", *options]) == 0
    error = capsys.readouterr().err
    assert f"warning: 1 picture that cannot be read left out: {bad}\n" in error
    assert json.loads((run / "summary.json").read_text())["steps"] == 12


def test_what_takes_its_place_is_always_the_same(torn, tmp_path):
    folder, _ = torn
    for workers in (0, 2):
        config = config_of(folder, stream="on", on_bad_image="skip", workers=workers)
        assert train(config, tmp_path / str(workers), quiet=True)
    same_runs(tmp_path / "0", tmp_path / "2")


def test_a_lost_process_is_an_error_of_one_line():
    lost = pytest.raises(TrainingError, match=r"a process .* was lost.* Killed.*lower --workers")
    with lost, memory_advice(TrainConfig()):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")


# Several ranks.


def test_ranks_decode_their_parts_alone(folder, monkeypatch):
    config, task = load_task(config_of(folder, stream="on"), CPU)
    order = list(zip(range(4), batches(task.examples, 8, config.seed, 0), strict=False))
    (whole,) = task.load([torch.cat([batch for _, batch in order])])
    monkeypatch.setattr(ranks, "count", lambda: 2)
    parts = []
    for number in range(2):
        monkeypatch.setattr(ranks, "rank", lambda number=number: number)
        parts.append(list(task.load(ranks.part_of(batch) for _, batch in order)))
    assert all(len(labels) == 4 for part in parts for _, labels in part)
    halves = [batch.images for step in zip(*parts, strict=True) for batch in step]
    assert torch.equal(torch.cat(halves), whole.images)


def test_two_ranks_stream_as_they_train_from_memory(folder, tmp_path):
    done = launch(Path(__file__).with_name("streamed_worker.py"), folder, tmp_path, groups=2)
    assert [process.returncode for process in done] == [0] * RANKS, done
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("on", "off"))
    assert one == other
    seen = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    for one, other in zip(*seen, strict=True):
        assert len(one) == len(other) == 4 and not set(one) & set(other)
