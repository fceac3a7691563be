"""The machine code of the kernels, for architectures that need not be here: bench compile.

In a process of its own, because the other tests of the kernels interpret Triton, and a process
either interprets or compiles. A sample only, the hardest cases among it: all take half an hour. The
tables are committed, and must be those of the tiles as they are.
"""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from softvq.kernels import support, tiles
from softvq.kernels.arithmetic import arithmetic
from tests.kernels.choices import CHOICES

pytest.importorskip("triton", reason="Triton compiles the kernels; it is not installed")
compile = pytest.importorskip("bench.compile")

ROOT = Path(__file__).parents[2]
TABLES = ROOT / "bench" / "results" / "compile"
MATRIX_UNIT = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA"}
# Instructions per (row, code) pair: bf16, D = 64, sm_90. With 128 codes the forward has 10.5,
# but is slower on an H200: two of its programs run at a time, of this four.
MOST_INSTRUCTIONS = {"forward": 12.8, "row_gradients": 9.0, "code_sweep": 12.2, "nearest": 3.7}
SOFT = ["forward", "row_gradients", "code_sweep"]
EVERY_GRADIENT = ["--call", "backward, all", "--kernel", *SOFT]
SAMPLES = {  # name: arguments, kernels
    "bf16": (["--inputs", "bf16", "--dim", "64", "--call", "forward", "backward", "nearest",
              "--kernel", *SOFT, "nearest"], 12),
    "wide": (["--inputs", "bf16/fp32", "--dim", "256", "--architecture", "90", "100",
              *EVERY_GRADIENT], 6),
    "split": (["--inputs", "fp32 highest", "--dim", "128", "--architecture", "80", "90",
               *EVERY_GRADIENT], 7),
    "in parts": (["--inputs", "fp32 high", "--dim", "256", "--architecture", "80", "90",
                  "--call", "backward, all", "--kernel", *SOFT[1:]], 8),
    "consumer": (["--inputs", "bf16", "--dim", "256", "--architecture", "120",
                  "--call", "forward", "--kernel", "forward"], 2),
}  # fmt: skip
VERSION = support._TRITON_VERSION
for_blackwell = pytest.mark.skipif(
    VERSION < support._BLACKWELL_TRITON,
    reason="the kernels are not for Blackwell with an older triton",
)
triton_3_9 = pytest.mark.skipif(VERSION < (3, 9), reason="older compilers need more instructions")
SPILLS = {"", "spills", "spills in the loop"}
ALLOWED = {""} if VERSION >= (3, 9) else SPILLS


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """The rows that `bench compile` writes, by name of a sample; compiled once."""
    tables = {}

    def rows(name: str) -> list[dict[str, str]]:
        if name not in tables:
            out = tmp_path_factory.mktemp("compile") / "table.csv"
            environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
            command = [sys.executable, "-m", "bench", "compile", *SAMPLES[name][0]]
            process = subprocess.run(
                [*command, "--out", str(out)],
                cwd=ROOT, env=environment, capture_output=True, text=True,
            )  # fmt: skip
            assert out.exists(), process.stderr
            tables[name] = list(csv.DictReader(out.open()))
            failed = any(row["problems"] for row in tables[name])
            assert process.returncode == failed, process.stderr
        return tables[name]

    return rows


def kernel_of(row: dict[str, str]) -> tiles.Kernel:
    more = {"backward, all": SOFT[1:], "backward, partition": ["row_gradients"]}
    return row["kernel"] + ", all" * (row["kernel"] in more.get(row["call"], ()))


def operands_of(row: dict[str, str]) -> str:
    if row["kernel"] == "nearest":
        return "split" if "fp32" in row["inputs"] else "converted"
    return arithmetic(*compile.INPUTS[row["inputs"]]).operands


@for_blackwell
@pytest.mark.parametrize("name", SAMPLES)
def test_no_spill_within_shared_memory_and_on_the_matrix_unit(sample, name):
    assert len(sample(name)) == SAMPLES[name][1]
    for row in sample(name):
        assert row["tensor_core"] == MATRIX_UNIT[row["architecture"]], row
        assert row["problems"] in ALLOWED, row


@triton_3_9
@pytest.mark.parametrize("kernel", MOST_INSTRUCTIONS)
def test_instructions_per_pair(sample, kernel):
    rows = {(row["architecture"], row["kernel"]): row for row in sample("bf16")}
    assert 0 < float(rows["sm_90", kernel]["per_pair"]) <= MOST_INSTRUCTIONS[kernel]


def test_the_committed_tables_are_of_these_tiles():
    """Every tile that can be chosen has its rows, and none of them a problem; on consumers' cards,
    which share A100's tiles, some spill a little.
    """
    covered = set()
    rows = [row for path in TABLES.glob("triton-3.9.0*.csv") for row in csv.DictReader(path.open())]
    for row in rows:
        architecture = int(row["architecture"].removeprefix("sm_"))
        if architecture in compile.DATA_CENTRE:
            assert not row["problems"], row
        else:
            assert row["problems"] in SPILLS and int(row["spilled_in_loop"]) < 150, row
        if row["rows"]:
            family = compile.FAMILY[architecture]
            operands, dim = operands_of(row), int(row["dim"])
            tile = tiles.shipped(kernel_of(row), operands, dim, family)
            found = (row[name] for name in tiles.Tile._fields)
            assert tuple(map(int, found)) == tile, row
            covered.add((family, kernel_of(row), operands, max(64, dim)))
    assert covered == set(CHOICES)
