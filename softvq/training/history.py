"""Reading metrics.jsonl."""

import json
import math
from pathlib import Path
from typing import Any

Metrics = dict[str, float]
History = dict[str, dict[int, Metrics]]  # split -> step -> metrics


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of metrics.jsonl, and how many cannot be read, torn by a kill or a broken disk."""
    if not path.is_file():
        return [], 0
    lines = [_parsed(line) for line in path.read_text("utf-8", errors="replace").splitlines()]
    whole = [line for line in lines if line is not None]
    return whole, len(lines) - len(whole)


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        match json.loads(text):
            case {"step": int(), "split": str(), **values} as line if are_metrics(values):
                return line
    except ValueError:
        pass
    return None


def read_history(path: Path) -> tuple[History, int]:
    """The metrics by split and step, and how many lines are torn and therefore left out.

    A run that was killed and resumed repeats some steps; the later line counts.
    """
    history: History = {}
    lines, unreadable = read_metrics(path)
    for line in lines:
        step, split = line.pop("step"), line.pop("split")
        history.setdefault(split, {}).setdefault(step, {}).update(with_nan(line))
    return history, unreadable


def are_metrics(values: Any) -> bool:
    """Whether it is numbers by name; null is one, as `with_nan` says."""
    return isinstance(values, dict) and all(
        isinstance(value, int | float | None) for value in values.values()
    )


def with_nan(values: dict[str, float | None]) -> Metrics:
    """JSON has no NaN, so that null stands for it."""
    return {name: math.nan if value is None else value for name, value in values.items()}
