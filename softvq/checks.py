"""Checks of options: each raises an error that names option, value and what is allowed."""

import math
from collections.abc import Sequence

# Of a squared distance, divided by it, float32 keeps something in either direction.
LEAST_TEMPERATURE, LARGEST_TEMPERATURE = 1e-20, 1e20


def check_counts(least: int, **options: int | None) -> None:
    """Whole numbers from `least` up; None is left alone. Raises TypeError or ValueError."""
    for name, value in options.items():
        if value is None:
            continue
        if not isinstance(value, int):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def check_positive(**options: float) -> None:
    """Finite numbers above 0. Raises ValueError."""
    for name, value in options.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be a finite number above 0, got {value}")


def check_temperatures(**options: float) -> None:
    """Divisors of squared distances. Raises ValueError."""
    for name, value in options.items():
        if not LEAST_TEMPERATURE <= value <= LARGEST_TEMPERATURE:
            raise ValueError(
                f"{name} must be from {LEAST_TEMPERATURE} to {LARGEST_TEMPERATURE}, got {value}"
            )


def check_weights(**options: float) -> None:
    """Finite numbers from 0 up. Raises ValueError."""
    for name, value in options.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a finite number from 0 up, got {value}")


def check_decay(decay: float) -> None:
    """What a running mean keeps of itself. Raises ValueError."""
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be a number from 0 up, below 1, got {decay}")


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """One of the allowed names. Raises ValueError."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
