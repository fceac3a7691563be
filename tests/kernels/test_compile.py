"""The machine code of the kernels, for architectures that need not be here: `bench compile`.

In a process of its own, because the other tests of the kernels interpret Triton, and a process
either interprets or compiles.
"""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton compiles the kernels; it is not installed")

ROOT = Path(__file__).parents[2]
# Instructions per (row, code) pair at D = 64, bf16, sm_90.
MOST_INSTRUCTIONS = {"forward": 10.5, "row_gradients": 9.0, "code_sweep": 12.2, "nearest": 6.5}
MATRIX_UNIT = {"80": "HMMA", "90": "HGMMA", "100": "UTCHMMA"}


def table(out: Path, *options: str) -> list[dict[str, str]]:
    """The rows that `bench compile --quick` with more options writes."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench", "compile", "--quick", "--out", str(out), *options]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert out.exists(), process.stderr
    rows = list(csv.DictReader(out.open()))
    assert process.returncode == any(row["problems"] for row in rows), process.stderr
    return rows


def assert_sound(rows: list[dict[str, str]], architecture: str) -> None:
    """No spill, shared and tensor memory within the device's, its own matrix instructions."""
    assert {row["kernel"] for row in rows} >= set(MOST_INSTRUCTIONS)
    for row in rows:
        assert not row["problems"], row
        if row["kernel"] in MOST_INSTRUCTIONS:
            assert row["tensor_core"] == MATRIX_UNIT[architecture], row


@pytest.fixture(scope="module")
def hopper(tmp_path_factory) -> list[dict[str, str]]:
    """bf16 on sm_90."""
    out = tmp_path_factory.mktemp("compile") / "table.csv"
    return table(out, "--architecture", "90", "--inputs", "bf16")


def test_bf16_on_hopper(hopper):
    assert_sound(hopper, "90")


@pytest.mark.parametrize("kernel", MOST_INSTRUCTIONS)
def test_instructions_per_pair(hopper, kernel):
    (row,) = (row for row in hopper if row["kernel"] == kernel and row["dim"] == "64")
    assert 0 < float(row["per_pair"]) <= MOST_INSTRUCTIONS[kernel]


@pytest.mark.parametrize(
    ("architecture", "inputs"), [("80", "bf16"), ("100", "bf16"), ("90", "fp32 highest")]
)
def test_other_architectures_and_float32(tmp_path, architecture, inputs):
    options = ("--architecture", architecture, "--inputs", inputs, "--dim", "64")
    assert_sound(table(tmp_path / "table.csv", *options), architecture)
