"""What `softvq train` can do beside training: a plan, a trace, event files."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from softvq.cli import main
from softvq.training import tensorboard
from softvq.training.config import TrainConfig, read_config
from softvq.training.load import load_task
from softvq.training.memory import activation_bytes, peak_memory
from softvq.training.plan import memory
from softvq.training.run_folder import RunFolder
from softvq.training.settings import ConfigError
from softvq.training.tensorboard import Board, picture
from softvq.training.trainer import train

CPU = torch.device("cpu")


@pytest.fixture
def config(tiny_run):
    return RunFolder(tiny_run).read_config()


def planned(capsys, *options) -> tuple[dict[str, str], str]:
    """The plan's lines by name, and all of it."""
    assert main(["train", "--dry-run", *options]) == 0
    text = capsys.readouterr().out
    lines = [line.split(maxsplit=2) for line in text.splitlines() if line.startswith("# ")]
    return {name: words for _, name, words in lines}, text


def test_a_dry_run_leaves_nothing_and_its_plan_starts_the_run(
    config, tiny_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    _, text = planned(capsys, "--config", str(tiny_run / "config.toml"), "--overwrite")
    assert list(tmp_path.iterdir()) == []
    path = tmp_path / "plan.toml"
    path.write_text(text)
    assert TrainConfig(**read_config(path)) == config


def test_the_plan_says_what_is_to_come(config, tiny_run, capsys):
    plan, _ = planned(capsys, "--config", str(tiny_run / "config.toml"), "--steps", "100")
    _, task = load_task(config, CPU)
    weights = sum(p.numel() for p in task.model.parameters())
    assert plan["data"] == "1,293 images to train on, from digits; 0.1 MB in memory"
    assert plan["model"].startswith(f"soft-vqvae, {weights:,} parameters: encoder ")
    assert plan["model"].endswith(", quantizer 24")
    assert plan["steps"].startswith("100 of 32, 2.5 epochs; validation every 5, ")
    assert plan["device"].endswith(", float32")
    assert "optimizer" in plan["memory"] and "activations" in plan["memory"]


def test_the_plan_of_a_prior(tiny_runs, capsys):
    plan, _ = planned(capsys, "--config", str(tiny_runs("pixelcnn") / "config.toml"))
    assert plan["data"].startswith("1,293 codes of images") and "networks" in plan["model"]


def test_the_plan_of_a_resumed_run_is_its_own(config, tiny_run, capsys):
    before = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")}
    _, text = planned(capsys, "--resume", "--out", str(tiny_run))
    assert text.endswith(config.to_toml())
    assert {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")} == before


def test_the_memory_of_a_batch_is_that_of_a_whole_forward_pass(config, capsys):
    config = dataclasses.replace(config, batch_size=1000)
    config, task = load_task(config, CPU)
    (batch,) = task.load([torch.arange(1000)])
    whole = activation_bytes(task, batch, torch.float32)
    words = memory(config, task, torch.float32).rpartition("activations ")[2]
    assert float(words.removesuffix(" MB")) == pytest.approx(whole / 1e6, abs=0.06)


class OneLayer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.Sigmoid())

    def step(self, batch):
        return self.model(torch.ones(len(batch), 10, requires_grad=True))


def test_activations_are_counted_once_and_weights_are_not():
    """What the layer reads, what the sigmoid returns; under autocast a copy of the weight too."""
    task, batch = OneLayer(), torch.arange(7)
    assert activation_bytes(task, batch, torch.float32) == 7 * (10 + 20) * 4
    assert activation_bytes(task, batch, torch.bfloat16) == (7 * (10 + 20) + 10 * 20) * 2


def test_peak_memory_is_in_bytes(tiny_run):
    before = peak_memory(CPU)
    held = torch.ones(2**26)
    assert 2**20 < before <= peak_memory(CPU) and peak_memory(CPU) >= held.nbytes
    lines = [json.loads(line) for line in (tiny_run / "metrics.jsonl").open()]
    assert all(line["peak_memory"] > 2**20 for line in lines if line["split"] == "train")


def test_a_trace_of_some_steps_changes_nothing(config, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr("softvq.training.trace.WARM_STEPS", 3)
    run = tmp_path / "run"
    assert train(config, run, quiet=True, profile=2)
    events = json.loads((run / "trace.json").read_text())["traceEvents"]
    steps = [event["name"] for event in events if event["name"].startswith("ProfilerStep")]
    assert set(steps) == {"ProfilerStep#4", "ProfilerStep#5"}
    assert (run / "model.safetensors").read_bytes() == (tiny_run / "model.safetensors").read_bytes()
    assert train(config, run, quiet=True, overwrite=True)
    assert not (run / "trace.json").exists()


@pytest.mark.parametrize("value", ["0", "-1", "some"])
def test_a_trace_of_no_steps(value, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", "--profile", value])
    assert caught.value.code == 2
    line = f"argument --profile: {value} is not allowed; it must be at least 1"
    assert line in capsys.readouterr().err


def test_a_trace_needs_steps(config, tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"a trace of 1 steps needs 13, .* has 12 to go"):
        train(config, run, quiet=True, profile=1, overwrite=True)
    with pytest.raises(ConfigError, match=r"a trace of 1 steps needs 13, .* has 0 to go"):
        train(config, run, quiet=True, profile=1, resume=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    longer = dataclasses.replace(config, steps=13)
    assert train(longer, run, quiet=True, profile=1, overwrite=True)
    assert (run / "trace.json").is_file()


def test_without_tensorboard(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as caught:
        main(["train", "--tensorboard", "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and "softvq[tensorboard]" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.fixture
def written(monkeypatch):
    """Calls of a writer that stands in for TensorBoard's: (tag, value or shape, step)."""
    calls, opened = [], []
    writer = SimpleNamespace(
        add_scalar=lambda *call: calls.append(call),
        add_image=lambda tag, image, step: calls.append((tag, tuple(image.shape), step)),
        flush=lambda: None,
        close=lambda: None,
    )
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: True)
    monkeypatch.setattr(Board, "_writer", lambda self, **how: opened.append(how) or writer)
    return SimpleNamespace(calls=calls, opened=opened)


def test_tensorboard_has_the_numbers_of_metrics_jsonl_and_pictures(config, tmp_path, written):
    run = tmp_path / "run"
    assert train(config, run, quiet=True, tensorboard=True)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    expected = {
        (f"{name}/{line['split']}", value, line["step"])
        for line in lines
        for name, value in line.items()
        if name not in ("split", "step")
    }
    pictures = [call for call in written.calls if call[0] == "reconstructions"]
    assert expected == set(written.calls) - set(pictures)
    assert [step for *_, step in pictures] == [5, 10, 12]
    assert pictures[0][1] == (1, 4 * 56, 12 * 56)
    longer = dataclasses.replace(config)
    assert train(longer, run, quiet=True, resume=True, tensorboard=True)
    assert written.opened == [{}, {}, {"purge_step": 13}]


def test_a_prior_has_no_pictures(tiny_runs, tmp_path, written):
    config = RunFolder(tiny_runs("pixelcnn")).read_config()
    assert train(config, tmp_path / "run", quiet=True, tensorboard=True)
    assert written.calls and not any(tag == "reconstructions" for tag, *_ in written.calls)


def test_a_picture_of_rows():
    black, white = torch.zeros(2, 3, 60, 60), torch.ones(2, 3, 60, 60)
    found = picture([("input", black), ("output", white)])
    assert found.shape == (3, 120, 120) and found.dtype == torch.uint8
    assert (found[:, :60] == 0).all() and (found[:, 60:] == 255).all()


def test_event_files(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = Board(tmp_path)
    board.write(5, "train", {"loss": 2.0})
    board.write(7, "train", {"loss": 9.0})
    board.show(5, [("input", torch.rand(2, 1, 8, 8))])
    board.drop_after(5)
    board.write(6, "train", {"loss": 1.0})
    board.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/train")] == [(5, 2.0), (6, 1.0)]
    assert [e.step for e in events.Images("reconstructions")] == [5]
