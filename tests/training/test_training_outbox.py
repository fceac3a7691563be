"""A full disk: reported once, nothing lost, and written as soon as there is room."""

import contextlib
import dataclasses
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from softvq.training.checkpoint import Progress, read_checkpoint, save_checkpoint
from softvq.training.images import ImageTask
from softvq.training.outbox import Outbox
from softvq.training.resume import resume_run
from softvq.training.run_folder import RunError, RunFolder
from softvq.training.trainer import Trainer, train
from tests.runs import metrics_of

WARNING = (
    "warning: {run}: cannot be written (No space left on device); what is there is kept and the "
    "run goes on, trying again at every validation and checkpoint\n"
)


class PretendedDisk:
    """Writes reach the disk, or fail there."""

    def __init__(self, folder, monkeypatch):
        self.run, self.full, sync = folder / "run", False, os.fsync

        def fsync(descriptor):
            if self.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)

    def fill(self):
        self.full = True

    def clear(self):
        self.full = False


class SmallDisk:
    """A file system of a few megabytes in memory, and a file that takes the rest."""

    def __init__(self, folder):
        self.run, self.ballast = folder / "run", folder / "ballast"

    def fill(self):
        with self.ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"\0" * 512)

    def clear(self):
        self.ballast.unlink()


@pytest.fixture(params=["pretended", "tmpfs"])
def disk(request, tmp_path, monkeypatch):
    if request.param == "pretended":
        yield PretendedDisk(tmp_path, monkeypatch)
        return
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "softvq-test", str(tmp_path)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    try:
        yield SmallDisk(tmp_path)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.fixture
def config(tiny_run):
    return RunFolder(tiny_run).read_config()


def at_steps(monkeypatch, actions):
    """Have something happen before each of these steps."""
    step = Trainer._step

    def act_and_step(self, batch):
        actions.get(self.progress.step + 1, lambda: None)()
        step(self, batch)

    monkeypatch.setattr(Trainer, "_step", act_and_step)


def leftovers(run):
    return [path for path in run.rglob(".*")]


def test_a_disk_that_is_full_for_a_while(disk, config, tiny_run, monkeypatch, capsys):
    """Full while two validations and a checkpoint are due; both would be written to."""
    seen = {}

    def look():
        seen["metrics"] = metrics_of(disk.run)
        seen["steps"] = sorted(path.name for path in (disk.run / "checkpoints").iterdir())
        read_checkpoint(disk.run / "checkpoints", 5)
        with torch.random.fork_rng():
            RunFolder(disk.run).load_model(torch.device("cpu"))
        disk.clear()

    at_steps(monkeypatch, {6: disk.fill, 12: look})
    assert train(config, disk.run, quiet=True)
    assert capsys.readouterr().err == WARNING.format(run=disk.run)
    assert {5} <= {line["step"] for line in seen["metrics"]} <= {5, 10}  # 10 may just have fitted
    assert seen["steps"] == ["step-4", "step-5"]
    # Afterwards nothing is missing.
    assert metrics_of(disk.run) == metrics_of(tiny_run)
    one, other = ((run / "model.safetensors").read_bytes() for run in (disk.run, tiny_run))
    assert one == other
    assert read_checkpoint(disk.run / "checkpoints", 12)["progress"]["step"] == 12
    assert leftovers(disk.run) == []


def test_a_log_on_the_full_disk(disk, config, tiny_run, monkeypatch):
    """Neither its lines nor the warning can be written; that is no reason to stop either."""

    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys, "stdout", Full())
    monkeypatch.setattr(sys, "stderr", Full())
    at_steps(monkeypatch, {6: disk.fill, 12: disk.clear})
    assert train(config, disk.run)
    assert metrics_of(disk.run) == metrics_of(tiny_run)


def test_a_checkpoint_comes_after_what_waits(tmp_path, monkeypatch):
    """Or it would know of more than the other files do."""
    disk = PretendedDisk(tmp_path, monkeypatch)
    disk.run.mkdir()
    outbox = Outbox(RunFolder(disk.run))
    disk.fill()
    outbox.metrics(5, "train", {"loss": 1.0})
    disk.clear()
    assert outbox.checkpoint(Progress(step=5), {})
    assert metrics_of(disk.run) == [{"step": 5, "split": "train", "loss": 1.0}]


def test_a_disk_that_fills_twice_is_reported_twice(disk, config, monkeypatch, capsys):
    at_steps(monkeypatch, {3: disk.fill, 6: disk.clear, 9: disk.fill, 12: disk.clear})
    assert train(config, disk.run, quiet=True)
    assert capsys.readouterr().err == 2 * WARNING.format(run=disk.run)


def test_a_disk_that_stays_full(disk, config, tiny_run, monkeypatch):
    at_steps(monkeypatch, {10: disk.fill})
    with pytest.raises(RunError, match=r"the disk is full; make room and finish .* --resume"):
        train(config, disk.run, quiet=True)
    disk.clear()
    monkeypatch.undo()
    assert train(config, disk.run, resume=True, quiet=True)
    one, other = ((run / "model.safetensors").read_bytes() for run in (disk.run, tiny_run))
    assert one == other and metrics_of(disk.run) == metrics_of(tiny_run)


def test_a_stop_that_finds_the_disk_full_says_so(disk, config, monkeypatch, capsys):
    def stop():
        disk.fill()
        signal.raise_signal(signal.SIGTERM)

    at_steps(monkeypatch, {7: stop})
    assert not train(config, disk.run)
    assert "stopped at step 7, not saved, the disk is full" in capsys.readouterr().out
    disk.clear()
    monkeypatch.undo()
    assert train(config, disk.run, resume=True, quiet=True)


def test_a_line_that_fits_by_half_is_taken_back(tmp_path, monkeypatch):
    run = RunFolder(tmp_path)
    run.append_metrics(1, "train", {"loss": 1.0})
    before = run.metrics.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: pytest.fail("not all is written"))
        resource = pytest.importorskip("resource")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
        try:
            with pytest.raises(OSError, match="No space left on device"):
                run.append_metrics(2, "train", {"loss": 2.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, ignored)
    assert run.metrics.read_bytes() == before


def test_other_errors_end_the_run(config, tmp_path, monkeypatch):
    def broken(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    at_steps(monkeypatch, {4: lambda: monkeypatch.setattr(os, "fsync", broken)})
    with pytest.raises(OSError, match="Input/output error"):
        train(config, tmp_path / "run", quiet=True)


def test_stale_temporary_files_are_removed(config, tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    for stale in (".model.safetensors.123.tmp", "checkpoints/.step-9.tmp/state.json"):
        (run / stale).parent.mkdir(exist_ok=True)
        (run / stale).write_bytes(b"half")
    (run / "checkpoints" / ".step-3.old.tmp").mkdir()
    assert train(config, run, resume=True, quiet=True)
    assert leftovers(run) == []


def test_a_resumed_run_leaves_out_torn_lines_and_says_so(config, tiny_run, tmp_path, capsys):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text('{"step": 1, "spl\n' + text + '{"step": 13}\n{"st')
    assert train(config, run, resume=True, quiet=True)
    error = capsys.readouterr().err
    assert error == f"warning: {run}/metrics.jsonl: 3 torn lines left out\n"
    assert metrics_of(run) == metrics_of(tiny_run)


def damage(path):
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize("what", ["missing", "damaged", "of a later step"])
def test_the_best_weights_are_restored(what, config, tiny_run, tmp_path):
    """From the checkpoint of the best step."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    best = (run / "model.safetensors").read_bytes()
    match what:
        case "missing":
            (run / "model.safetensors").unlink()
        case "damaged":
            damage(run / "model.safetensors")
        case "of a later step":
            (run / "model.safetensors").write_bytes(best[:-4] + b"\0\0\0\0")
    assert train(config, run, resume=True, quiet=True)
    assert (run / "model.safetensors").read_bytes() == best


def test_the_best_weights_are_lost(tmp_path, capsys):
    """Neither the file nor its checkpoint has them: said, and chosen anew."""
    run, parts = RunFolder(tmp_path), {"model": torch.nn.Linear(3, 2)}
    for step in (2, 3):
        progress = Progress(step=step, best_step=2, best_error=0.5, best_sha256="of step 2")
        save_checkpoint(run.checkpoints, progress, parts)
    damage(run.checkpoints / "step-2" / "tensors.safetensors")
    progress = resume_run(run, parts, {}, 10)
    assert (progress.step, progress.best_step, progress.best_error) == (3, 0, float("inf"))
    error = capsys.readouterr().err
    assert "not the best weights, and the checkpoint of step 2 that had them is damaged" in error


def test_the_best_step_always_has_a_checkpoint(config, tmp_path, monkeypatch):
    errors = iter([0.3, 0.2, 0.4])  # of steps 5, 10 and 12; the last one always has a checkpoint
    monkeypatch.setattr(
        ImageTask, "evaluate", lambda self, split: {"reconstruction_hard_error": next(errors)}
    )
    rare = dataclasses.replace(config, checkpoint_every=100)
    assert train(rare, tmp_path / "run", quiet=True)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["best_step"] == 10
    assert (tmp_path / "run" / "checkpoints" / "step-10").is_dir()


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(config, tiny_run, tmp_path):
    RunFolder(tmp_path / "run").path.mkdir()
    RunFolder(tmp_path / "run").create(config)
    assert train(config, tmp_path / "run", resume=True, quiet=True)
    one, other = (run / "model.safetensors" for run in (tmp_path / "run", tiny_run))
    assert one.read_bytes() == other.read_bytes()
