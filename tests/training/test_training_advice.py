"""Advice in one line: a codebook that collapsed, memory that is not enough."""

import dataclasses
import json

import pytest
import torch

from softvq.cli import main
from softvq.models import CodeLevel
from softvq.training import advice
from softvq.training.advice import memory_advice, warn_of_collapse
from softvq.training.checkpoint import Progress
from softvq.training.config import TrainConfig
from softvq.training.families import QUANTISED
from softvq.training.guards import TrainingError
from softvq.training.images import ImageTask
from softvq.training.run_folder import RunFolder
from softvq.training.trainer import train


def warnings_of(
    perplexity, *, step=500, steps=1000, size=100, suffix="", level="codes", model="soft-vqvae"
):
    progress = Progress(step=step)
    levels = {level: CodeLevel((1, 1), size)}
    config = TrainConfig(model=model, steps=steps)
    warn_of_collapse(config, progress, levels, {f"perplexity{suffix}": perplexity})
    return progress.warnings


@pytest.mark.parametrize("model", QUANTISED)
def test_a_collapsed_codebook(model, capsys):
    (line,) = warnings_of(4.9, model=model)
    assert line.startswith("step 500: the codebook has collapsed: perplexity 4.9 of 100 codes; try")
    assert capsys.readouterr().err == f"warning: {line}\n"
    settings = {field.name for field in dataclasses.fields(TrainConfig)}
    advised = [word.removeprefix("--") for word in line.split() if word.startswith("--")]
    assert advised and {name.replace("-", "_") for name in advised} <= settings
    for name in advised:
        if name != "model":
            assert getattr(TrainConfig(model=model), name.replace("-", "_")) is not None


@pytest.mark.parametrize(
    "options",
    [
        {"perplexity": 5.1},
        {"perplexity": 4.9, "step": 333},
        {"perplexity": 4.9, "step": 99, "steps": 100},
        {"perplexity": 1.1, "size": 8},
        {"perplexity": 1.0, "size": 1},
        {"perplexity": 4.9, "suffix": "_other"},
    ],
    ids=str,
)
def test_no_collapse(options):
    assert warnings_of(**options) == []


def test_few_codes_of_which_one_is_left():
    assert len(warnings_of(1.0, size=8)) == 1


def test_the_level_is_named():
    (line,) = warnings_of(2.0, level="top", suffix="_top")
    assert "the codebook top has collapsed" in line


@pytest.fixture
def config(tiny_run):
    return RunFolder(tiny_run).read_config()


def test_a_run_warns_once_and_its_summary_keeps_it(config, tmp_path, monkeypatch, capsys):
    evaluate = ImageTask.evaluate
    monkeypatch.setattr(advice, "AT_LEAST", 0)
    monkeypatch.setattr(
        ImageTask, "evaluate", lambda self, split: evaluate(self, split) | {"perplexity": 1.0}
    )
    often = dataclasses.replace(config, evaluate_every=2)
    assert train(often, tmp_path / "run", quiet=True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    (line,) = summary["warnings"]
    assert line.startswith("step 4: the codebook has collapsed")
    assert capsys.readouterr().err == f"warning: {line}\n"
    assert train(often, tmp_path / "run", resume=True, quiet=True)
    assert capsys.readouterr().err == ""
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["warnings"] == [line]


def test_a_run_without_warnings(tiny_run):
    assert json.loads((tiny_run / "summary.json").read_text())["warnings"] == []


def test_too_little_memory_for_the_codebook(tmp_path, capsys):
    size = 10**13
    arguments = ["train", "--codebook-size", str(size), "--out", str(tmp_path / "run"), "--quiet"]
    assert main(arguments) == 1
    assert capsys.readouterr().err == (
        "softvq train: out of memory; lower --batch-size (now 256) or --codebook-size "
        f"(now {size}) or --width (now 32)\n"
    )


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried …"), MemoryError()], ids=repr
)
def test_too_little_memory_in_a_step(error, config, tmp_path, monkeypatch):
    def fail(self, batch):
        raise error

    monkeypatch.setattr(ImageTask, "step", fail)
    with pytest.raises(TrainingError, match=r"lower --batch-size \(now 32\) or --codebook-size"):
        train(config, tmp_path / "run", quiet=True)


@pytest.mark.parametrize("method", ["evaluate", "finish"])
def test_too_little_memory_for_a_split_has_nothing_to_do_with_the_batch(
    method, config, tmp_path, monkeypatch
):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(ImageTask, method, fail)
    with pytest.raises(
        TrainingError, match=r"lower --codebook-size \(now 8\) or --width \(now 2\)$"
    ):
        train(config, tmp_path / "run", quiet=True)


def test_smaller_images_and_streamed_ones_take_less_memory():
    folder = TrainConfig(data="folder", image_size="64", stream="off")
    with pytest.raises(TrainingError) as caught, memory_advice(folder):
        raise MemoryError
    assert str(caught.value).endswith("or --image-size (now 64), or give --stream on")


def test_too_little_memory_for_another_command(tiny_run, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(RunFolder, "load_model", fail)
    assert main(["eval", str(tiny_run)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("softvq eval: out of memory; close ") and error.count("\n") == 1


def test_advice_for_dense_networks_and_none_for_other_errors():
    dense = TrainConfig(model="ae", architecture="dense")
    with pytest.raises(TrainingError) as caught, memory_advice(dense):
        raise MemoryError
    assert str(caught.value) == (
        "out of memory; lower --batch-size (now 256) or --hidden (now 256,64)"
    )
    with pytest.raises(RuntimeError, match="something else"), memory_advice(dense):
        raise RuntimeError("something else")
