"""Speed and peak memory of the operator, forward and backward, against other ways to compute it.

The candidates take turns, so that a busy moment hits all of them, over inputs that change from turn
to turn. Compare ratios within a table: they were measured together.
"""

import argparse
import gc
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bench.candidates import (
    Candidate,
    Run,
    Setting,
    slow_candidates,
    softvq_candidates,
    torch_candidates,
)
from bench.check import require_green
from bench.hard import hard_candidates
from bench.limits import PASSES, measure_limits, percents
from bench.measure import Clock, bounded_memory, peak_bytes, quantiles, reason
from bench.peers import peer_candidates
from bench.results import OUT, Results, Row, headline, print_table, version

INPUT_SETS, WARM_TURNS = 3, 2  # max-autotune compiles in the first, records a graph in the second
TURNS, LEAST_TURNS, TURNS_SECONDS = 20, 3, 60  # the least, however long they take
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def soft_candidates(setting: Setting) -> list[Candidate]:
    """Everything that computes q softly."""
    return [
        *torch_candidates(setting),
        *peer_candidates(setting),
        *softvq_candidates(setting),
        *slow_candidates(setting),
    ]


GROUPS = {"soft": soft_candidates, "hard": hard_candidates}


def settings(device: torch.device, quick: bool) -> list[tuple[str, Setting]]:
    """Group and setting, the most important first: time may run out before the last."""
    if quick and device.type == "cpu":
        return [("soft", Setting(device, 8192, 512, 64)), ("hard", Setting(device, 8192, 512, 64))]
    rows, wide, half = 65536, 4096, torch.bfloat16
    if device.type == "cpu":
        return [
            *(("soft", Setting(device, rows, codes, 64)) for codes in (512, wide, 64)),
            *(("hard", Setting(device, rows, codes, 64)) for codes in (512, wide)),
            *(("soft", Setting(device, rows, 512, dim)) for dim in (4, 16, 256)),
            ("soft", Setting(device, rows, 512, 64, half)),
            ("soft", Setting(device, 4096, 512, 64)),
        ]
    first = [
        ("soft", Setting(device, rows, wide, 64, half)),
        ("soft", Setting(device, rows, wide, 64)),
        ("hard", Setting(device, rows, wide, 64, half)),
    ]
    if quick:
        return first
    return [
        *first,
        *(("soft", Setting(device, rows, codes, 64, half)) for codes in (512, 32768, 64, 262144)),
        *(("soft", Setting(device, rows, wide, dim, half)) for dim in (128, 256, 16)),
        ("hard", Setting(device, rows, 32768, 64, half)),
        ("soft", Setting(device, rows, 512, 64)),
        *(("soft", Setting(device, n, wide, 64, half)) for n in (4096, 2**20)),
        ("soft", Setting(device, rows, wide, 4)),
    ]


def main(arguments: list[str]) -> int:
    """`python -m bench op`."""
    options = parse(arguments)
    deadline = time.monotonic() + 60 * options.minutes
    device = torch.device(options.device)
    results = Results(options.out, device)
    if not require_green(results, device):
        return 1
    if device.type == "cpu":
        bounded_memory()
    chosen = settings(device, options.quick)
    if options.rows or options.codes or options.dim or options.dtype:
        chosen = [
            (group, Setting(device, options.rows or 65536, codes, dim, DTYPES[dtype]))
            for group in GROUPS
            for codes in options.codes or [512, 4096]
            for dim in options.dim or [64]
            for dtype in options.dtype or ["float32"]
        ]
    limits = measure_limits(device, list({setting.dtype for _, setting in chosen}))
    print_limits(results.replace("limits", limits))
    rows: list[Row] = []
    names = tuple(options.candidates)
    for group, setting in chosen:
        candidates = [c for c in GROUPS[group](setting) if c.name.startswith(names)]
        rows += measure(candidates, group, setting, limits, deadline)
        written = results.replace("op", rows)
    report(written)
    print(f"\nwritten to {results.path}")
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(prog="python -m bench op", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="one size")
    parser.add_argument("--rows", type=int, help="N, instead of the usual settings")
    parser.add_argument("--codes", type=int, nargs="+", help="K, instead of the usual settings")
    parser.add_argument("--dim", type=int, nargs="+", help="D, instead of the usual settings")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES)
    parser.add_argument("--candidates", nargs="+", default=[""], help="how their names begin")
    parser.add_argument("--minutes", type=float, default=60, help="start nothing after that")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the devices' folders")
    return parser.parse_args(arguments)


def measure(
    candidates: list[Candidate],
    group: str,
    setting: Setting,
    limits: list[Row],
    deadline: float,
) -> list[Row]:
    """A row for every candidate and pass; one that cannot has a single row that says why."""
    base = {
        c.name: {
            **setting.columns(),
            "candidate": c.name,
            "version": version(c.package),
            "outputs": c.outputs,
            "precision": c.precision,
            "metric": "time",
            "unit": "s",
        }
        for c in candidates
    }
    status: dict[str, str] = {}
    runs: dict[str, Run] = {}
    torch.compiler.reset()  # earlier shapes count against the limit of recompilations
    sets = [setting.draw(seed) for seed in range(INPUT_SETS)]
    clock = Clock(setting.device)
    for candidate in candidates:
        if time.monotonic() > deadline:
            status[candidate.name] = "not run: no time left"
            continue
        try:
            run = candidate.prepare(setting)
            for _ in range(WARM_TURNS):
                turn(group, run, sets[0], clock)
            runs[candidate.name] = run
        except Exception as error:  # of any library: its row says which
            status[candidate.name] = reason(error)
        free()
    seconds, failed = turns(group, runs, sets, clock, deadline)
    status |= failed
    del runs, sets, clock
    free()
    rows: list[Row] = []
    for candidate in candidates:
        if candidate.name in status:
            rows.append(base[candidate.name] | {"status": status[candidate.name]})
            continue
        timely = shows_memory(setting) and time.monotonic() < deadline
        memory = extra_bytes(candidate, group, setting) if timely else {}
        for what, values in seconds[candidate.name].items():
            found = quantiles(values)
            rows.append(
                base[candidate.name]
                | found
                | percents(setting, what, found["p50"], limits)
                | times_reference(seconds, group, what, found["p50"])
                | {"pass": what, "status": "ok"}
                | (memory if what in ("both", "hard") else {})
            )
    return rows


def turns(
    group: str, runs: dict[str, Run], sets: list[tuple], clock: Clock, deadline: float
) -> tuple[dict[str, dict[str, list[float]]], dict[str, str]]:
    """Seconds of every pass, by candidate, the candidates interleaved; why others have none."""
    marks: dict[str, list[dict]] = {name: [] for name in runs}
    failed: dict[str, str] = {}
    end = min(deadline, time.monotonic() + TURNS_SECONDS)
    for repeat in range(TURNS):
        if repeat >= LEAST_TURNS and time.monotonic() > end:
            break
        for name in tuple(marks):
            try:
                marks[name].append(turn(group, runs[name], sets[repeat % len(sets)], clock))
            except Exception as error:  # what fitted alone may not fit beside the others
                failed[name] = reason(error)
                del runs[name], marks[name]
    seconds = {
        name: {what: [clock.seconds(*turn[what]) for turn in found] for what in found[0]}
        for name, found in marks.items()
    }
    return seconds, failed


def turn(group: str, run: Run, tensors: tuple, clock: Clock) -> dict[str, tuple]:
    """One call, and its gradients in the soft group: start and end of every pass."""
    z, codebook, grad = tensors
    clock.settle()
    if group == "hard":
        with torch.no_grad():
            start = clock.mark()
            run(z, codebook)
            return {"hard": (start, clock.mark())}
    start = clock.mark()
    quantized = run(z, codebook).quantized
    middle = clock.mark()
    torch.autograd.grad(quantized, (z, codebook), grad)
    end = clock.mark()
    return {"forward": (start, middle), "backward": (middle, end), "both": (start, end)}


def times_reference(seconds: dict, group: str, what: str, median: float) -> dict[str, float]:
    """How many times faster than the plain way of the group."""
    reference = seconds.get("eager" if group == "soft" else "cdist")
    return {"times_eager": quantiles(reference[what])["p50"] / median} if reference else {}


def shows_memory(setting: Setting) -> bool:
    """On a CPU each measurement takes a process of its own: only at the sizes that are plotted."""
    return setting.device.type == "cuda" or (setting.dim, setting.dtype) == (64, torch.float32)


def extra_bytes(candidate: Candidate, group: str, setting: Setting) -> dict[str, object]:
    """Peak beyond inputs, q and gradients; or why it is not known."""
    kept = setting.dtype.itemsize * setting.dim * (2 * setting.rows + setting.codes)
    try:
        peak = peak_bytes(setting.device, step, group, candidate.name, setting)
    except Exception as error:
        return {"extra_bytes": "", "status": f"memory: {reason(error)}"}
    free()
    return {"extra_bytes": peak - (kept if group == "soft" else 0)}


def step(group: str, name: str, setting: Setting) -> Callable[[], object]:
    """The work whose memory is measured, by name: it has to reach another process."""
    torch.compiler.reset()  # what a CUDA graph holds belongs to the work that is measured
    candidate = next(c for c in GROUPS[group](setting) if c.name == name)
    run, (z, codebook, grad) = candidate.prepare(setting), setting.draw(0)
    if group == "hard":
        return torch.no_grad()(partial(run, z, codebook))
    return lambda: torch.autograd.grad(run(z, codebook).quantized, (z, codebook), grad)


def free() -> None:
    """Give back what the candidate before held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def print_limits(rows: list[dict[str, str]]) -> None:
    """What the percentages are of."""
    print(headline(rows[0]))
    print_table(
        ["limit", "dtype", "p50", "unit"],
        [[row["metric"], row["dtype"], row["p50"], row["unit"]] for row in rows],
    )


def report(rows: list[dict[str, str]]) -> None:
    """A line for every candidate of every setting, losing and failing ones too."""
    lines: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("rows", "codes", "dim", "dtype", "candidate"))
        lines.setdefault(key, {})[row["pass"]] = row
    print("\n" + headline(rows[0]))
    columns = [*("N", "K", "D", "dtype", "candidate", "forward", "backward", "both ms"), "p20–p80"]
    columns += [*("× eager", "extra MB", "% matmul", "% copy", "% exp", "returns")]
    print_table(columns, [[*key, *_cells(passes)] for key, passes in lines.items()])


def _cells(passes: dict[str, dict[str, str]]) -> list[str]:
    """Of one line: the median of each pass, the rest of the whole."""
    whole = passes.get("both") or passes.get("hard") or passes[""]
    medians = [_milliseconds(passes[what]["p50"]) if what in passes else "" for what in PASSES]
    spread = f"{_milliseconds(whole['p20'])}–{_milliseconds(whole['p80'])}" if whole["p20"] else ""
    extra = f"{float(whole['extra_bytes']) / 1e6:.0f}" if whole["extra_bytes"] else ""
    percent = [whole[f"percent_{limit}"] for limit in ("matmul", "copy", "exp")]
    note = whole["outputs"] if whole["status"] == "ok" else whole["status"]
    both = medians[2] or medians[3]
    return [*medians[:2], both, spread, whole["times_eager"], extra, *percent, note]


def _milliseconds(seconds: str) -> str:
    return f"{1e3 * float(seconds):.3g}" if seconds else ""
