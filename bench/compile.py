"""Compile every kernel and tile for each architecture and read the machine code. Needs no GPU."""

import argparse
import datetime
import itertools
import multiprocessing
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import triton

from bench.launches import FAMILY, Launch, recorded
from bench.machine_code import SHARED_LIMIT, TENSOR_MEMORY_LIMIT, inspect
from bench.results import write_csv
from bench.roofline import CARDS, kernel_work, times
from softvq.kernels import fused, tiles
from softvq.kernels.code_sums import code_sums
from softvq.kernels.nearest import nearest

DIMS = (16, 32, 64, 128, 256)
ROWS, CODES = 4096, 1024
DATA_CENTRE = (80, 90, 100)
# Whose limits are printed: the last card of each architecture.
CARD = {card.architecture: card for card in CARDS.values()}
# (latents, codebook, precision): all that the kernels tell apart.
INPUTS = {
    "bf16": (torch.bfloat16, torch.bfloat16, "highest"),
    "fp16": (torch.float16, torch.float16, "highest"),
    "bf16/fp32": (torch.bfloat16, torch.float32, "highest"),
    "fp16/fp32": (torch.float16, torch.float32, "highest"),
    "fp32 highest": (torch.float32, torch.float32, "highest"),
    "fp32 high": (torch.float32, torch.float32, "high"),
    "fp32 medium": (torch.float32, torch.float32, "medium"),
}
CALLS = (
    "forward",
    "backward",
    "backward, training",
    "backward, partition",
    "backward, all",
    "usage",
    "nearest",
    "code sums",
)
# What most users run, for --quick.
QUICK = {
    "dim": (64, 128),
    "inputs": ("bf16", "fp32 highest"),
    "call": ("forward", "backward", "nearest", "code sums"),
}


class Case(NamedTuple):
    """One kernel as some call launches it on some architecture."""

    architecture: int
    inputs: str  # a key of INPUTS
    dim: int
    call: str  # one of CALLS
    launch: Launch

    @property
    def kernel(self) -> str:
        return self.launch.kernel.__name__.strip("_").removesuffix("_kernel")


def cases(
    architecture: int, inputs: Iterable[str], dims: Iterable[int], calls: Iterable[str]
) -> Iterator[Case]:
    """Every distinct kernel that these calls launch on this architecture."""
    seen = set()
    family = FAMILY[architecture]
    here = patch.object(tiles, "architecture", lambda _: family)
    for kind, dim, name in itertools.product(inputs, dims, calls):
        with here, recorded() as launches:
            call(name, dim, *INPUTS[kind])
        for launch in launches:
            if launch.key() not in seen:
                seen.add(launch.key())
                yield Case(architecture, kind, dim, name, launch)


def call(
    name: str, dim: int, latents: torch.dtype, codebook_dtype: torch.dtype, precision: str
) -> None:
    """Call one wrapper. "backward" is that of quantized alone; "backward, training" has that of a
    detached log-partition too, as in most training; "backward, partition" of one that also moves
    the latents; "backward, all" every incoming gradient, and the temperature's.
    """
    z = torch.zeros(1, ROWS, dim, dtype=latents)
    codebook = torch.zeros(1, CODES, dim, dtype=codebook_dtype)
    inputs = (z, codebook, torch.ones(()))
    row = torch.zeros(1, ROWS)
    indices = torch.zeros(ROWS, dtype=torch.int64)
    known = {"precision": precision}
    if name == "forward":
        fused.soft_forward(*inputs, **known)
    elif name == "backward":
        fused.soft_backward(*inputs, z, None, None, None, True, True, False, **known)
    elif name in ("backward, training", "backward, partition"):
        known["detach_log_partition"] = name == "backward, training"
        fused.soft_backward(*inputs, z, row, None, None, True, True, False, **known)
    elif name == "backward, all":
        usage = torch.zeros(1, CODES)
        fused.soft_backward(*inputs, z, row, row, usage, True, True, True, **known)
    elif name == "usage":
        fused.probability_sums(*inputs, None, **known)
    elif name == "nearest":
        nearest(z, codebook, **known)
    else:
        code_sums(z[0], indices, CODES)


def describe(case: Case) -> dict[str, object]:
    """Compile one case: a row of the table."""
    constants, options = case.launch.constants, case.launch.options
    code = inspect(case.launch.compile(case.architecture))
    pairs = constants.get("ROWS", 0) * constants.get("CODES", 0)  # 0: no matrix product
    per_pair = round(code.per_pair(pairs, options.get("num_warps", 4)), 2) if pairs else ""
    problems = []
    if code.spills:
        problems.append("spills in the loop" if code.loop_spills else "spills")
    if code.shared > SHARED_LIMIT[FAMILY[case.architecture]]:
        problems.append("shared memory")
    if code.tensor_memory > TENSOR_MEMORY_LIMIT:
        problems.append("tensor memory")
    if code.serialized and case.dim > 32:  # below, a product is one or two instructions: no sign
        problems.append("serialized")
    if pairs and not code.loop_instructions:
        problems.append("no tensor core")
    return {
        "architecture": f"sm_{case.architecture}",
        "kernel": case.kernel,
        "inputs": case.inputs,
        "dim": case.dim,
        "call": case.call,
        "rows": constants.get("ROWS", ""),
        "codes": constants.get("CODES", ""),
        "warps": options.get("num_warps", 4),
        "stages": constants.get("STAGES", ""),
        "parts": constants.get("PARTS", 1) if pairs else "",
        "registers": code.registers,
        "spilled_bytes": code.spills,
        "spilled_in_loop": code.loop_spills,
        "shared_bytes": code.shared,
        "tensor_memory_columns": code.tensor_memory,
        "tensor_core": code.tensor_core,
        "instructions": code.instructions,
        "per_pair": per_pair,
        **_bound(case, per_pair),
        "problems": "; ".join(problems),
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
    }


def _bound(case: Case, per_pair: float | str) -> dict[str, object]:
    """What decides a card's time for 2^20 latents and CODES codes if nothing else did, and it."""
    if not per_pair:
        return {"card": "", "bound": "", "bound_ms": ""}
    kernel = "usage" if case.call == "usage" and case.kernel == "code_sweep" else case.kernel
    parts = case.launch.constants.get("PARTS", 1)
    work = kernel_work(kernel, case.inputs, 2**20, CODES, case.dim, per_pair, parts)
    card = CARD[case.architecture]
    limits = times(card, work)
    return {
        "card": card.name,
        "bound": limits.bound,
        "bound_ms": round(1e3 * max(limits), 2),
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench compile", description=__doc__)
    parser.add_argument("--architecture", type=int, nargs="+", choices=FAMILY, default=DATA_CENTRE)
    parser.add_argument("--inputs", nargs="+", choices=INPUTS, default=tuple(INPUTS))
    parser.add_argument("--dim", type=int, nargs="+", default=DIMS, help="1 to 256")
    parser.add_argument("--call", nargs="+", choices=CALLS, default=CALLS)
    parser.add_argument("--kernel", nargs="+", help="only these, e.g. forward nearest")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--quick", action="store_true", help="bf16 and fp32, D = 64 and 128")
    parser.add_argument("--out", type=Path, help="the CSV; default: triton-VERSION.csv")
    if "--quick" in arguments:
        parser.set_defaults(**QUICK)
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION")
    chosen = [
        case
        for architecture in options.architecture
        for case in cases(architecture, options.inputs, options.dim, options.call)
        if not options.kernel or case.kernel in options.kernel
    ]
    if not chosen:
        parser.error("no kernel of that name is launched")
    rows = []
    for row in _described(chosen, options.jobs):
        rows.append(row)
        print(f"{len(rows)}/{len(chosen)} {row['architecture']} {row['kernel']}", file=sys.stderr)
    out = options.out or Path(f"bench/results/compile/triton-{triton.__version__}.csv")
    write_csv(out, rows[0], rows)
    print_table(rows)
    failed = sum(bool(row["problems"]) for row in rows)
    cards = ", ".join(CARD[architecture].name for architecture in options.architecture)
    print(f"bound: what would decide 2^20 rows by 1,024 codes on {cards} (data sheets)")
    print(f"\n{len(rows)} kernels, {failed} with problems; written to {out}")
    return 1 if failed else 0


def _described(chosen: list[Case], jobs: int) -> Iterator[dict[str, object]]:
    if jobs == 1:
        yield from map(describe, chosen)
        return
    global _shared_cases  # a forked process inherits them: a kernel cannot be pickled
    _shared_cases = chosen
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from pool.imap(_describe_numbered, range(len(chosen)))


def _describe_numbered(number: int) -> dict[str, object]:
    return describe(_shared_cases[number])


def print_table(rows: list[dict[str, object]]) -> None:
    print(
        f"{'arch':6} {'kernel':14} {'inputs':12} {'D':>3} {'call':13} "
        f"{'rows×codes':>10} {'warps':>5} {'regs':>4} {'spills':>6} {'smem KB':>7} {'tmem':>4} "
        f"{'matrix unit':11} {'instr/pair':>10} {'bound':>7} {'ms':>5}  problems"
    )
    for r in rows:
        print(
            f"{r['architecture']:6} {r['kernel']:14} {r['inputs']:12} "
            f"{r['dim']:>3} {r['call']:13} {r['rows']!s:>5}×{r['codes']!s:<4} "
            f"{r['warps']:>5} {r['registers']:>4} {r['spilled_bytes']:>6} "
            f"{r['shared_bytes'] / 1024:>7.1f} {r['tensor_memory_columns']:>4} "
            f"{r['tensor_core']:11} {r['per_pair']!s:>10} {r['bound']:>7} {r['bound_ms']!s:>5}  "
            f"{r['problems']}"
        )
