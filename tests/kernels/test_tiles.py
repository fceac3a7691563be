"""The tiles: those near a shipped one can run, and take what the compiler says that they take."""

import csv
from itertools import chain
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the fused kernels are written in Triton")

from softvq.kernels import tiles
from softvq.kernels.arithmetic import arithmetic
from tests.kernels.choices import CHOICES

TABLES = Path(__file__).parents[2] / "bench" / "results" / "compile"
SHARED_MEMORY = {"hopper": 227 * 1024, "blackwell": 227 * 1024, "ampere": 99 * 1024}


def test_neighbours_can_run():
    for (architecture, kernel, operands, dim), shipped in CHOICES.items():
        limit = SHARED_MEMORY[architecture]
        found = tiles.neighbours(kernel, operands, dim, shipped, limit)
        assert found[0] == shipped and len(set(found)) == len(found)
        assert 1 <= len(found) <= 12  # 1: more warps than the rule below allows, to spare registers
        for tile in found:
            assert tiles.CODE_MULTIPLE % tile.codes == 0
            assert all(size >= 16 and size & (size - 1) == 0 for size in tile[:2])
            assert tile.codes >= 32 or kernel not in ("forward", "nearest")
            assert tile.warps >= 1 and tile[3:] == shipped[3:]
            assert tiles.shared_bytes(kernel, operands, dim, tile) <= limit


def test_what_the_operands_take_is_what_the_compiler_says():
    """On sm_90, where both operands of a product lie in shared memory: no tile is left out that
    fits, and what is kept can fit.
    """
    compile = pytest.importorskip("bench.compile")
    compared = 0
    tables = ("triton-3.9.0.csv", "triton-3.9.0-converted.csv")
    for row in chain.from_iterable(csv.DictReader((TABLES / name).open()) for name in tables):
        if row["inputs"] == "fp16/fp32":  # its codes have two parts, others "converted" one
            continue
        if row["architecture"] == "sm_90" and row["call"] in ("forward", "backward"):
            kernel, dim = row["kernel"], int(row["dim"])
            operands = arithmetic(*compile.INPUTS[row["inputs"]]).operands
            if row["rows"]:
                tile = tiles.shipped(kernel, operands, dim, "hopper")
                ratio = tiles.shared_bytes(kernel, operands, dim, tile) / int(row["shared_bytes"])
                assert 0.9 <= ratio <= 1.0, row
                compared += 1
    assert compared > 40
