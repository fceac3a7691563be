"""Everything in one call: check, compile, step, memory, op; the tables last.

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
from softvq.kernels import tiles

MINUTES = 8.0  # within nine: what `op` starts last takes up to one
SM = {"ampere": "80", "hopper": "90", "blackwell": "100"}  # for whose machine code, by tiles
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
    first = time.monotonic()
    for module, size in sizes(device, options.quick).items():
        name = " ".join([module, *size])
        if name in finished:
            continue
        command = [sys.executable, "-m", *where(module, options.out, device), *size]
        started = time.monotonic()
        if module == "op":
            minutes = max(1.0, MINUTES - (started - first) / 60)
            command += ["--minutes", f"{minutes:.1f}"]
        print(f"{name} …", file=sys.stderr)
        code = subprocess.run(command).returncode
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


def sizes(device: torch.device, quick: bool) -> dict[str, list[str]]:
    """The modules in order, and their arguments; `op` last, in the time that is left."""
    cuda = device.type == "cuda"
    small = ["--quick"] if quick or not cuda else []
    processes = ["--jobs", "8"] if cuda else []
    return {
        "check": ["--quick"] if quick else [],
        "compile": ["--quick", "--architecture", SM[tiles.architecture(device)], *processes],
        "step": small,
        "memory": small or ["--seconds", "1"],
        "op": small,
    }


def where(module: str, out: Path, device: torch.device) -> list[str]:
    """A module and where its results go."""
    if module == "compile":
        return ["bench", module, "--out", str(out / "compile" / f"triton-{version('triton')}.csv")]
    return ["bench", module, "--device", str(device), "--out", str(out)]
