"""The machine code of the kernels, for architectures that need not be here: bench compile.

In a process of its own, because the other tests of the kernels interpret Triton, and a process
either interprets or compiles. D = 64 only, and one of the other dtypes: the whole table takes a
quarter of an hour.
"""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton compiles the kernels; it is not installed")

ROOT = Path(__file__).parents[2]
MATRIX_UNIT = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
# Instructions per (row, code) pair: bf16 on sm_90.
MOST_INSTRUCTIONS = {"forward": 10.5, "row_gradients": 9.0, "code_sweep": 12.2, "nearest": 4.5}


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> dict[tuple[str, str, str], dict[str, str]]:
    """The rows that `bench compile` writes, by architecture, inputs and kernel."""
    out = tmp_path_factory.mktemp("compile") / "table.csv"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    options = "--inputs bf16 bf16/fp32 --dim 64 --call forward backward nearest"
    command = [sys.executable, "-m", "bench", "compile", *options.split(), "--out", str(out)]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert out.exists(), process.stderr
    rows = list(csv.DictReader(out.open()))
    assert process.returncode == any(row["problems"] for row in rows), process.stderr
    return {(row["architecture"], row["inputs"], row["kernel"]): row for row in rows}


@pytest.mark.parametrize("kernel", MOST_INSTRUCTIONS)
@pytest.mark.parametrize("inputs", ["bf16", "bf16/fp32"])
@pytest.mark.parametrize("architecture", MATRIX_UNIT)
def test_matrix_unit_registers_and_shared_memory(table, architecture, inputs, kernel):
    row = table[architecture, inputs, kernel]
    assert row["tensor_core"] == MATRIX_UNIT[architecture]
    assert not row["problems"]


@pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9),
    reason="the counts are those of triton 3.9; older ones need up to a fifth more",
)
@pytest.mark.parametrize("kernel", MOST_INSTRUCTIONS)
def test_instructions_per_pair(table, kernel):
    row = table["sm_90", "bf16", kernel]
    assert 0 < float(row["per_pair"]) <= MOST_INSTRUCTIONS[kernel]
