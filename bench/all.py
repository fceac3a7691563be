"""Everything in one call: check, the GPU's tests, compile, op, memory, step; the tables last.

A command that has finished with the same versions of everything is not run again. Sized for nine
minutes on an H200; smaller on a CPU.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench import check, memory, op, step
from bench.accuracy import print_accuracy
from bench.results import OUT, Results, Row, print_table, version

REPORTS = {
    "check": check.print_checks,
    "accuracy": print_accuracy,
    "op": op.report,
    "memory": memory.report,
    "step": step.report,
}


def main(arguments: list[str]) -> int:
    """`python -m bench all`."""
    parser = argparse.ArgumentParser(prog="python -m bench all", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="every command at its quick size")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the devices' folders")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    results = Results(options.out, device)
    rows: list[Row] = [row for row in results.current("all") if row["status"] == "ok"]
    finished = {row["candidate"] for row in rows}
    for command in commands(device, options.quick, options.out):
        name = " ".join(command)
        if name in finished:
            continue
        print(f"{name} …", file=sys.stderr)
        started = time.monotonic()
        code = subprocess.run([sys.executable, "-m", *command]).returncode
        rows.append(
            {
                "candidate": name,
                "metric": "time",
                "unit": "s",
                "p50": time.monotonic() - started,
                "status": "ok" if code == 0 else f"exit status {code}",
            }
        )
        results.replace("all", rows)
    for command, report in REPORTS.items():
        if written := results.read(command):
            print(f"\n{command}\n")
            report(written)
    written = results.read("all")
    print()
    print_table(
        ["command", "s", ""], [[row["candidate"], row["p50"], row["status"]] for row in written]
    )
    return int(any(row["status"] != "ok" for row in written))


def commands(device: torch.device, quick: bool, out: Path) -> list[list[str]]:
    """Arguments of `python -m`, in order."""
    table = out / "compile" / f"triton-{version('triton')}.csv"
    compile = ["bench", "compile", "--quick", "--out", str(table)]
    where = ["--device", str(device), "--out", str(out)]
    if device.type == "cuda":
        sizes = {"check": [], "op": ["--minutes", "4"], "memory": ["--seconds", "1"], "step": []}
        before = [["pytest", "-m", "gpu"], [*compile, "--jobs", "8"]]
    else:
        sizes = {"check": [], "op": ["--quick"], "memory": ["--quick"], "step": ["--quick"]}
        before = [[*compile, "--architecture", "90"]]
    if quick:
        sizes = {name: ["--quick"] for name in sizes}
    first, *rest = (["bench", name, *size, *where] for name, size in sizes.items())
    return [first, *before, *rest]
