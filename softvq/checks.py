"""Checks of options and tensors: each error names which, the value and what is allowed."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

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


def check_floating(**tensors: object) -> None:
    """Floating-point tensors. Raises TypeError."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {_kind(value)}")


def check_integers(**tensors: object) -> None:
    """Tensors of whole numbers. Raises TypeError."""
    for name, value in tensors.items():
        numbers = isinstance(value, Tensor) and value.dtype != torch.bool
        if not numbers or value.is_floating_point() or value.is_complex():
            raise TypeError(f"{name} must be a tensor of integers, got {_kind(value)}")


def check_dtype(dtype: torch.dtype, **tensors: object) -> None:
    """Tensors of this dtype. Raises TypeError."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or value.dtype != dtype:
            raise TypeError(f"{name} must be a tensor of {dtype}, got {_kind(value)}")


def _kind(value: object) -> str:
    """What an error calls a tensor, or what is none."""
    return str(value.dtype) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """One of the allowed names. Raises ValueError."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
