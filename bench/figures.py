"""Figures from the results of every device: time, memory and perplexity against K; accuracy."""

import argparse
import csv
import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, mode

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.memory import BUDGETS, MOST_CODES
from bench.results import OUT

Rows = list[dict[str, str]]
Line = list[tuple[float, float]]
SIZES = ("rows", "codes", "dim")
OURS, PLAIN, PEERS, INK, QUIET = "#c2410c", "#64748b", "#2563eb", "#334155", "#94a3b8"
STYLE = {
    "figure.dpi": 150,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": QUIET,
    "axes.grid": True,
    "axes.grid.which": "major",
    "grid.color": "#e2e8f0",
    "xtick.color": INK,
    "ytick.color": INK,
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
    usual = mode(r["rows"] for r in rows) if rows else ""
    rows = [r for r in rows if r["rows"] == usual]
    dtypes = [d for d in ("float32", "bfloat16") if len(_values(rows, "codes", dtype=d)) > 1]
    if not dtypes:
        return None
    title = f"forward + backward, N = {rows[0]['rows']}, D = 64"
    figure, panels = _panels(len(dtypes), rows[0], title)
    found = [_lines([r for r in rows if r["dtype"] == dtype], "codes") for dtype in dtypes]
    for axes, dtype, lines in zip(panels, dtypes, found, strict=True):
        _draw(axes, lines)
        axes.set(title=dtype)
        _codes_along(axes, _numbers(rows, "codes"))
    panels[0].set_ylabel("seconds")
    for axes, lines in zip(panels, found, strict=True):
        _name(axes, lines)
    return figure


def memory(rows: Rows) -> Figure | None:
    """Bytes against K: measured points and, dashed, the line that continues them."""
    rows = [r for r in rows if r["command"] == "memory"]
    if not rows:
        return None
    title = f"forward + backward, N = {rows[0]['rows']}, D = {rows[0]['dim']}"
    figure, (axes,) = _panels(1, rows[0], title)
    lines: dict[str, Line] = {}
    dashed: dict[str, Line] = {}
    for name in _values(rows, "candidate"):
        if name.startswith("softvq triton"):  # one of them is what "softvq" is
            continue
        own = [r for r in rows if r["candidate"] == name and r["p50"]]
        line = _line([r for r in own if r["metric"] == "footprint"], "codes")
        found = {r["metric"]: float(r["p50"]) for r in own if r["metric"] != "footprint"}
        if line and "bytes per code" in found:
            end = found["bytes at K = 0"] + MOST_CODES * found["bytes per code"]
            lines[name] = [(x, y / 1e9) for x, y in line]
            dashed[name] = [lines[name][-1], (MOST_CODES, end / 1e9)]
    for name, line in dashed.items():
        axes.plot(*zip(*line, strict=True), "--", color=_color(name), lw=1, alpha=0.7)
    _draw(axes, lines)
    for budget in BUDGETS:
        axes.axhline(budget, color=QUIET, lw=0.8)
        place = {"xy": (0.01, budget), "xycoords": ("axes fraction", "data")}
        axes.annotate(f"{budget} GB", **place, va="top", color=QUIET, fontsize=8)
    axes.set(ylabel="GB in all; dashed: extrapolated")
    _codes_along(axes, sorted({*_numbers(rows, "codes"), MOST_CODES}))
    _name(axes, dashed)
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
    size = ", ".join(
        f"{letter} = {rows[0][name]}" for letter, name in zip("NKD", SIZES, strict=True)
    )
    figure, panels = _panels(len(offsets), rows[0], f"largest error of q, float32, {size}")
    found = [_lines([r for r in rows if r["offset"] == o], "temperature") for o in offsets]
    for axes, offset, lines in zip(panels, offsets, found, strict=True):
        _draw(axes, lines)
        axes.set(title=f"data offset {float(offset):g}", xlabel="temperature T")
    panels[0].set_ylabel("error against float64 over the largest |q|")
    for axes, lines in zip(panels, found, strict=True):
        _name(axes, lines)
    return figure


def collapse(rows: Rows) -> Figure | None:
    """Perplexity against K, with the spread over seeds: how many codes each keeps in use."""
    rows = [r for r in rows if (r["command"], r["metric"]) == ("quality", "perplexity")]
    if not rows:
        return None
    figure, (axes,) = _panels(1, rows[0], f"perplexity of the test split, {rows[0]['rows']} steps")
    lines = _lines(rows, "codes")
    _draw(axes, lines)
    lower, upper = _lines(rows, "codes", "p20"), _lines(rows, "codes", "p80")
    for name in lines:
        (codes, low), (_, high) = (zip(*band[name], strict=True) for band in (lower, upper))
        axes.fill_between(codes, low, high, color=_color(name), alpha=0.2, lw=0)
    codes = _numbers(rows, "codes")
    axes.plot(codes, codes, "--", color=QUIET, lw=0.8)
    axes.annotate("K", (codes[-1], codes[-1]), color=QUIET, va="bottom")
    axes.set(ylabel="perplexity")
    _codes_along(axes, codes)
    _name(axes, lines)
    return figure


FIGURES: dict[str, Callable[[Rows], Figure | None]] = {
    "time": time,
    "memory": memory,
    "accuracy": accuracy,
    "collapse": collapse,
}


def _panels(count: int, row: dict[str, str], title: str) -> tuple[Figure, list[Axes]]:
    """Axes side by side, under what was measured where and when."""
    figure, panels = pyplot.subplots(
        1, count, figsize=(6.6 * count, 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    threads = f", {row['threads']} threads" if row["threads"] else ""
    where = f"{row['device']}{threads}, torch {row['torch']}, {row['date']}"
    figure.suptitle(f"{title}\n{where}", fontsize=9, color=INK)
    return figure, list(panels[0])


def _draw(axes: Axes, lines: dict[str, Line]) -> None:
    """Lines on log axes, ours on top."""
    axes.set(xscale="log", yscale="log")
    for name, line in lines.items():
        ours = name.startswith("softvq")
        style = {"lw": 2.4, "zorder": 3} if ours else {"lw": 1.1}
        axes.plot(*zip(*line, strict=True), "o-", ms=3, color=_color(name), **style)


def _codes_along(axes: Axes, codes: list[float]) -> None:
    """Name the axis of K, and some of these Ks on it."""
    some = codes[:: math.ceil(len(codes) / 5)]
    axes.set(xlabel="codes K")
    axes.set_xticks(some, [f"{k:,.0f}" for k in some])
    axes.set_xticks([], minor=True)


def _name(axes: Axes, lines: dict[str, Line]) -> None:
    """Each line's name in the right margin, none over another, tied to the line's end.

    Call it when the axes are final.
    """
    ends = sorted((math.log(line[-1][1]), line[-1], name) for name, line in lines.items())
    bottom, top = (math.log(y) for y in axes.get_ylim())
    heights = apart([y for y, *_ in ends], (top - bottom) / 22)
    for (_, end, name), height in zip(ends, heights, strict=True):
        tie = {"arrowstyle": "-", "color": _color(name), "lw": 0.5, "relpos": (0, 0.5)}
        axes.annotate(
            name,
            end,
            xytext=(1.03, math.exp(height)),
            textcoords=axes.get_yaxis_transform(),
            arrowprops=tie | {"alpha": 0.6, "shrinkA": 1, "shrinkB": 2},
            va="center",
            color=_color(name),
            fontsize=8,
            fontweight="bold" if name.startswith("softvq") else None,
            annotation_clip=False,
        )


def apart(heights: list[float], gap: float) -> list[float]:
    """Rising heights moved as little as it takes to lie `gap` apart: groups around their middle."""
    groups: list[list[float]] = []  # of what each height is above its place in an even ladder
    for i, height in enumerate(heights):
        groups.append([height - i * gap])
        while len(groups) > 1 and fmean(groups[-2]) > fmean(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    steps = [fmean(group) for group in groups for _ in group]
    return [step + i * gap for i, step in enumerate(steps)]


def _color(name: str) -> str:
    if name.startswith("softvq"):
        return OURS
    return (
        PLAIN if name.startswith(("eager", "compiled", "max-autotune", "two products")) else PEERS
    )


def _lines(rows: Rows, x: str, y: str = "p50") -> dict[str, Line]:
    """The line of every candidate that has one."""
    names = _values(rows, "candidate")
    lines = {name: _line([r for r in rows if r["candidate"] == name], x, y) for name in names}
    return {name: line for name, line in lines.items() if line}


def _line(rows: Rows, x: str, y: str = "p50") -> Line:
    return sorted((float(r[x]), float(r[y])) for r in rows if r[y])


def _numbers(rows: Rows, column: str) -> list[float]:
    """Rising, those of a column that is not empty."""
    return sorted(float(value) for value in _values(rows, column) if value)


def _values(rows: Rows, column: str, **where: str) -> list[str]:
    """Distinct values of a column in the order they appear, of the rows that match."""
    matching = (r for r in rows if all(r[key] == value for key, value in where.items()))
    return list(dict.fromkeys(r[column] for r in matching))
