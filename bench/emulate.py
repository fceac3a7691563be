"""Run the compiled kernels as a GPU would, on a CPU, and compare with float64. Needs no GPU.

Exit status 1 if a bound of the tests breaks, or at a fault: an access out of bounds, a race, a
barrier that is missing (bench/emulator).
"""

import argparse
import datetime
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import torch
import triton

from bench.bounds import (
    ALL,
    REDUCED_PRECISION,
    errors_over_draws,
    factor,
    make,
    nearest_excess,
    reduced_errors,
)
from bench.check import judged
from bench.compile import DATA_CENTRE, INPUTS
from bench.emulator import Fault, emulated
from bench.launches import FAMILY
from bench.results import Row, as_text, print_table, write_csv
from bench.truth import Problem, matmul_in
from softvq.kernels import code_sums, code_sweep, fused

DIMS = (5, 64, 128, 256)
HEADS, ROWS, CODES = 1, 300, 260  # at least two iterations of every loop, of most three
SPLITS = 2  # ranges of rows that dC is computed in; as many as a GPU has would have one tile each
# Sums so long that whatever is lost on the way adds up.
LONG = {"many codes": (64, 4096), "many rows": (4096, 40)}
# Incoming gradients; each compiles other kernels.
GRADIENTS = {"q": ALL[:1], "all": ALL}
COLUMNS = (
    *("architecture", "inputs", "dim", "kind", "metric", "error", "plain", "allowed"),
    *("status", "triton", "date"),
)
KINDS = ("q", "all", *LONG, "hard")
QUICK = {"inputs": ("bf16", "fp32 highest"), "dim": (64,), "kind": ("all", "hard")}


def errors(inputs: str, dim: int, kind: str) -> Iterator[Row]:
    """What the fused kernels make of one problem, judged as `bench check` does."""
    rows, codes = LONG.get(kind, (ROWS, CODES))
    latents, codebook, precision = INPUTS[inputs]
    if precision in REDUCED_PRECISION:
        bounds = REDUCED_PRECISION[precision]
        for name, error in reduced_errors(fused, precision, 0.0, "cpu", dim).items():
            found = {"metric": name, "error": error}
            yield found | judged(error, bounds[name.partition(" ")[0]])
        return

    def draw() -> Problem:
        problem = make(HEADS, rows, codes, dim, temperature=max(1.0, dim / 48))
        return Problem(problem.z.to(latents), problem.codebook.to(codebook), problem.temperature)

    rounded = {} if latents == torch.float32 else {"matmul": matmul_in(latents)}
    names, draws = GRADIENTS.get(kind, ALL), 1 if kind in LONG else 2
    found = errors_over_draws(fused, draw, None, names, draws, **rounded)
    for name, error in found.items():
        row = {"metric": name, "error": error.ours, "plain": error.plain}
        yield row | judged(error.ours, error.allowed(factor(name)))


def hard_errors(inputs: str, dim: int) -> Iterator[Row]:
    """The nearest codes of one problem, and the sums of their rows."""
    latents, codebook, precision = INPUTS[inputs]
    z, codes, _ = make(HEADS, ROWS, CODES, dim)
    z, codes = z.to(latents), codes.to(codebook)
    indices = fused.nearest(z, codes, precision)
    excess = nearest_excess(z[0], codes[0], indices[0])
    allowed = 2.0**12 if precision == "medium" else 1.0  # operands of 11 bits, not 23
    yield {"metric": "nearest", "error": excess} | judged(excess, allowed)
    sums, _ = code_sums.code_sums(z[0], indices[0], CODES)
    true = torch.zeros(CODES, dim, dtype=torch.float64).index_add_(0, indices[0], z[0].double())
    error = (sums - true).abs().max().item()
    yield {"metric": "sums", "error": error} | judged(error, 1e-6 * true.abs().max().item())


def cases(options: argparse.Namespace) -> Iterator[tuple[int, str, int, str]]:
    """Architecture, inputs, D, and what is done, one of KINDS."""
    for architecture in options.architecture:
        for inputs in options.inputs:
            for dim in options.dim:
                left_out = set() if dim == 64 else set(LONG)
                if INPUTS[inputs][2] in REDUCED_PRECISION:  # whose bounds are those of "all"
                    left_out = {"q", *LONG}
                for kind in options.kind:
                    if kind not in left_out:
                        yield architecture, inputs, dim, kind


def run(architecture: int, inputs: str, dim: int, kind: str) -> list[Row]:
    """The rows of one case; of a fault, one."""
    base = {"architecture": f"sm_{architecture}", "inputs": inputs, "dim": dim, "kind": kind}
    base |= {"triton": triton.__version__, "date": datetime.date.today().isoformat()}
    torch.manual_seed(0)
    with emulated(architecture), patch.object(code_sweep, "_splits", lambda **_: SPLITS):
        try:
            found = hard_errors(inputs, dim) if kind == "hard" else errors(inputs, dim, kind)
            return [{name: as_text(x) for name, x in (base | row).items()} for row in found]
        except Fault as fault:
            return [base | {"status": f"{fault}: {' '.join(getattr(fault, '__notes__', ()))}"}]


def main(arguments: list[str]) -> int:
    """`python -m bench emulate`."""
    parser = argparse.ArgumentParser(prog="python -m bench emulate", description=__doc__)
    parser.add_argument("--architecture", type=int, nargs="+", choices=FAMILY, default=DATA_CENTRE)
    parser.add_argument("--inputs", nargs="+", choices=INPUTS, default=tuple(INPUTS))
    parser.add_argument("--dim", type=int, nargs="+", default=DIMS, help="1 to 256")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=KINDS, help="what is done")
    parser.add_argument("--quick", action="store_true", help="bf16 and fp32, D = 64, all and hard")
    parser.add_argument("--out", type=Path, help="the CSV; default: triton-VERSION.csv")
    if "--quick" in arguments:
        parser.set_defaults(**QUICK)
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION")
    rows: list[Row] = []
    chosen = list(cases(options))
    for number, case in enumerate(chosen, 1):
        started = time.monotonic()
        rows += run(*case)
        seconds = time.monotonic() - started
        print(f"{number}/{len(chosen)} sm_{case[0]} {case[1:]} {seconds:.0f} s", file=sys.stderr)
    out = options.out or Path(f"bench/results/emulate/triton-{triton.__version__}.csv")
    write_csv(out, COLUMNS, rows)
    print_table(list(COLUMNS), [[str(row.get(name, "")) for name in COLUMNS] for row in rows])
    failed = sum(row["status"] != "ok" for row in rows)
    print(f"\n{len(rows)} bounds, {failed} broken; written to {out}")
    return 1 if failed else 0
