"""The training loop: what a run leaves, that it can be repeated, stopped and gone on with."""

import dataclasses
import itertools
import json
import re
import shutil
import signal
from functools import partial

import pytest
import torch

from softvq.cli import main
from softvq.training import steering
from softvq.training.checkpoint import read_checkpoint
from softvq.training.families import MODELS
from softvq.training.guards import Guard
from softvq.training.run_folder import RunError, RunFolder
from softvq.training.trainer import Trainer, TrainingError, batches, set_learning_rates, train
from tests.runs import metrics_of

# The metrics that a run of a Soft VQ-VAE promises.
METRICS = {
    "reconstruction_error",
    "quantizing_error",
    "reconstruction_quantizing_error",
    "reconstruction_hard_error",
    "kl",
    "codebook_usage",
    "perplexity",
    "max_probability",
    "psnr",
    "psnr_hard",
}


def weights_of(run):
    return (run / "model.safetensors").read_bytes()


def same_runs(one, other):
    """Both left the same weights, metrics and pictures."""
    assert weights_of(one) == weights_of(other)
    assert metrics_of(one) == metrics_of(other)
    pictures = [{p.name: p.read_bytes() for p in run.glob("*.png")} for run in (one, other)]
    assert pictures[0] == pictures[1]


@pytest.fixture
def config(tiny_run):
    return RunFolder(tiny_run).read_config()


def test_the_metrics_have_the_names_of_the_contract(tiny_run):
    lines = metrics_of(tiny_run)
    assert [(line["step"], line["split"]) for line in lines] == [
        *itertools.product((5, 10, 12), ("train", "validation")),
        (12, "test"),
    ]
    for line in lines:
        if line["split"] == "train":
            assert {"loss", "reconstruction_error", "quantizing_error", "kl"} <= line.keys()
            assert {"temperature", "learning_rate"} <= line.keys()
        else:
            assert line.keys() >= METRICS
            double, quarter = line["codebook_usage_double"], line["codebook_usage_quarter"]
            assert 0 <= double <= quarter <= line["codebook_usage"] <= 1
            assert 1 <= line["perplexity"] <= 8


def test_the_summary(tiny_run):
    summary = json.loads((tiny_run / "summary.json").read_text())
    assert summary.keys() >= {"test", "images_per_second", "device", "seed", "steps", "versions"}
    lines = metrics_of(tiny_run)
    assert lines[-1] == {"step": 12, "split": "test"} | summary["test"]
    errors = {
        line["step"]: line["reconstruction_hard_error"]
        for line in lines
        if line["split"] == "validation"
    }
    assert summary["best_step"] == min(errors, key=errors.get)
    assert summary["steps"] == 12


@pytest.mark.parametrize("model", MODELS)
def test_config_toml_alone_repeats_the_run(model, tiny_runs, tmp_path):
    run, again = tiny_runs(model), tmp_path / "again"
    torch.manual_seed(1234)  # nothing outside the file may matter
    arguments = ["train", "--config", str(run / "config.toml"), "--out", str(again)]
    assert main([*arguments, "--quiet"]) == 0
    same_runs(again, run)
    assert (again / "config.toml").read_text() == (run / "config.toml").read_text()


def test_the_seed_matters(config, tiny_run, tmp_path):
    train(dataclasses.replace(config, seed=1), tmp_path / "other", quiet=True)
    assert weights_of(tmp_path / "other") != weights_of(tiny_run)


BUSY = {
    "soft-vqvae": {"dead_code_threshold": 0.9, "decoder_input": "quantized"},
    "vqvae-ema": {"dead_code_threshold": 0.9, "decay": 0.5},
    "vqvae2": {"dead_code_threshold": 0.9, "decay": 0.5},
}


@pytest.fixture
def busy(request, tiny_runs, monkeypatch):
    """Settings under which every part with a state is at work within the 12 steps."""
    monkeypatch.setattr(steering, "RESTART_EVERY", 2)
    monkeypatch.setattr(steering, "RESTART_FROM", 0.0)
    monkeypatch.setattr("softvq.training.steering.MEASURE_EVERY", 3)
    model = getattr(request, "param", "soft-vqvae")
    config = RunFolder(tiny_runs(model)).read_config()
    return dataclasses.replace(config, **BUSY.get(model, {}))


def interrupt(monkeypatch, at, what):
    """Have `what` happen right after a step."""
    step = Trainer._step

    def step_and_interrupt(self, batch):
        step(self, batch)
        if self.progress.step == at:
            what()

    monkeypatch.setattr(Trainer, "_step", step_and_interrupt)


def power_cut():
    raise KeyboardInterrupt


@pytest.mark.parametrize("busy", MODELS, indirect=True)
def test_a_signal_stops_after_the_step_and_resume_goes_on_exactly(busy, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(busy, whole, quiet=True)
    # Neither a validation nor a checkpoint is due at step 7.
    for at, number in ((7, signal.SIGINT), (10, signal.SIGTERM)):
        with monkeypatch.context() as patch:
            interrupt(patch, at, partial(signal.raise_signal, number))
            assert not train(busy, parts, resume=at > 7, quiet=True)
        assert f"step-{at}" in {path.name for path in (parts / "checkpoints").iterdir()}
        assert not (parts / "summary.json").exists()
    assert train(busy, parts, resume=True, quiet=True)
    same_runs(parts, whole)


def test_a_killed_run_goes_on_exactly(busy, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(busy, whole, quiet=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, 11, power_cut)  # the newest checkpoint is that of step 8
        train(busy, parts, quiet=True)
    with (parts / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "spl')
    assert train(busy, parts, resume=True, quiet=True)
    same_runs(parts, whole)


def test_resuming_a_finished_run_changes_nothing(config, tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    assert train(config, run, resume=True, quiet=True)
    same_runs(run, tiny_run)


def test_resuming_with_fewer_steps_than_were_trained(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace("steps = 12", "steps = 7"))
    before = metrics_of(run)
    with pytest.raises(RunError, match=r"run: trained for 12 steps, more than .* has, 7"):
        train(RunFolder(run).read_config(), run, resume=True, quiet=True)
    assert metrics_of(run) == before


def test_overwrite_leaves_nothing_of_the_old_run(config, tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    short = dataclasses.replace(config, steps=2)
    assert train(short, run, overwrite=True, quiet=True)
    assert [line["step"] for line in metrics_of(run)] == [2, 2, 2]
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-0", "step-2"}


@pytest.mark.parametrize(("evaluate_every", "checkpoint_every"), [(7, 3), (12, 1), (12, 3)])
def test_a_run_that_diverges_keeps_its_last_good_checkpoint(
    config, tmp_path, monkeypatch, evaluate_every, checkpoint_every
):
    step = Trainer._step

    def step_into_the_void(self, batch):
        if self.progress.step == 6:
            self.model.quantizer.codebook_parameter.data.fill_(float("nan"))
        step(self, batch)

    monkeypatch.setattr(Trainer, "_step", step_into_the_void)
    broken = dataclasses.replace(
        config, evaluate_every=evaluate_every, checkpoint_every=checkpoint_every
    )
    with pytest.raises(TrainingError, match="step 7: reconstruction_error is not finite"):
        train(broken, tmp_path / "run", quiet=True)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir())[-1] == "step-6"
    newest = read_checkpoint(checkpoints, 6)
    assert all(tensor.isfinite().all() for tensor in newest["model"].values())


def test_weights_that_overflow_are_not_saved(config, tmp_path, monkeypatch):
    """The losses of the step before know nothing of it."""
    step = Trainer._step

    def overflow(self, batch):
        step(self, batch)
        if self.progress.step == 8:
            next(self.model.encoder.parameters()).data.fill_(float("inf"))

    monkeypatch.setattr(Trainer, "_step", overflow)
    with pytest.raises(TrainingError, match=r"the weights became .* before step 8"):
        train(config, tmp_path / "run", quiet=True)


def test_steering_may_stumble_before_the_host_hears_of_a_bad_step(config, tmp_path, monkeypatch):
    """As on a GPU: a covariance that is not finite has no eigenvalues."""
    step, calls, complain = Trainer._step, [], Guard.raise_if_bad

    def step_into_the_void(self, batch):
        if self.progress.step == 9:  # at step 10 the critical temperature is measured
            next(self.model.encoder.parameters()).data.fill_(float("nan"))
        step(self, batch)

    def late(self):
        calls.append(self.bad.item())
        if sum(calls) > 1:
            complain(self)

    monkeypatch.setattr(Trainer, "_step", step_into_the_void)
    monkeypatch.setattr(Guard, "raise_if_bad", late)
    with pytest.raises(TrainingError, match="step 10: reconstruction_error is not finite"):
        train(config, tmp_path / "run", quiet=True)
    assert sum(calls) == 2


def test_a_run_that_diverges_exits_with_1_and_one_line(tmp_path, capsys):
    arguments = ["train", "--steps", "9", "--width", "2", "--lr", "1e30", "--evaluate-every", "3"]
    assert main([*arguments, "--out", str(tmp_path / "run"), "--quiet"]) == 1
    error = capsys.readouterr().err
    assert re.match(r"softvq train: (step [123]: \w+ is not|the weights became .* before) ", error)
    assert error.count("\n") == 1


def test_a_batch_larger_than_the_data_is_all_of_it(config, tmp_path):
    big = dataclasses.replace(config, batch_size=100_000, steps=1)
    assert train(big, tmp_path / "run", quiet=True)
    whole = dataclasses.replace(config, batch_size=1293, steps=1)
    assert train(whole, tmp_path / "whole", quiet=True)
    same_runs(tmp_path / "run", tmp_path / "whole")


def test_learning_rates(config):
    config = dataclasses.replace(config, steps=2000, lr=0.5, codebook_lr_factor=4.0)
    optimizer = torch.optim.SGD(
        [{"params": torch.zeros(1)}, {"params": torch.zeros(1)}], lr=torch.nan
    )

    def rates(step):
        set_learning_rates(optimizer, config, step)
        return tuple(group["lr"] for group in optimizer.param_groups)

    assert rates(0) == pytest.approx((0.5 / 100, 2.0), rel=1e-3)
    assert rates(49) == pytest.approx((0.5 / 2, 2.0), rel=1e-2)
    assert rates(99) == pytest.approx((0.5, 2.0), rel=1e-2)
    assert rates(1000) == pytest.approx((0.25, 1.0))
    assert 0 < rates(1999)[0] < 1e-5 and rates(1999)[1] == pytest.approx(0.02)
    networks = [rates(step)[0] for step in range(99, 2000)]
    assert all(a > b for a, b in itertools.pairwise(networks))


def test_a_short_run_warms_up_too(config):
    optimizer = torch.optim.SGD([{"params": torch.zeros(1)}, {"params": torch.zeros(1)}], lr=1.0)
    set_learning_rates(optimizer, dataclasses.replace(config, steps=1, lr=0.5), 0)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_every_step_has_its_learning_rate(config, tiny_run):
    optimizer = torch.optim.SGD([{"params": torch.zeros(1)}], lr=torch.nan)
    logged = [line for line in metrics_of(tiny_run) if line["split"] == "train"]
    for line in logged:
        set_learning_rates(optimizer, config, line["step"] - 1)
        assert line["learning_rate"] == pytest.approx(optimizer.param_groups[0]["lr"])
    assert len({line["learning_rate"] for line in logged}) == len(logged) == 3


def take(number, **options):
    return list(itertools.islice(batches(**options), number))


def test_every_epoch_is_a_permutation():
    epochs = [torch.cat(take(6, images=12, batch_size=2, seed=0, start=6 * e)) for e in range(3)]
    assert all(sorted(epoch.tolist()) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 3


def test_the_last_smaller_batch_is_left_out():
    sizes = [len(batch) for batch in take(8, images=11, batch_size=3, seed=0, start=0)]
    assert sizes == [3] * 8
    epoch = torch.cat(take(3, images=11, batch_size=3, seed=0, start=0))
    assert len(set(epoch.tolist())) == 9


@pytest.mark.parametrize("start", [1, 3, 4, 11])
def test_batches_go_on_where_they_stopped(start):
    options = {"images": 11, "batch_size": 3, "seed": 5}
    whole = take(20, **options, start=0)
    rest = take(20 - start, **options, start=start)
    assert all(torch.equal(a, b) for a, b in zip(whole[start:], rest, strict=True))


def test_batches_follow_the_seed():
    epochs = [e for s in (0, 1) for e in take(2, images=50, batch_size=50, seed=s, start=0)]
    # Neighbouring seeds share no epoch either, as seed + epoch would have it.
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4
