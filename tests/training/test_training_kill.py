"""A run that is killed at any moment, its last checkpoint damaged, ends as if nothing had been."""

import os
import subprocess
import sys
from pathlib import Path

from tests.runs import metrics_of

KILLS = 20


def test_twenty_kills_change_no_byte(tmp_path):
    script = Path(__file__).with_name("killing.py")
    root = script.parents[2]
    done = subprocess.run(
        [sys.executable, script, tmp_path, str(KILLS), "0"],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("killed:") == KILLS
    assert "damaged:" in done.stdout and "damaged checkpoint" in done.stderr
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert metrics_of(parts) == metrics_of(whole)
    files = sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(parts) for p in parts.rglob("*") if p.is_file())
    of_the_clock = ("metrics.jsonl", "summary.json", "report.html", "state.json", "manifest.json")
    for file in files:
        if file.name not in of_the_clock:
            assert (parts / file).read_bytes() == (whole / file).read_bytes(), file
