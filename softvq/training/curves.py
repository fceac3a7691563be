"""The curves of a report: metrics over steps, placed for an SVG that stretches with the page."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from matplotlib.ticker import MaxNLocator

Points = Sequence[tuple[int, float]]  # (step, finite value), by step
# "log" needs values above 0, and is linear without; "from zero" is linear and includes 0.
Scale = Literal["log", "from zero"]

SIZE = 1000  # the plot is SIZE x SIZE units; the page stretches it
MOST_POINTS = 400  # per line; more cannot be told apart


class Tick(NamedTuple):
    """A labelled place on an axis; `place` is in percent, from the left or from the top."""

    place: float
    text: str


class Line(NamedTuple):
    """One curve: `path` is the d of an SVG path, `end` that of the dot on its last point."""

    label: str
    path: str
    end: str
    last: str


class Chart(NamedTuple):
    """One picture of curves with its axes; `alt` says in words what it shows."""

    title: str
    log: bool
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    alt: str


def draw_chart(title: str, series: Mapping[str, Points], scale: Scale) -> Chart | None:
    """Lay the series (label -> points) out in one chart; None when no series has a point."""
    series = {label: points for label, points in series.items() if points}
    if not series:
        return None
    steps = [step for points in series.values() for step, _ in points]
    values = [value for points in series.values() for _, value in points]
    log = scale == "log" and min(values) > 0
    if log:
        y_axis, y_ticks = _log_axis(min(values), max(values))
    else:
        y_axis, y_ticks = _linear_axis([*values, 0.0] if scale == "from zero" else values)
    x_axis = _Axis(min(steps), max(max(steps), min(steps) + 1), False)
    x_ticks = MaxNLocator(4, steps=[1, 2, 5, 10], integer=True).tick_values(x_axis.low, x_axis.high)

    def place(point: tuple[int, float]) -> str:
        return f"{SIZE * x_axis(point[0]):.0f} {SIZE - SIZE * y_axis(point[1]):.1f}"

    lines = [
        Line(
            label,
            "M" + "L".join(place(point) for point in thin(points)),
            f"M{place(points[-1])}h0",
            number(points[-1][1]),
        )
        for label, points in series.items()
    ]
    return Chart(
        title,
        log,
        lines,
        [Tick(100 * x_axis(x), f"{x:,.0f}") for x in x_ticks if 0 <= x_axis(x) <= 1],
        [Tick(100 - 100 * y_axis(y), number(y)) for y in y_ticks if 0 <= y_axis(y) <= 1],
        f"{title}. " + " ".join(_in_words(label, points) for label, points in series.items()),
    )


def thin(points: Points) -> Points:
    """At most MOST_POINTS + 1 of the points: each stretch keeps its lowest and its highest one."""
    if len(points) <= MOST_POINTS:
        return points
    length = math.ceil(2 * len(points) / MOST_POINTS)
    kept = {points[-1]}
    for start in range(0, len(points), length):
        stretch = sorted(points[start : start + length], key=lambda point: point[1])
        kept |= {stretch[0], stretch[-1]}
    return sorted(kept)


def number(value: float) -> str:
    """A number for people: four digits, thousands grouped, no zeros to pad an exponent."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    text = f"{value:.4g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.2e}"
    mantissa, e, exponent = text.partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}" if e else text


class _Axis(NamedTuple):
    """Maps [low, high] to [0, 1]."""

    low: float
    high: float
    log: bool

    def __call__(self, value: float) -> float:
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def _linear_axis(values: Sequence[float]) -> tuple[_Axis, list[float]]:
    """An axis around the values that begins and ends with a tick, and its ticks."""
    ticks = [float(tick) for tick in MaxNLocator(4).tick_values(min(values), max(values))]
    return _Axis(ticks[0], ticks[-1], False), ticks


def _log_axis(low: float, high: float) -> tuple[_Axis, list[float]]:
    """An axis a little around [low, high], and ticks: powers of ten, or closer if few of them."""
    around = max(high / low, 1.2) ** 0.08
    axis = _Axis(low / around, high * around, True)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if high / low > 100:
        ticks = [10.0**power for power in range(first, last + 1, math.ceil((last - first) / 5))]
    elif high / low > 5:
        ticks = [digit * 10.0**power for power in range(first, last + 1) for digit in (1, 2, 5)]
    else:
        ticks = [float(tick) for tick in MaxNLocator(4).tick_values(axis.low, axis.high)]
    return axis, [tick for tick in ticks if tick > 0]


def _in_words(label: str, points: Points) -> str:
    (first_step, first), (last_step, last) = points[0], points[-1]
    return (
        f"{label}: from {number(first)} at step {first_step:,} "
        f"to {number(last)} at step {last_step:,}."
    )
