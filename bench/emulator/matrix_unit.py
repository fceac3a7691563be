"""What matrix units compute, and where Ampere's and Hopper's find their operands.

Numbers are those of Khattak and Mikaitis, "Accurate Models of NVIDIA Tensor Cores"
(arXiv:2512.07004), and Li et al., FTTN (arXiv:2403.00232): products are exact; a block of them and
the accumulator are aligned to the largest, and what lies further below it than a float32 holds, but
for a few more bits, is cut off; so is what their sum has more than a float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bench.emulator.memory import POISON, Fault
from bench.emulator.program import Instruction
from bench.emulator.types import from_16
from bench.launches import FAMILY

if TYPE_CHECKING:
    from bench.emulator.machine import Machine

BLOCK = {"ampere": 8, "hopper": 16, "blackwell": 16}  # terms that are added up together
MORE_BITS = {"ampere": 1, "hopper": 2, "blackwell": 2}  # of consumers' cards not known: the fewest
SWIZZLE = {90: {1: 128, 2: 64, 3: 32}, 100: {2: 128, 4: 64, 6: 32}}  # code in a descriptor: bytes
_LANE = np.arange(32)
_GROUP, _OF_GROUP = _LANE // 4, _LANE % 4


def multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray, architecture: int) -> np.ndarray:
    """a (…, M, K) times b (…, N, K), plus c (…, M, N) float32, as this matrix unit rounds it."""
    a, b, total = a.astype(np.float64), b.astype(np.float64), c.astype(np.float64)
    family = FAMILY[architecture]
    step = BLOCK[family]
    for k in range(0, a.shape[-1], step):
        # (…, M, N, step + 1)
        terms = a[..., :, None, k : k + step] * b[..., None, :, k : k + step]
        terms = np.concatenate([terms, total[..., None]], -1)
        largest = np.abs(terms).max(-1, keepdims=True)
        _, exponent = np.frexp(largest)
        unit = np.ldexp(1.0, exponent - 24 - MORE_BITS[family])
        # What is not finite stays so.
        total = np.where(np.isfinite(largest), np.trunc(terms / unit) * unit, terms).sum(-1)
        rounded = total.astype(np.float32)
        over = np.abs(rounded.astype(np.float64)) > np.abs(total)
        total = np.where(over, np.nextafter(rounded, np.float32(0)), rounded).astype(np.float64)
    return total.astype(np.float32)


class Products:
    """wgmma: products are computed when their group is waited for, and not before."""

    def __init__(self):
        self._groups: list[list[Callable[[], None]]] = [[]]  # the last is open
        # Registers that sums of products will be in → their sum so far, and how many are to come.
        self._sums: dict[tuple[str, ...], list] = {}

    def add(self, m: Machine, i: Instruction, start: np.ndarray | None, multiply) -> None:
        """To the sum in `i`'s registers; `start` is where a sum begins, None is zero."""
        registers = i.operands[0]
        if registers not in self._sums:
            self._sums[registers] = [start, 0]
            for register in registers:
                m.put(i, register, np.full(m.shape, POISON, np.uint32))
        elif start is None:
            raise Fault("a sum under way is dropped")
        self._sums[registers][1] += 1

        def finish() -> None:
            sum_so_far, to_come = self._sums[registers]
            sum_so_far = multiply(sum_so_far)
            self._sums[registers] = [sum_so_far, to_come - 1]
            if to_come == 1:
                values = scattered(self._sums.pop(registers)[0]).reshape(*m.shape, -1)
                for register, value in zip(registers, np.moveaxis(values, -1, 0), strict=True):
                    m.put(i, register, value)

        self._groups[-1].append(finish)

    def commit(self) -> None:
        self._groups.append([])

    def wait(self, most: int) -> None:
        """Until at most so many groups are under way."""
        while len(self._groups) > most + 1:
            for finish in self._groups.pop(0):
                finish()


def _gathered(m: Machine, registers: tuple[str, ...], kind: str) -> np.ndarray:
    """(programs, warps, 32, registers)"""
    values = np.stack([m.get(x, kind) for x in registers], -1)
    return values.reshape(m.shape[0], -1, 32, len(registers))


def numbers_of(words: np.ndarray, kind: str) -> np.ndarray:
    """Words (…) as their two 16-bit numbers each, (…, 2)."""
    return from_16(np.ascontiguousarray(words)[..., None].view(np.uint16), kind)


def _left(m: Machine, registers: tuple[str, ...], kind: str) -> np.ndarray:
    """Four registers of each thread as the left operands of warps, (programs, warps, 16, 16)."""
    words = numbers_of(_gathered(m, registers, "b32"), kind)
    out = np.empty((*words.shape[:2], 16, 16), np.float32)
    for register in range(4):
        for half in range(2):
            row = _GROUP + 8 * (register % 2)
            column = 2 * _OF_GROUP + half + 8 * (register // 2)
            out[:, :, row, column] = words[:, :, :, register, half]
    return out


def _sum_position(register: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of what each lane holds of a sum in this register, (32)."""
    row = _GROUP + 8 * (register % 4 // 2)
    return row, 8 * (register // 4) + 2 * _OF_GROUP + register % 2


def _sum(m: Machine, registers: tuple[str, ...]) -> np.ndarray:
    """Registers of each thread as the sums of warps, (programs, warps, 16, columns)."""
    values = _gathered(m, registers, "f32")
    out = np.empty((*values.shape[:2], 16, 2 * len(registers)), np.float32)
    for register in range(len(registers)):
        row, column = _sum_position(register)
        out[:, :, row, column] = values[..., register]
    return out


def scattered(sums: np.ndarray) -> np.ndarray:
    """The inverse: (programs, warps, 32, registers)."""
    out = np.empty((*sums.shape[:2], 32, sums.shape[-1] // 2), np.float32)
    for register in range(out.shape[-1]):
        row, column = _sum_position(register)
        out[..., register] = sums[:, :, row, column]
    return out


def _mma(m: Machine, i: Instruction) -> None:
    if i.name[3] != "m16n8k16" or i.name[6] != "f32":
        raise Fault("another shape or type of mma")
    kind = i.name[7]
    target, a, b, c = i.operands
    words = numbers_of(_gathered(m, b, "b32"), kind)
    right = np.empty((*words.shape[:2], 8, 16), np.float32)
    for register in range(2):
        for half in range(2):
            row = 2 * _OF_GROUP + half + 8 * register
            right[:, :, _GROUP, row] = words[:, :, :, register, half]
    sums = multiply_add(_left(m, a, kind), right, _sum(m, c), m.launch.architecture)
    values = scattered(sums).reshape(*m.shape, 4)
    for register, value in zip(target, np.moveaxis(values, -1, 0), strict=True):
        m.put(i, register, value)


class InShared:
    """`rows` rows of 16 numbers in shared memory, which a product will read; `contiguous` if the
    rows of a column lie side by side, and not the columns of a row.
    """

    def __init__(self, m: Machine, descriptor: int, rows: int, contiguous: bool, kind: str):
        architecture = m.launch.architecture
        start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
        width = SWIZZLE[architecture][descriptor >> (62 if architecture == 90 else 61)]
        row, k = np.arange(rows)[:, None], np.arange(16)
        if contiguous:
            across = width // 2
            at = row // across * leading + row % across * 2 + k // 8 * stride + k % 8 * width
        else:
            at = row // 8 * stride + row % 8 * width + k * 2
        at = at + start
        at ^= (at >> 7 & width // 16 - 1) << 4
        if at.max() + 2 > m.launch.shared_bytes:
            raise Fault("a matrix ends outside of shared memory")
        self._shared, self._at, self._kind = m.shared, at // 2, kind
        self._words = np.unique(at // 4)
        m.shared.reserve(self._words)

    def read(self) -> np.ndarray:
        """(programs, rows, 16), for the last time."""
        self._shared.reserve(self._words, -1)
        return from_16(self._shared.words.view(np.uint16)[:, self._at], self._kind)


class InRegisters(NamedTuple):
    """The same of what is at hand."""

    matrix: np.ndarray

    def read(self) -> np.ndarray:
        return self.matrix


def _wgmma(m: Machine, i: Instruction) -> None:
    match i.name[1]:
        case "fence":
            return
        case "commit_group":
            return m.products.commit()
        case "wait_group":
            return m.products.wait(i.operands[0])
    kind, columns = i.name[6], int(i.name[4].removeprefix("m64n").removesuffix("k16"))
    target, a, b, add, *signs_and_layouts = i.operands
    if signs_and_layouts[:2] != [1, 1]:
        raise Fault("another sign of wgmma")
    layouts = list(map(bool, signs_and_layouts[2:]))  # contiguous along rows
    shape = (m.shape[0], m.shape[1] // 128, 64)  # groups of four warps

    def matrices(operand: str, rows: int, contiguous: bool) -> list[InShared]:
        """Of each group, from its descriptor."""
        bits = m.get(operand, "u64").reshape(*shape[:2], 128)
        if (bits != bits[:1, :, :1]).any():
            raise Fault(f"{operand} differs between threads")
        return [InShared(m, int(x), rows, contiguous, kind) for x in bits[0, :, 0]]

    if isinstance(a, str):
        left = matrices(a, 64, layouts[0])
    else:
        groups = _left(m, a, kind).reshape(*shape, 16)
        left = [InRegisters(groups[:, group]) for group in range(shape[1])]
    right = matrices(b, columns, layouts[-1])

    def multiply(sums: np.ndarray | None) -> np.ndarray:
        """Plus what the matrices are now; sums (programs, warps, 16, columns)."""
        start = np.zeros((*shape, columns), np.float32) if sums is None else sums
        a_now, b_now = (np.stack([x.read() for x in matrix], 1) for matrix in (left, right))
        sums = multiply_add(a_now, b_now, start.reshape(*shape, columns), m.launch.architecture)
        return sums.reshape(m.shape[0], -1, 16, columns)

    start = _sum(m, target) if m.only(i, add, "pred") else None
    m.products.add(m, i, start, multiply)


HANDLERS = {"mma": _mma, "wgmma": _wgmma}
