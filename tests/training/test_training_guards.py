"""Numbers that are not finite: named, and kept out of everything that lasts."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from softvq.cli import main
from softvq.metrics import Mean
from softvq.models import TrainingStep
from softvq.quantizers import EMAVQ, VQ
from softvq.training import steering
from softvq.training.config import TrainConfig, torch_device
from softvq.training.families import IMAGES, MODELS
from softvq.training.guards import Guard, TrainingError
from softvq.training.images import ImageTask
from softvq.training.load import load_task
from softvq.training.run_folder import RunFolder
from softvq.training.task import Task
from softvq.training.trainer import Trainer, train

NAN, INF = float("nan"), float("inf")
TO_PIXELS = "softvq.training.images.to_pixels"


@pytest.fixture
def config(tiny_run):
    return RunFolder(tiny_run).read_config()


def spoil(monkeypatch, task: Task, steps):
    """Make the batches of these steps, 0 the next one, NaN: images, or the loss where are none."""
    taken, step = iter(range(10**6)), task.step

    def spoilt(batch):
        if next(taken) not in steps:
            return step(batch)
        if not isinstance(task, ImageTask):
            seen = step(batch)
            return seen._replace(losses={k: v * NAN for k, v in seen.losses.items()})
        with monkeypatch.context() as patch:
            patch.setattr(TO_PIXELS, lambda images, _: images * NAN)
            return step(batch)

    monkeypatch.setattr(task, "step", spoilt)


def trainer_of(run, tmp_path, **changes):
    config = dataclasses.replace(RunFolder(run).read_config(), **changes)
    device = torch_device("cpu")
    config, task = load_task(config, device)
    return Trainer(config, RunFolder(tmp_path / "run"), task, device, quiet=True)


def state_of(trainer):
    """Everything that lasts and moves, cloned."""
    left_out = ("losses", "origin")
    parts = {n: part.state_dict() for n, part in trainer.parts.items() if n not in left_out}
    return torch.utils._pytree.tree_map(
        lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, parts
    )


def assert_same(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def advance(trainer, steps):
    batches = trainer._batches()
    for _ in range(steps):
        trainer._step(next(batches))


@pytest.mark.parametrize("model", MODELS)
def test_a_bad_step_ends_the_run_and_moves_no_weight(model, tiny_runs, tmp_path, monkeypatch):
    trainer = trainer_of(tiny_runs(model), tmp_path)
    trainer.task.start(next(trainer._batches()))
    spoil(monkeypatch, trainer.task, {3})
    advance(trainer, 3)
    before = state_of(trainer)
    term = "reconstruction_error" if model in IMAGES else "bits_per_latent"
    with pytest.raises(TrainingError, match=f"^step 4: {term} is not finite; no weight has seen"):
        advance(trainer, 1)
    after = state_of(trainer)
    assert_same(after["optimizer"]["state"], before["optimizer"]["state"])
    for name, weights in trainer.model.named_parameters():
        assert torch.equal(weights, before["model"][name]), name


def test_no_later_step_moves_a_weight_before_the_host_hears_of_it(tiny_runs, tmp_path, monkeypatch):
    """As on a GPU, which is steps behind."""
    trainer = trainer_of(tiny_runs("vqvae"), tmp_path)
    trainer.task.start(next(trainer._batches()))
    spoil(monkeypatch, trainer.task, {3})
    advance(trainer, 3)
    before = state_of(trainer)
    with monkeypatch.context() as patch:
        patch.setattr(Guard, "raise_if_bad", lambda self: None)
        advance(trainer, 4)
    assert_same(state_of(trainer)["optimizer"]["state"], before["optimizer"]["state"])
    for name, weights in trainer.model.named_parameters():
        assert torch.equal(weights, before["model"][name]), name
    for act in (trainer._log, trainer._save, lambda: advance(trainer, 1)):
        with pytest.raises(TrainingError, match=r"^step 4: reconstruction_error is not finite"):
            act()
    assert not trainer.run.path.exists()


BUSY = {"dead_code_threshold": 0.9}


@pytest.mark.parametrize("model", MODELS)
def test_a_skipped_step_leaves_everything_as_it_was(model, tiny_runs, tmp_path, monkeypatch):
    monkeypatch.setattr(steering, "RESTART_EVERY", 1)
    monkeypatch.setattr(steering, "RESTART_FROM", 0.0)
    monkeypatch.setattr("softvq.training.steering.MEASURE_EVERY", 1)
    busy = BUSY if model in ("soft-vqvae", "vqvae-ema", "vqvae2") else {}
    trainer = trainer_of(tiny_runs(model), tmp_path, on_nan="skip", **busy)
    trainer.task.start(next(trainer._batches()))
    spoil(monkeypatch, trainer.task, {3, 5})
    advance(trainer, 3)
    before = state_of(trainer)
    advance(trainer, 1)
    after = state_of(trainer)
    before["optimizer"].pop("param_groups"), after["optimizer"].pop("param_groups")
    assert_same(after, before)
    advance(trainer, 1)
    assert not torch.equal(next(trainer.model.parameters()), next(iter(before["model"].values())))
    before = state_of(trainer)
    advance(trainer, 1)
    assert_same(state_of(trainer)["model"], before["model"])
    values = trainer.guard.read(trainer.losses)
    assert values["skipped"] == pytest.approx(2 / 6)
    assert all(torch.tensor(value).isfinite() for value in values.values())


def test_a_mean_is_that_of_the_steps_that_were_not_skipped():
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    guard = Guard(TrainConfig(on_nan="skip"), model, torch.nn.Module(), optimizer)
    mean = Mean()
    for step, loss in enumerate((2.0, NAN, 4.0, 6.0), 1):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        seen = guard.check(TrainingStep({"loss": torch.tensor(loss)}, {}, {}), step)
        mean.add(seen.losses, 1)
    values = guard.read(mean)
    assert values["loss"] == pytest.approx(4) and values["skipped"] == 0.25


def test_skipping_changes_nothing_in_a_run_without_bad_steps(config, tiny_run, tmp_path):
    assert train(dataclasses.replace(config, on_nan="skip"), tmp_path / "run", quiet=True)
    one, other = (run / "model.safetensors" for run in (tiny_run, tmp_path / "run"))
    assert one.read_bytes() == other.read_bytes()


def test_a_run_that_skips_says_so_once_and_in_its_metrics(config, tmp_path, monkeypatch, capsys):
    steps, forward = iter(range(1, 100)), Trainer._step

    def one_bad(self, batch):
        with monkeypatch.context() as patch:
            if next(steps) in (3, 7):
                patch.setattr(TO_PIXELS, lambda images, _: images * NAN)
            forward(self, batch)

    monkeypatch.setattr(Trainer, "_step", one_bad)
    assert train(dataclasses.replace(config, on_nan="skip"), tmp_path / "run", quiet=True)
    assert capsys.readouterr().err == (
        "warning: step 3: reconstruction_error is not finite; such steps are skipped, see "
        "`skipped` in metrics.jsonl\n"
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    shares = {line["step"]: line["skipped"] for line in lines if line["split"] == "train"}
    assert shares == pytest.approx({5: 0.2, 10: 0.2, 12: 0.0})
    assert all(torch.tensor(value).isfinite() for value in lines[0].values() if value != "train")


def test_a_run_with_nothing_but_bad_steps_ends(tiny_runs, tmp_path, monkeypatch):
    monkeypatch.setattr(
        TO_PIXELS,
        lambda images, device: images.float() / 255 + (NAN if len(images) == 32 else 0),
    )
    config = RunFolder(tiny_runs("ae")).read_config()
    broken = dataclasses.replace(config, on_nan="skip")
    with pytest.raises(TrainingError, match=r"^step 1: .* every step since the last validation"):
        train(broken, tmp_path / "run", quiet=True)


def guard_of(*weights, **settings):
    model = torch.nn.Module()
    for number, weight in enumerate(weights):
        model.register_parameter(f"weight{number}", torch.nn.Parameter(torch.tensor(weight)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    return model, optimizer, Guard(TrainConfig(**settings), model, torch.nn.Module(), optimizer)


@pytest.mark.parametrize(
    ("losses", "gradient", "named"),
    [
        ({"loss": NAN, "reconstruction_error": 1.0, "kl": INF}, NAN, "kl"),
        ({"loss": NAN, "reconstruction_error": NAN, "kl": 0.0}, NAN, "reconstruction_error"),
        ({"loss": -INF, "kl": 1.0}, 1.0, "loss"),
        ({"loss": 1.0, "kl": 1.0}, INF, "gradient"),
    ],
)
def test_the_term_is_named(losses, gradient, named):
    model, _, guard = guard_of(1.0)
    model.weight0.grad = torch.tensor(gradient)
    seen = TrainingStep({name: torch.tensor(value) for name, value in losses.items()}, {}, {})
    with pytest.raises(TrainingError, match=f"^step 8: {named} is not finite"):
        guard.check(seen, 8)


@pytest.mark.parametrize(("clip", "length"), [(0.0, 5.0), (2.0, 2.0), (9.0, 5.0)])
def test_a_long_gradient_is_clipped_and_its_own_length_logged(clip, length):
    model, _, guard = guard_of(1.0, 2.0, clip_gradient=clip)
    model.weight0.grad, model.weight1.grad = torch.tensor(3.0), torch.tensor(-4.0)
    seen = guard.check(TrainingStep({"loss": torch.tensor(1.0)}, {}, {}), 1)
    assert seen.losses["gradient_norm"] == 5.0
    gradient = torch.stack([model.weight0.grad, model.weight1.grad])
    assert gradient.norm().item() == pytest.approx(length, rel=1e-5)
    assert gradient[1] / gradient[0] == pytest.approx(-4 / 3)


def test_the_default_clips_the_prior_only():
    assert TrainConfig().clip_gradient == 0.0
    assert TrainConfig(model="pixelcnn", tokenizer=Path("run")).clip_gradient == 1.0


def test_the_length_of_the_gradient_is_in_the_metrics(tiny_run):
    lines = [json.loads(line) for line in (tiny_run / "metrics.jsonl").open()]
    assert all(line["gradient_norm"] > 0 for line in lines if line["split"] == "train")


def test_skipping_does_not_wait_for_the_device(monkeypatch):
    _, _, guard = guard_of(1.0, on_nan="skip")
    guard.parameters[0].grad = torch.tensor(1.0)
    seen = TrainingStep({"loss": torch.tensor(1.0)}, {}, {})
    guard.check(seen, 1)
    for name in ("item", "__bool__", "tolist", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("waits for the device"))
    guard.remember()
    guard.check(seen, 2)
    guard.restore()


@pytest.mark.parametrize("quantizer", [VQ, EMAVQ])
def test_kmeans_waits_for_latents_that_are_finite(quantizer):
    vq = quantizer(2, 4, kmeans_init=True)
    before = vq.codebook.detach().clone()
    vq._initialise(torch.full((32, 2), NAN))
    assert torch.equal(vq.codebook, before) and not vq.initialised and not vq._is_initialised
    vq._initialise(torch.randn(32, 2))
    assert not torch.equal(vq.codebook, before) and vq.initialised and vq._is_initialised


def test_bad_steps_may_be_skipped_from_the_checkpoint_before(config, tmp_path, monkeypatch):
    forward = Trainer._step

    def bad_at_seven(self, batch):
        with monkeypatch.context() as patch:
            if self.progress.step == 6:
                patch.setattr(TO_PIXELS, lambda images, _: images * NAN)
            forward(self, batch)

    monkeypatch.setattr(Trainer, "_step", bad_at_seven)
    run = tmp_path / "run"
    with pytest.raises(TrainingError, match=r"^step 7: .* --on-nan skip$"):
        train(config, run, quiet=True)
    for path in (run / "checkpoints").iterdir():
        assert "nan" not in (path / "state.json").read_text().lower()
    assert main(["train", "--resume", "--out", str(run), "--on-nan", "skip", "--quiet"]) == 0
    assert (run / "summary.json").exists()
