"""The machine code of the kernels for bf16, D = 64 on sm_90, which need not be here: bench compile.

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
# Instructions per (row, code) pair.
MOST_INSTRUCTIONS = {"forward": 10.5, "row_gradients": 9.0, "code_sweep": 12.2, "nearest": 6.5}
SPILLS = {"forward": "12 bytes spilled", "code_sweep": "32 bytes spilled"}
SLOW = {"forward": "12.3 instructions a pair", "code_sweep": "13.45 instructions a pair"}


def kernels_except(known: dict[str, str]) -> list:
    """Every kernel; those in `known` must fail, for the reason given."""
    return [
        pytest.param(
            kernel,
            marks=[pytest.mark.xfail(strict=True, reason=known[kernel])] if kernel in known else [],
        )
        for kernel in MOST_INSTRUCTIONS
    ]


@pytest.fixture(scope="module")
def hopper(tmp_path_factory) -> dict[str, dict[str, str]]:
    """The rows that `bench compile` writes, by kernel."""
    out = tmp_path_factory.mktemp("compile") / "table.csv"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    options = "--architecture 90 --inputs bf16 --dim 64 --call forward backward nearest"
    command = [sys.executable, "-m", "bench", "compile", *options.split(), "--out", str(out)]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert out.exists(), process.stderr
    rows = list(csv.DictReader(out.open()))
    assert process.returncode == any(row["problems"] for row in rows), process.stderr
    return {row["kernel"]: row for row in rows}


@pytest.mark.parametrize("kernel", MOST_INSTRUCTIONS)
def test_the_matrix_unit_is_used(hopper, kernel):
    assert hopper[kernel]["tensor_core"] == "HGMMA"


@pytest.mark.parametrize("kernel", kernels_except(SPILLS))
def test_no_spills_and_enough_shared_memory(hopper, kernel):
    assert not hopper[kernel]["problems"]


@pytest.mark.parametrize("kernel", kernels_except(SLOW))
def test_instructions_per_pair(hopper, kernel):
    assert 0 < float(hopper[kernel]["per_pair"]) <= MOST_INSTRUCTIONS[kernel]
