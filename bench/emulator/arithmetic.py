"""What each thread computes for itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from bench.emulator.memory import Fault
from bench.emulator.program import Instruction
from bench.emulator.types import TYPES, from_16, to_16

if TYPE_CHECKING:
    from bench.emulator.machine import Machine

Handler = Callable[["Machine", Instruction], None]
WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


def _least(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (np.fmin if a.dtype.kind == "f" else np.minimum)(a, b)


def _largest(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (np.fmax if a.dtype.kind == "f" else np.maximum)(a, b)


def _fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return (a.astype(np.float64) * b + c).astype(a.dtype)


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """As of div.full and div.approx, which may be wrong by two units in the last place: the
    product with a reciprocal, which is exact for powers of two.
    """
    error = np.where(np.frexp(b)[0] == 0.5, 0.0, 2.0**-23 * _noise(b))
    return (a * (1.0 / b.astype(np.float64) * (1 + error)).astype(np.float32)).astype(np.float32)


def _power_of_two(x: np.ndarray) -> np.ndarray:
    """As of ex2.approx.ftz, whose largest relative error is 2^-22."""
    x = _flushed(x)
    return _flushed((np.exp2(x.astype(np.float64)) * (1 + 2.0**-22 * _noise(x))).astype(np.float32))


def _square_root(x: np.ndarray) -> np.ndarray:
    """As of sqrt.approx.ftz, whose largest relative error is 2^-23."""
    return (np.sqrt(x.astype(np.float64)) * (1 + 2.0**-23 * _noise(x))).astype(np.float32)


def _noise(x: np.ndarray) -> np.ndarray:
    """From −1 to 1, the same for the same float32; none at 0, where even the hardware is exact."""
    bits = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
    mixed = bits * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)
    return np.where(x == 0, 0.0, mixed / 2.0**23 - 1)


def _flushed(x: np.ndarray) -> np.ndarray:
    """A subnormal number is zero."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(x.dtype.type(0), x), x)


FUNCTIONS = {
    "abs": np.abs,
    "add": np.add,
    "and": np.bitwise_and,
    "div": _quotient,
    "ex2": _power_of_two,
    "fma": _fused,
    "max": _largest,
    "min": _least,
    "mul": np.multiply,
    "neg": np.negative,
    "not": np.invert,
    "or": np.bitwise_or,
    "sqrt": _square_root,
    "sub": np.subtract,
    "xor": np.bitwise_xor,
}


def _elementwise(m: Machine, i: Instruction) -> None:
    operation = FUNCTIONS[i.name[0]]
    if i.name[0] == "div" and "rn" in i.name:
        operation = np.divide
    if "NaN" in i.name:
        operation = {"max": np.maximum, "min": np.minimum}[i.name[0]]
    if i.name[-2] == "f32":  # float32, but for all sources except the last
        *halves, last = i.operands[1:]
        values = [from_16(m.get(x, "b16"), i.type) for x in halves] + [m.get(last, "f32")]
    else:
        values = [m.get(x, i.type) for x in i.operands[1:]]
    if i.type == "f32x2":  # both halves of 64 bits
        values = [np.ascontiguousarray(x).view(np.float32) for x in values]
    if "ftz" in i.name:
        values = list(map(_flushed, values))
    chain = i.name[0] in ("max", "min")  # of two or three
    result = functools.reduce(operation, values) if chain else operation(*values)
    if "ftz" in i.name:
        result = _flushed(result)
    m.put(i, i.operands[0], result.view(np.uint64) if i.type == "f32x2" else result)


def _multiply(m: Machine, i: Instruction) -> None:
    """mul and mad of integers, mul of floats."""
    if i.type.startswith("f"):
        return _elementwise(m, i)
    kind, operands = i.type, i.operands
    a, b = m.get(operands[1], kind), m.get(operands[2], kind)
    if "lo" not in i.name:
        kind = WIDER[kind]
        a, b = a.astype(TYPES[kind]), b.astype(TYPES[kind])
    product = a * b
    if "hi" in i.name:
        product, kind = (product >> 8 * TYPES[i.type].itemsize).astype(TYPES[i.type]), i.type
    if i.name[0] == "mad":
        product = product + m.get(operands[3], kind)
    m.put(i, operands[0], product)


def _shift(m: Machine, i: Instruction) -> None:
    value, by = m.get(i.operands[1], i.type), m.get(i.operands[2], "u32")
    last = 8 * value.dtype.itemsize - 1
    amount = np.minimum(by, last).astype(value.dtype)
    result = value << amount if i.name[0] == "shl" else value >> amount
    if i.name[0] == "shl" or value.dtype.kind == "u":
        result = np.where(by > last, value.dtype.type(0), result)
    m.put(i, i.operands[0], result)


def _extract_bits(m: Machine, i: Instruction) -> None:
    value = m.get(i.operands[1], i.type)
    position, length = i.operands[2:]
    above = 8 * value.dtype.itemsize - position - length
    scalar = value.dtype.type
    m.put(i, i.operands[0], (value << scalar(above)) >> scalar(above + position))


def _insert_bits(m: Machine, i: Instruction) -> None:
    field, value = m.get(i.operands[1], i.type), m.get(i.operands[2], i.type)
    position, length = i.operands[3:]
    scalar = value.dtype.type
    ones = scalar(((1 << length) - 1) << position)
    m.put(i, i.operands[0], (value & ~ones) | (field << scalar(position) & ones))


def _permute_bytes(m: Machine, i: Instruction) -> None:
    bytes_ = [m.get(x, "b32")[..., None].view("u1") for x in i.operands[1:3]]
    nibbles = m.get(i.operands[3], "b32")[..., None] >> np.arange(0, 16, 4, np.uint32)
    selector = nibbles & np.uint32(15)
    if (selector > 7).any():
        raise Fault("prmt with a sign")
    chosen = np.take_along_axis(np.concatenate(bytes_, -1), selector.astype(int), -1)
    m.put(i, i.operands[0], chosen.view(np.uint32)[..., 0])


def _logic_of_three(m: Machine, i: Instruction) -> None:
    a, b, c = (m.get(x, "b32") for x in i.operands[1:4])
    result = np.zeros_like(a)
    for case in range(8):
        if i.operands[4] >> case & 1:
            terms = (x if case & bit else ~x for x, bit in ((a, 4), (b, 2), (c, 1)))
            result |= np.bitwise_and.reduce(list(terms))
    m.put(i, i.operands[0], result)


def _select(m: Machine, i: Instruction) -> None:
    a, b = m.get(i.operands[1], i.type), m.get(i.operands[2], i.type)
    m.put(i, i.operands[0], np.where(m.get(i.operands[3], "pred"), a, b))


def _compare(m: Machine, i: Instruction) -> None:
    relation = i.name[1]
    a, b = m.get(i.operands[1], i.type), m.get(i.operands[2], i.type)
    unordered = np.isnan(a) | np.isnan(b) if i.type.startswith("f") else np.zeros(m.shape, bool)
    if relation in ("num", "nan"):
        result = unordered if relation == "nan" else ~unordered
    else:
        names = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
                 "gt": np.greater, "ge": np.greater_equal}  # fmt: skip
        result = names[relation[:2]](a, b) & ~unordered
        if len(relation) == 3:  # equ, neu …: or unordered
            result |= unordered
    if len(i.operands) == 4:
        combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[i.name[2]]
        result = combine(result, m.get(i.operands[3], "pred"))
    m.put(i, i.operands[0], result)


def _convert(m: Machine, i: Instruction) -> None:
    to, source = i.name[-2:]
    target, *values = i.operands
    if to.endswith("16x2"):  # the first of two floats is the upper half
        high, low = (to_16(m.get(x, source), to[:-2]).astype(np.uint32) for x in values)
        return m.put(i, target, high << np.uint32(16) | low)
    value = m.get(values[0], source)
    if source in ("bf16", "f16"):
        value = from_16(m.get(values[0], "b16"), source)
    if to in ("bf16", "f16"):
        return m.put(i, target, to_16(value.astype(np.float32), to))
    if value.dtype.kind == "f" and TYPES[to].kind != "f":
        rounding = {"rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil, "rni": np.rint}
        value = next(rounding[x] for x in i.name if x in rounding)(value)
    m.put(i, target, value.astype(TYPES[to]))


def _move(m: Machine, i: Instruction) -> None:
    """mov, also of two registers into one and of one into two."""
    target, source = i.operands
    if isinstance(source, tuple):
        half = f"b{8 * TYPES[i.type].itemsize // len(source)}"
        parts = np.stack([m.get(x, half) for x in source], -1)
        m.put(i, target, parts.view(TYPES[i.type])[..., 0])
    elif isinstance(target, tuple):
        half = f"u{TYPES[i.type].itemsize // len(target)}"
        parts = np.ascontiguousarray(m.get(source, i.type))[..., None].view(half)
        for register, part in zip(target, np.moveaxis(parts, -1, 0), strict=True):
            m.put(i, register, part)
    else:
        m.put(i, target, m.get(source, i.type))


def _no_operation(m: Machine, i: Instruction) -> None:
    """What orders what is in order here anyway."""


HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(FUNCTIONS, _elementwise),
    "mul": _multiply,
    "mad": _multiply,
    "shl": _shift,
    "shr": _shift,
    "bfe": _extract_bits,
    "bfi": _insert_bits,
    "prmt": _permute_bytes,
    "lop3": _logic_of_three,
    "selp": _select,
    "setp": _compare,
    "cvt": _convert,
    "mov": _move,
    "fence": _no_operation,
}
