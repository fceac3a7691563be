"""The compiled kernels, run by the emulator of bench: right for sm_80, sm_90 and sm_100.

In a process of its own, as in test_compile.py, and a sample only; bench/results/emulate has more.
"""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton compiles the kernels; it is not installed")

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("architecture", ["80", "90", "100"])
def test_within_the_bounds_of_the_tests(architecture, tmp_path):
    out = tmp_path / "table.csv"
    command = [sys.executable, "-m", "bench", "emulate", "--quick", "--architecture", architecture]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    process = subprocess.run(
        [*command, "--out", str(out)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout + process.stderr
    rows = list(csv.DictReader(out.open()))
    assert len(rows) == 32 and {row["status"] for row in rows} == {"ok"}
    assert all(float(row["error"]) <= float(row["allowed"]) for row in rows)
