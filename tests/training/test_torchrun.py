"""`torchrun … train.py`: one rank is killed, both are restarted, the run folder is complete."""

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

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc"),
    pytest.mark.slow,
]

STEPS = 80
SETTINGS = {
    "kl-weight": 0,
    "steps": STEPS,
    "batch-size": 64,
    "width": 4,
    "codebook-size": 16,
    "checkpoint-every": 5,
    "evaluate-every": 40,
}


def start(out):
    """torchrun with two ranks, in the background."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    settings = [f"--{name}={value}" for name, value in SETTINGS.items()]
    return subprocess.Popen(
        [
            *(sys.executable, *torchrun, "--max-restarts", "1"),
            *(ROOT / "train.py", "--device", "cpu", "--out", out, *settings),
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


def test_a_killed_rank_is_restarted_from_the_checkpoint(tmp_path):
    out = tmp_path / "run"
    process = start(out)
    wait_until(lambda: last_step(out) > 0, process)
    os.kill(second_rank(process), signal.SIGKILL)
    printed = finish(process)
    assert process.returncode == 0, printed
    assert printed.count("test: hard error") == 1, printed

    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [(line["step"], line["split"]) for line in lines]
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
