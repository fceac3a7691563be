"""Blackwell: products whose sums stay in a memory of their own, asked for by one thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from bench.emulator.matrix_unit import InShared, multiply_add, numbers_of
from bench.emulator.memory import POISON, Fault
from bench.emulator.program import Address, Instruction
from bench.emulator.transfers import address_of

if TYPE_CHECKING:
    from bench.emulator.machine import Machine

LANES, COLUMNS = 128, 512
KINDS = {0: "f16", 1: "bf16"}


class TensorMemory:
    """That of each program, its products under way, and the barriers that tell of their end.

    Products are computed only when somebody waits at a barrier that comes after them.
    """

    def __init__(self, programs: int):
        self.words = np.full((programs, LANES, COLUMNS), POISON, np.uint32)
        self.reserved = np.zeros(self.words.shape, int)  # products under way that read the word
        self.allocated = 0  # columns
        self.products: list[Callable[[], None]] = []
        self._computed = 0
        # Address of a barrier → its completed phases, and of each to come the products before it.
        self.barriers: dict[int, tuple[int, list[int]]] = {}
        self._changed = False

    def add(self, product: Callable[[], None]) -> None:
        self.products.append(product)

    def arrive_after_products(self, barrier: int) -> None:
        """All that are under way."""
        self.barriers[barrier][1].append(len(self.products))
        self._changed = True

    def complete(self, barrier: int, parity: int) -> bool:
        """Whether the last phase of this parity is complete, having done what was to be done."""
        phases, to_come = self.barriers[barrier]
        if phases % 2 == parity and to_come:
            for product in self.products[self._computed : to_come[0]]:
                product()
            self._computed = max(self._computed, to_come[0])
            phases += 1
            self.barriers[barrier] = phases, to_come[1:]
        return phases % 2 != parity

    def progress(self) -> bool:
        """Whether anything has been asked for since the last time somebody asked this."""
        changed, self._changed = self._changed, False
        return changed


def try_wait(m: Machine, i: Instruction) -> bool:
    """mbarrier.try_wait.parity: whether it is complete."""
    barrier, parity = _one(m, i, i.operands[1]), int(m.only(i, i.operands[2], "u32"))
    complete = m.tensor_memory.complete(barrier, parity)
    m.put(i, i.operands[0], np.full(m.shape, complete))
    return complete


def _one(m: Machine, i: Instruction, operand: Address) -> int | None:
    """An address that is the same for all who name it; None if nobody does."""
    # Triton 3.6 names a barrier by 64 bits.
    base = m.only(i, operand.base, "u64" if operand.base.startswith("%rd") else "u32")
    return None if base is None else int(base) + operand.offset


def _barrier(m: Machine, i: Instruction) -> None:
    barrier, barriers = _one(m, i, i.operands[0]), m.tensor_memory.barriers
    if barrier is None:
        return
    if "init" in i.name:
        barriers[barrier] = 0, []
    elif barriers.pop(barrier)[1]:
        raise Fault("a barrier is gone before what it waits for")


def _elect(m: Machine, i: Instruction) -> None:
    """The first thread of each warp."""
    first = np.broadcast_to(np.arange(m.shape[1]) % 32 == 0, m.shape)
    m.put(i, i.operands[0].split("|")[1], first)


def _reduce_warp(m: Machine, i: Instruction) -> None:
    """redux of floats: the largest or least of a warp."""
    values = m.get(i.operands[1], i.type).reshape(m.shape[0], -1, 32)
    if "abs" in i.name:
        values = np.abs(values)
    largest, nan = i.name[2] == "max", "NaN" in i.name
    function = (np.maximum if nan else np.fmax) if largest else (np.minimum if nan else np.fmin)
    m.put(i, i.operands[0], np.repeat(function.reduce(values, 2), 32, 1))


def _tcgen05(m: Machine, i: Instruction) -> None:
    match i.name[1]:
        case "alloc":
            _allocate(m, i)
        case "ld":
            targets, source, *distance = i.operands
            program, lane, column, _ = _places(m, i, source, distance, len(targets))
            values = m.tensor_memory.words[program, lane, column]
            for register, value in zip(targets, np.moveaxis(values, -1, 0), strict=True):
                m.put(i, register, value)
        case "st":
            target, *distance, sources = i.operands
            *where, mask = _places(m, i, target, distance, len(sources))
            values = np.stack([m.get(x, "b32") for x in sources], -1)
            where = tuple(x[mask] for x in where)
            if m.tensor_memory.reserved[where].any():
                raise Fault("what a product under way reads is written")
            m.tensor_memory.words[where] = values[mask]
        case "mma":
            _multiply(m, i)
        case "commit":
            barrier = _one(m, i, i.operands[0])
            if barrier is not None:
                m.tensor_memory.arrive_after_products(barrier)
        case "wait" | "dealloc" | "relinquish_alloc_permit":
            pass
        case _:
            raise Fault("unknown")


def _allocate(m: Machine, i: Instruction) -> None:
    at, columns = i.operands
    first = np.arange(m.shape[1]) % 32 == 0
    value = np.full(m.shape, m.tensor_memory.allocated, np.uint32)
    m.shared.store(address_of(m, at, "u32"), m.mask(i) & first, 4, [value])
    m.tensor_memory.allocated += columns
    if m.tensor_memory.allocated > COLUMNS:
        raise Fault("tensor memory is full")


def _places(m: Machine, i: Instruction, address: Address, distance: list[int], count: int):
    """Program, lane and column of each number that a thread moves, (programs, threads, count), and
    the threads that do.
    """
    at, mask = address_of(m, address, "u32").astype(int), m.mask(i)
    thread = np.arange(m.shape[1])
    lane, first = at >> 16, at & 0xFFFF
    if ((lane // 32 != thread // 32 % 4) & mask).any():
        raise Fault("tensor memory of other warps")
    if "16x32bx2" in i.name:  # the second half of a warp has other columns of the same lanes
        lane, first = lane + thread % 16, first + thread % 32 // 16 * distance[0]
    elif "32x32b" in i.name:
        lane = lane + thread % 32
    else:
        raise Fault("another shape of tensor memory")
    column = np.where(mask, first, 0)[..., None] + np.arange(count)
    if column.max() >= m.tensor_memory.allocated:
        raise Fault("tensor memory out of bounds")
    program = np.broadcast_to(np.arange(m.shape[0])[:, None, None], column.shape)
    lane = np.broadcast_to(np.where(mask, lane, 0)[..., None], column.shape)
    return program, lane, column, mask


class InTensorMemory:
    """A left operand that a product will read, as `InShared`."""

    def __init__(self, m: Machine, where: tuple[np.ndarray, ...], kind: str):
        self._memory, self._where, self._kind = m.tensor_memory, where, kind
        self._memory.reserved[where] += 1

    def read(self) -> np.ndarray:
        """(programs, rows, 16), for the last time."""
        self._memory.reserved[self._where] -= 1
        words = self._memory.words[self._where]
        return numbers_of(words, self._kind).reshape(*words.shape[:2], 16)


def _multiply(m: Machine, i: Instruction) -> None:
    target, a, b, shape, add = i.operands
    bits = m.only(i, shape, "u32")
    if bits is None:
        return
    bits = int(bits)
    kind, columns, rows = KINDS[bits >> 7 & 7], (bits >> 17 & 63) << 3, (bits >> 24 & 31) << 4
    # Sums are float32, both operands of one kind, neither negated.
    if bits >> 4 & 3 != 1 or bits >> 10 & 7 != bits >> 7 & 7 or bits >> 13 & 3:
        raise Fault("another type of tcgen05.mma")
    a_contiguous, b_contiguous = bool(bits >> 15 & 1), bool(bits >> 16 & 1)
    row = np.arange(rows)
    lanes = row if rows == LANES else row // 16 * 32 + row % 16
    at, add, words = _one(m, i, target), m.only(i, add, "pred"), m.tensor_memory.words

    def cut(address: int, width: int) -> tuple[np.ndarray, ...]:
        """The index of the words (programs, rows, width) there."""
        first = (address & 0xFFFF) + np.arange(width)
        return np.ix_(np.arange(m.shape[0]), (address >> 16) + lanes, first)

    if isinstance(a, Address):
        left = InTensorMemory(m, cut(_one(m, i, a), 8), kind)
    else:
        left = InShared(m, int(m.only(i, a, "u64")), rows, a_contiguous, kind)
    right = InShared(m, int(m.only(i, b, "u64")), columns, b_contiguous, kind)

    def product() -> None:
        where = cut(at, columns)
        start = words[where].view(np.float32) if add else np.zeros(1, np.float32)
        start = np.broadcast_to(start, (m.shape[0], rows, columns))
        sums = multiply_add(left.read(), right.read(), start, m.launch.architecture)
        words[where] = sums.view(np.uint32)

    m.tensor_memory.add(product)


HANDLERS = {"tcgen05": _tcgen05, "mbarrier": _barrier, "elect": _elect, "redux": _reduce_warp}
