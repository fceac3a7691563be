"""The compiled kernels, run by the emulator of bench: right for sm_80, sm_90 and sm_100.

In a process of its own, as in test_compile.py, and a sample only; bench/results/emulate has more.
"""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from softvq.kernels import support

pytest.importorskip("triton", reason="Triton compiles the kernels; it is not installed")

ROOT = Path(__file__).parents[2]


def emulate(tmp_path: Path, *arguments: str) -> list[dict[str, str]]:
    """The rows of `bench emulate`, none of which may break its bound."""
    out = tmp_path / "table.csv"
    command = [sys.executable, "-m", "bench", "emulate", *arguments, "--out", str(out)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    rows = list(csv.DictReader(out.open()))
    assert {row["status"] for row in rows} == {"ok"}
    assert all(float(row["error"]) <= float(row["allowed"]) for row in rows)
    return rows


for_blackwell = pytest.mark.skipif(
    support._TRITON_VERSION < support._BLACKWELL_TRITON,
    reason="the kernels are not for Blackwell with an older triton",
)


@pytest.mark.parametrize("architecture", ["80", "90", pytest.param("100", marks=for_blackwell)])
def test_within_the_bounds_of_the_tests(architecture, tmp_path):
    assert len(emulate(tmp_path, "--quick", "--architecture", architecture)) == 18


def test_tiles_of_consumer_cards(tmp_path):
    """Ampere's products in smaller tiles."""
    what = ["--quick", "--inputs", "bf16", "--architecture", "120"]
    assert len(emulate(tmp_path, *what)) == 9


@pytest.mark.parametrize(
    ("inputs", "kind"), [("bf16", "many codes"), ("fp32 highest", "many rows")]
)
def test_what_a_matrix_unit_cuts_off_does_not_add_up(inputs, kind, tmp_path):
    what = ["--inputs", inputs, "--kind", kind, "--dim", "64", "--architecture", "90"]
    assert len(emulate(tmp_path, *what)) == 7
