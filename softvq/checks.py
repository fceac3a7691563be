"""Checks of options and tensors: each error names which, the value and what is allowed."""

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

# Of a squared distance, divided by it, float32 keeps something in either direction.
LEAST_TEMPERATURE, LARGEST_TEMPERATURE = 1e-20, 1e20
_ROUNDING = 1e-6  # of a limit that went through a float32
# Made here, for torch 2.11 compiles no text with a float in it.
_TEMPERATURES = f"a number from {LEAST_TEMPERATURE} to {LARGEST_TEMPERATURE}"


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
    """Finite numbers above 0. Raises TypeError or ValueError."""
    _check_numbers("a finite number above 0", lambda x: 0 < x < math.inf, options)


def check_temperatures(**options: float) -> None:
    """Divisors of squared distances. Raises TypeError or ValueError."""
    least, largest = LEAST_TEMPERATURE * (1 - _ROUNDING), LARGEST_TEMPERATURE * (1 + _ROUNDING)
    _check_numbers(_TEMPERATURES, lambda x: least <= x <= largest, options)


def check_weights(**options: float) -> None:
    """Finite numbers from 0 up. Raises TypeError or ValueError."""
    _check_numbers("a finite number from 0 up", lambda x: 0 <= x < math.inf, options)


def check_decay(decay: float) -> None:
    """What a running mean keeps of itself. Raises TypeError or ValueError."""
    _check_numbers("a number from 0 up, below 1", lambda x: 0 <= x < 1, {"decay": decay})


def _check_numbers(what: str, fits: Callable[[Any], bool], options: dict[str, object]) -> None:
    for name, value in options.items():
        single = value.dim() == 0 if isinstance(value, Tensor) else isinstance(value, Real)
        if not single:
            raise TypeError(f"{name} must be {what}, got {value!r}")
        if not fits(value):
            raise ValueError(f"{name} must be {what}, got {value}")


def check_floating(**tensors: object) -> None:
    """Floating-point tensors of 16 bits or more. Raises TypeError."""

    def fits(x: Tensor) -> bool:
        return x.is_floating_point() and x.dtype.itemsize > 1

    _check_tensors("a floating-point tensor", fits, tensors)


def check_integers(**tensors: object) -> None:
    """Tensors of whole numbers. Raises TypeError."""

    def fits(x: Tensor) -> bool:
        return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)

    _check_tensors("whole numbers", fits, tensors)


def check_dtype(dtype: torch.dtype, **tensors: object) -> None:
    """Tensors of this dtype. Raises TypeError."""
    _check_tensors(f"a tensor of {dtype}", lambda x: x.dtype == dtype, tensors)


def check_range(least: int, end: int, **tensors: Tensor) -> None:
    """Whole numbers in [least, end), where they may be read. Raises ValueError."""
    for name, value in tensors.items():
        if may_read(value) and value.numel():
            low, high = (int(x) for x in value.aminmax())
            if low < least or high >= end:
                raise ValueError(f"{name} must lie in [{least}, {end}), got {low} to {high}")


def may_read(x: Tensor) -> bool:
    """Reading a GPU tensor would stall the stream, and reading at all would break a graph."""
    plain = type(x) in (Tensor, nn.Parameter)  # others, like torch's fake tensors, may hold nothing
    return plain and x.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_tensors(what: str, fits: Callable[[Tensor], bool], tensors: dict[str, object]) -> None:
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or not fits(value):
            got = value.dtype if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise TypeError(f"{name} must be {what}, got {got}")


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """One of the allowed names. Raises ValueError."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
