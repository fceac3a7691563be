"""The largest codebook whose forward and backward fit in a given memory.

The whole footprint counts: inputs, outputs, gradients and what the method needs beside them. It is
measured at growing K until that takes too long; what lies beyond the last point is marked
"extrapolated". The straight line that continues it has the steeper of two slopes: that of the last
two points, which sees what grows as N·K, and that from the last K to the largest with few rows,
which sees what grows with K alone and is still hidden behind a block of rows at small K.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.candidates import Candidate, Setting
from bench.check import require_green
from bench.measure import peak_bytes, reason
from bench.op import GROUPS, free, step
from bench.results import OUT, Results, Row, headline, print_table, version

BUDGETS = (1, 8, 80)  # GB
FIRST_CODES, MOST_CODES = 2048, 262144  # from there on blocks of rows have their full size
LEFT_OUT = ("two products", "FlexAttention", "compiled", "max-autotune", "cdist", "softvq nearest")


def main(arguments: list[str]) -> int:
    """`python -m bench memory`."""
    parser = argparse.ArgumentParser(prog="python -m bench memory", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=65536, help="N; default: 65536")
    parser.add_argument("--dim", type=int, default=64, help="D")
    parser.add_argument(
        "--seconds", type=float, default=12, help="double K until a measurement takes longer"
    )
    parser.add_argument("--quick", action="store_true", help="4096 rows, 5 seconds")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the devices' folders")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rows, options.seconds = 4096, 5
    device = torch.device(options.device)
    results = Results(options.out, device)
    if not require_green(results, device):
        return 1
    setting = Setting(device, options.rows, 0, options.dim)
    rows: list[Row] = []
    for group, find in GROUPS.items():
        for candidate in find(setting._replace(codes=MOST_CODES)):
            if candidate.name not in LEFT_OUT:
                rows += footprints(group, candidate, setting, options.seconds)
                written = results.replace("memory", rows)
    report(written)
    print(f"\nwritten to {results.path}")
    return 0


def footprints(group: str, candidate: Candidate, setting: Setting, seconds: float) -> list[Row]:
    """The bytes at each K that is bearable, and the largest K within each budget."""
    name = candidate.name
    base = {
        **setting.columns(),
        "candidate": name,
        "version": version(candidate.package),
        "outputs": candidate.outputs,
        "pass": "both" if group == "soft" else "hard",
    }
    points: dict[int, int] = {}
    rows: list[Row] = []
    codes, end, took = FIRST_CODES, "", 0.0
    while codes <= MOST_CODES and (took < seconds or len(points) < 2) and not end:
        started = time.monotonic()
        try:
            points[codes] = footprint(group, name, setting._replace(codes=codes))
        except Exception as error:
            end = reason(error)
            rows.append(base | {"codes": codes, "metric": "footprint", "status": end})
        else:
            found = {"metric": "footprint", "unit": "B", "p50": points[codes], "status": "ok"}
            rows.append(base | {"codes": codes} | found)
        free()
        took = time.monotonic() - started
        codes *= 2
    if len(points) >= 2:
        slope = max(slope_between_last(points), slope_of_few_rows(group, name, setting, points))
        rows += [base | {"codes": ""} | found for found in conclusions(points, slope)]
    return rows


def slope_between_last(points: dict[int, int]) -> float:
    """Bytes per code from the last but one K to the last."""
    before, last = sorted(points)[-2:]
    return (points[last] - points[before]) / (last - before)


def slope_of_few_rows(group: str, name: str, setting: Setting, points: dict[int, int]) -> float:
    """Bytes per code up to the largest K, with so few rows that it takes no longer than the last
    point did. Zero where that point is the largest K already, or where it cannot be measured.
    """
    last = max(points)
    if last == MOST_CODES:
        return 0.0
    few = setting._replace(rows=max(1, setting.rows * last // MOST_CODES))
    try:
        least, most = (
            footprint(group, name, few._replace(codes=codes)) for codes in (last, MOST_CODES)
        )
    except Exception:  # of any library; the line of the measured points remains
        return 0.0
    return (most - least) / (MOST_CODES - last)


def conclusions(points: dict[int, int], slope: float) -> Iterator[Row]:
    """The line of that slope through the last point, and the largest K within each budget."""
    last = max(points)
    fixed = points[last] - slope * last
    yield {"metric": "bytes at K = 0", "unit": "B", "p50": fixed, "status": "extrapolated"}
    yield {"metric": "bytes per code", "unit": "B", "p50": slope, "status": "extrapolated"}
    for budget in BUDGETS:
        most = (budget * 10**9 - fixed) / slope if slope > 0 else MOST_CODES
        most = int(min(max(most, 0), MOST_CODES))
        status = "interpolated" if most <= last else "extrapolated"
        metric = f"largest K in {budget} GB"
        yield {"metric": metric, "unit": "codes", "p50": most, "status": status}


def footprint(group: str, name: str, setting: Setting) -> int:
    """Bytes of inputs and the incoming gradient, and the peak beyond them."""
    inputs = setting.dtype.itemsize * setting.dim * (2 * setting.rows + setting.codes)
    return inputs + peak_bytes(setting.device, step, group, name, setting)


def report(rows: list[dict[str, str]]) -> None:
    """A line for every candidate: what was measured last, and the largest K in each budget."""
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        found = lines.setdefault(row["candidate"], {"note": ""})
        if row["metric"] == "footprint" and row["status"] == "ok":
            found["last"] = f"{float(row['p50']) / 1e9:.3g} GB at K = {row['codes']}"
        elif row["metric"] == "footprint":
            found["note"] = row["status"]
        else:
            found[row["metric"]] = row["p50"] + (" *" if row["status"] == "extrapolated" else "")
    print(headline(rows[0]))
    print(f"forward + backward, N = {rows[0]['rows']}, D = {rows[0]['dim']}; * extrapolated")
    columns = [f"largest K in {budget} GB" for budget in BUDGETS]
    print_table(
        ["candidate", "measured up to", *columns, ""],
        [
            [name, *(found.get(column, "") for column in ("last", *columns)), found["note"]]
            for name, found in lines.items()
        ],
    )
