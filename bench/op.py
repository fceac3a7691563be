"""Speed and memory of the operator, forward + backward, against other ways to compute it."""

import argparse
import csv
import datetime
import multiprocessing
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

import softvq
from bench.candidates import CANDIDATES

COLUMNS = (
    *("candidate", "outputs", "rows", "codes", "dim", "dtype", "temperature"),
    *("p20_seconds", "p50_seconds", "p80_seconds", "times_eager", "extra_mb"),
    *("device", "threads", "torch", "softvq", "date", "command"),
)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench op", description=__doc__)
    parser.add_argument("--rows", type=int, default=65536)
    parser.add_argument("--codes", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="8192 rows, 3 repeats")
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu/op.csv"))
    options = parser.parse_args(arguments)
    if options.quick:
        options.rows, options.repeats = 8192, 3
    rows = [row for codes in options.codes for row in measure(options, codes)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    print_table(rows)
    print(f"\nwritten to {options.out}")
    return 0


def inputs(options: argparse.Namespace, codes: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    z = torch.randn(options.rows, options.dim, requires_grad=True)
    codebook = torch.randn(codes, options.dim, requires_grad=True)
    return z, codebook, torch.randn(options.rows, options.dim)


def step(name: str, options: argparse.Namespace, z, codebook, grad) -> None:
    z.grad = codebook.grad = None
    CANDIDATES[name].run(z, codebook, options.temperature).backward(grad)


def measure(options: argparse.Namespace, codes: int) -> list[dict[str, object]]:
    """One row a candidate; the candidates take turns, so that a busy moment hits all of them."""
    tensors = inputs(options, codes)
    seconds: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    for repeat in range(options.repeats + 1):
        for name in CANDIDATES:
            started = time.perf_counter()
            step(name, options, *tensors)
            if repeat:  # the first turn warms up
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        {
            "candidate": name,
            "outputs": candidate.outputs,
            "rows": options.rows,
            "codes": codes,
            "dim": options.dim,
            "dtype": "float32",
            "temperature": options.temperature,
            "p20_seconds": round(quantile(seconds[name], 0.2), 4),
            "p50_seconds": round(medians[name], 4),
            "p80_seconds": round(quantile(seconds[name], 0.8), 4),
            "times_eager": round(medians["eager"] / medians[name], 2),
            "extra_mb": extra_memory(name, options, codes),
            "device": processor_name(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "softvq": softvq.__version__,
            "date": datetime.date.today().isoformat(),
            "command": "python -m bench op " + " ".join(sys.argv[2:]),
        }
        for name, candidate in CANDIDATES.items()
    ]


def quantile(values: list[float], q: float) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(q).item()


def extra_memory(name: str, options: argparse.Namespace, codes: int) -> int:
    """Peak MB beyond inputs, output and gradients of one step, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak, args=(queue, name, options, codes))
    process.start()
    peak = queue.get()
    process.join()
    kept = 4 * (2 * options.rows + codes) * options.dim  # q, dz and dC
    return round((peak - kept) / 1e6)


def _peak(queue, name: str, options: argparse.Namespace, codes: int) -> None:
    tensors = inputs(options, codes)
    small = argparse.Namespace(**{**vars(options), "rows": 256})
    step(name, small, *inputs(small, codes))  # libraries load and make their own buffers
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    step(name, options, *tensors)
    queue.put(_resident("VmHWM") - before)


def _resident(field: str) -> int:
    """Bytes of memory now (VmRSS) or at its highest (VmHWM); Linux."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])


def processor_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def print_table(rows: list[dict[str, object]]) -> None:
    first = rows[0]
    print(
        f"\n{first['device']}, {first['threads']} threads, torch {first['torch']}, {first['date']}"
        f"\nforward + backward, N = {first['rows']}, D = {first['dim']}, float32\n"
    )
    print(f"{'K':>7}  {'candidate':14} {'seconds':>8} {'x eager':>8} {'extra MB':>9}  outputs")
    for row in rows:
        print(
            f"{row['codes']:>7}  {row['candidate']:14} {row['p50_seconds']:>8.3f} "
            f"{row['times_eager']:>8.2f} {row['extra_mb']:>9}  {row['outputs']}"
        )
