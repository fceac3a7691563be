"""Checks of options and tensors: each error names which, the value and what is allowed."""

import math
from collections.abc import Callable, Sequence
from numbers import Integral

import torch
from torch import Tensor

# Of a squared distance, divided by it, float32 keeps something in either direction.
LEAST_TEMPERATURE, LARGEST_TEMPERATURE = 1e-20, 1e20


def check_counts(least: int, **options: int | None) -> None:
    """Whole numbers from `least` up; None is left alone. Raises TypeError or ValueError."""
    for name, value in options.items():
        if value is None:
            continue
        if not isinstance(value, Integral) or isinstance(value, bool):
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


def check_floating(**tensors: object) -> None:
    """Floating-point tensors. Raises TypeError."""
    _check_tensors("a floating-point tensor", lambda x: x.is_floating_point(), tensors)


def check_integers(**tensors: object) -> None:
    """Tensors of whole numbers. Raises TypeError."""

    def fits(x: Tensor) -> bool:
        return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)

    _check_tensors("whole numbers", fits, tensors)


def check_dtype(dtype: torch.dtype, **tensors: object) -> None:
    """Tensors of this dtype. Raises TypeError."""
    _check_tensors(f"a tensor of {dtype}", lambda x: x.dtype == dtype, tensors)


def _check_tensors(what: str, fits: Callable[[Tensor], bool], tensors: dict[str, object]) -> None:
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or not fits(value):
            got = value.dtype if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise TypeError(f"{name} must be {what}, got {got}")


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """One of the allowed names. Raises ValueError."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
