"""Figures from the results of every device: time and memory against K, and accuracy."""

import argparse
import csv
import math
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.memory import BUDGETS, MOST_CODES
from bench.results import OUT

Rows = list[dict[str, str]]
Line = list[tuple[float, float]]
OURS, OTHERS, QUIET = "#c2410c", "#334155", "#94a3b8"
STYLE = {
    "figure.dpi": 150,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": QUIET,
    "axes.grid": True,
    "axes.grid.which": "major",
    "grid.color": "#e2e8f0",
    "xtick.color": OTHERS,
    "ytick.color": OTHERS,
    "xtick.minor.visible": False,
    "legend.frameon": False,
    "svg.hashsalt": "softvq",  # the same file for the same numbers
    "svg.fonttype": "none",
}


def main(arguments: list[str]) -> int:
    """`python -m bench figures`."""
    parser = argparse.ArgumentParser(prog="python -m bench figures", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the devices' folders")
    options = parser.parse_args(arguments)
    for path in sorted(options.out.glob("*/results.csv")):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        with pyplot.rc_context(STYLE):
            for name, draw in FIGURES.items():
                if figure := draw(rows):
                    for kind in ("svg", "png"):
                        target = path.parent / f"{name}.{kind}"
                        metadata = {"Date": None} if kind == "svg" else None
                        figure.savefig(target, metadata=metadata, bbox_inches="tight")
                        print(target)
                    pyplot.close(figure)
    return 0


def time(rows: Rows) -> Figure | None:
    """Seconds of forward + backward against K, D = 64, a panel for each dtype."""
    rows = [r for r in rows if r["command"] == "op" and r["dim"] == "64" and r["pass"] == "both"]
    dtypes = [d for d in ("float32", "bfloat16") if len(_values(rows, "codes", dtype=d)) > 1]
    if not dtypes:
        return None
    figure, panels = _panels(len(dtypes), rows[0], "forward + backward, D = 64")
    for axes, dtype in zip(panels, dtypes, strict=True):
        lines = {
            name: _line([r for r in rows if (r["candidate"], r["dtype"]) == (name, dtype)], "codes")
            for name in _values(rows, "candidate", dtype=dtype)
        }
        _draw(axes, lines)
        axes.set(title=dtype, xlabel="codes K", ylabel="seconds")
    return figure


def memory(rows: Rows) -> Figure | None:
    """Bytes against K: measured points and, dashed, the line through the last two."""
    rows = [r for r in rows if r["command"] == "memory"]
    if not rows:
        return None
    figure, (axes,) = _panels(1, rows[0], f"forward + backward, D = {rows[0]['dim']}")
    lines: dict[str, Line] = {}
    dashed: dict[str, Line] = {}
    for name in _values(rows, "candidate"):
        own = [r for r in rows if r["candidate"] == name and r["p50"]]
        line = _line([r for r in own if r["metric"] == "footprint"], "codes")
        found = {r["metric"]: float(r["p50"]) for r in own if r["metric"] != "footprint"}
        if line and "bytes per code" in found:
            end = found["bytes at K = 0"] + MOST_CODES * found["bytes per code"]
            lines[name] = [(x, y / 1e9) for x, y in line]
            dashed[name] = [lines[name][-1], (MOST_CODES, end / 1e9)]
    for name, line in dashed.items():
        axes.plot(*zip(*line, strict=True), "--", color=_color(name), lw=1, alpha=0.7)
    _draw(axes, lines, labelled_at=dashed)
    for budget in BUDGETS:
        axes.axhline(budget, color=QUIET, lw=0.8)
        axes.annotate(f"{budget} GB", (1, budget), xycoords=("axes fraction", "data"), ha="right")
    axes.set(xlabel="codes K", ylabel="GB with inputs, outputs and gradients; dashed: extrapolated")
    return figure


def accuracy(rows: Rows) -> Figure | None:
    """Error of q against the temperature, a panel for each offset of the data."""
    rows = [
        r
        for r in rows
        if (r["command"], r["metric"], r["dtype"]) == ("accuracy", "error of quantized", "float32")
        and float(r["p50"]) > 0
    ]
    if not rows:
        return None
    offsets = _values(rows, "offset")
    figure, panels = _panels(len(offsets), rows[0], "largest error of q over the largest |q|")
    for axes, offset in zip(panels, offsets, strict=True):
        lines = {
            name: _line(
                [r for r in rows if (r["candidate"], r["offset"]) == (name, offset)], "temperature"
            )
            for name in _values(rows, "candidate")
        }
        _draw(axes, lines)
        axes.set(title=f"data offset {float(offset):g}", xlabel="temperature T")
    panels[0].set_ylabel("relative error against float64")
    return figure


FIGURES: dict[str, Callable[[Rows], Figure | None]] = {
    "time": time,
    "memory": memory,
    "accuracy": accuracy,
}


def _panels(count: int, row: dict[str, str], title: str) -> tuple[Figure, list[Axes]]:
    """Axes side by side, under what was measured where and when."""
    figure, panels = pyplot.subplots(
        1, count, figsize=(5.6 * count, 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    threads = f", {row['threads']} threads" if row["threads"] else ""
    where = f"{row['device']}{threads}, torch {row['torch']}, {row['date']}"
    figure.suptitle(f"{title}, N = {row['rows']}\n{where}", fontsize=9, color=OTHERS)
    return figure, list(panels[0])


def _draw(axes: Axes, lines: dict[str, Line], labelled_at: dict[str, Line] | None = None) -> None:
    """Lines on log axes, each named at its end; ours in colour and on top."""
    axes.set(xscale="log", yscale="log")
    lines = {name: line for name, line in lines.items() if line}
    for name, line in lines.items():
        ours = name.startswith("softvq")
        style = {"lw": 2.4, "zorder": 3} if ours else {"lw": 1.1}
        axes.plot(*zip(*line, strict=True), "o-", ms=3, color=_color(name), **style)
    ends = {name: (labelled_at or lines)[name][-1] for name in lines}
    axes.autoscale_view()
    bottom, top = (math.log(y) for y in axes.get_ylim())
    gap, last = (top - bottom) / 24, -math.inf
    for name, (x, y) in sorted(ends.items(), key=lambda end: end[1][1]):
        last = max(math.log(y), last + gap)  # pushed up until it no longer covers another
        axes.annotate(
            name,
            (x, math.exp(last)),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=_color(name),
            fontsize=8,
            fontweight="bold" if name.startswith("softvq") else None,
            annotation_clip=False,
        )


def _color(name: str) -> str:
    return OURS if name.startswith("softvq") else OTHERS


def _line(rows: Rows, x: str) -> Line:
    return sorted((float(r[x]), float(r["p50"])) for r in rows if r["p50"])


def _values(rows: Rows, column: str, **where: str) -> list[str]:
    """Distinct values of a column in the order they appear, of the rows that match."""
    matching = (r for r in rows if all(r[key] == value for key, value in where.items()))
    return list(dict.fromkeys(r[column] for r in matching))
