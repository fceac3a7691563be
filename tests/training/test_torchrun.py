"""`torchrun … train.py`: a killed rank is restarted, a stopped run goes on where it was."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from softvq.training.run_folder import RunFolder
from tests.launch import ROOT, environment
from tests.runs import metrics_of

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc"),
    pytest.mark.slow,
]

STEPS = 80
SETTINGS = (
    f"--device cpu --kl-weight 0 --steps {STEPS} --batch-size 64 --width 4 --codebook-size 16 "
    "--checkpoint-every 5 --evaluate-every 40"
).split()


def start(out, *flags):
    """torchrun with two ranks, in the background."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [
            *(sys.executable, *torchrun, "--max-restarts", "1"),
            *(ROOT / "train.py", "--out", out, *flags),
        ],
        # Otherwise torchrun's second attempt often fails (docs/many-devices.md).
        env=environment() | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def last_step(out):
    """Of the newest checkpoint; 0 without one."""
    steps = [path.name.removeprefix("step-") for path in (out / "checkpoints").glob("step-*")]
    return max(map(int, steps), default=0)


def wait_until(condition, process):
    """Look often; fail when the process ends before."""
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)


def second_rank(torchrun):
    """The process of rank 1, by its environment."""
    for children in Path(f"/proc/{torchrun.pid}/task").glob("*/children"):
        for child in children.read_text().split():
            if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes():
                return int(child)
    raise AssertionError("no rank 1")


def finish(process):
    """What it printed."""
    try:
        return process.communicate(timeout=180)[0]
    finally:
        process.kill()


def check(out):
    """What a finished run of two ranks has left."""
    steps = [(line["step"], line["split"]) for line in metrics_of(out)]
    assert steps == [
        (40, "train"),
        (40, "validation"),
        (80, "train"),
        (80, "validation"),
        (80, "test"),
    ]
    files = {path.name for path in out.iterdir()}
    assert files >= {"summary.json", "report.html", "reconstructions.png", "samples.png"}
    summary = json.loads((out / "summary.json").read_text())
    assert summary["processes"] == 2 and summary["steps"] == STEPS
    RunFolder(out).load_model(torch.device("cpu"))


def test_a_killed_rank_is_restarted_from_the_checkpoint(tmp_path):
    out = tmp_path / "run"
    process = start(out, *SETTINGS)
    wait_until(lambda: last_step(out) > 0, process)
    os.kill(second_rank(process), signal.SIGKILL)
    printed = finish(process)
    assert process.returncode == 0, printed
    assert printed.count("test: hard error") == 1, printed
    check(out)


def test_a_stopped_run_saves_and_goes_on(tmp_path):
    """SIGTERM to torchrun, as from a cluster that wants its machine back."""
    out = tmp_path / "run"
    process = start(out, *SETTINGS)
    wait_until(lambda: last_step(out) > 0, process)
    process.terminate()
    printed = finish(process)
    step = last_step(out)
    assert f"stopped at step {step}, saved" in " ".join(printed.split()), printed
    resumed = start(out, "--resume")
    assert "test: hard error" in finish(resumed)
    assert resumed.returncode == 0
    check(out)
