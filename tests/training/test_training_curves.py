"""The curves of a report: their scales, their ticks, and what is left out of long ones."""

import math

import pytest

from softvq.training.curves import MOST_POINTS, Scale, draw_chart, number, thin


def test_curves_lie_where_their_axes_say() -> None:
    chart = draw_chart("c", {"a": [(0, 1.0), (50, 10.0), (100, 1000.0)]}, "log")
    path = chart.lines[0].path.removeprefix("M").split("L")
    heights = {int(x): float(y) / 10 for x, y in (point.split() for point in path)}
    ticks = {tick.text: tick.place for tick in chart.y_ticks}
    expected = {0: ticks["1"], 500: ticks["10"], 1000: ticks["1,000"]}
    assert heights == pytest.approx(expected, abs=0.1)
    # Going up from 1 to 10 is a third of the way up from 1 to 1000.
    assert ticks["1"] - ticks["10"] == pytest.approx((ticks["1"] - ticks["1,000"]) / 3)
    assert ticks["1,000"] < ticks["1"]
    assert {"0", "50", "100"} <= {tick.text for tick in chart.x_ticks}


def test_a_value_of_zero_or_below_makes_the_log_axis_linear() -> None:
    chart = draw_chart("c", {"a": [(0, 1.0), (1, 0.0)]}, "log")
    assert not chart.log
    assert {"0", "1"} <= {tick.text for tick in chart.y_ticks}


@pytest.mark.parametrize("value", [1e-12, 0.0, 0.05, 1.0, 3e7])
@pytest.mark.parametrize("scale", ["log", "from zero"])
def test_one_point_or_a_constant_can_be_drawn(value: float, scale: Scale) -> None:
    for points in ([(7, value)], [(0, value), (9, value)]):
        chart = draw_chart("c", {"a": points}, scale)
        assert chart.y_ticks and chart.x_ticks
        assert all(0 <= tick.place <= 100 for tick in (*chart.x_ticks, *chart.y_ticks))


def test_thinning_keeps_extremes_and_the_last_point() -> None:
    points = [(step, math.sin(step)) for step in range(100_000)]
    points[54_321] = (54_321, 9.0)
    kept = thin(points)
    assert len(kept) <= MOST_POINTS + 1
    assert (54_321, 9.0) in kept and kept[-1] == points[-1]
    assert kept == sorted(kept) and set(kept) <= set(points)
    assert thin(points[:10]) == points[:10]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.008341, "0.008341"), (1.2e-5, "1.2e-5"), (12345.6, "12,346"), (-0.5, "-0.5")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text
