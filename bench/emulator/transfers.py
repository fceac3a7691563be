"""What moves data between threads, shared memory and global memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bench.emulator.memory import POISON, Fault, SharedMemory
from bench.emulator.program import Address, Instruction
from bench.emulator.types import TYPES

if TYPE_CHECKING:
    from bench.emulator.machine import Machine


class Copies:
    """cp.async: what is read at once arrives when its group is waited for, and not before."""

    def __init__(self, shared: SharedMemory):
        self._shared = shared
        self._groups: list[list[tuple]] = [[]]  # the last is open

    def add(self, address, mask, values: list[np.ndarray]) -> None:
        self._shared.store(address, mask, 4, [np.full(mask.shape, POISON, np.uint32)] * len(values))
        self._groups[-1].append((address, mask, 4, values))

    def commit(self) -> None:
        self._groups.append([])

    def wait(self, most: int) -> None:
        """Until at most so many groups are under way."""
        while len(self._groups) > most + 1:
            for copy in self._groups.pop(0):
                self._shared.store(*copy)


def address_of(m: Machine, operand: Address, kind: str) -> np.ndarray:
    """The address (programs, threads) that this operand names."""
    return m.get(operand.base, kind) + np.array(operand.offset).astype(TYPES[kind])


def _access(m: Machine, i: Instruction, operand: Address):
    """The memory, and the arguments that say what of it is accessed, but for how often."""
    memory, kind = (m.shared, "u32") if "shared" in i.name else (m.launch.memory, "u64")
    size = min(4, TYPES[i.type].itemsize)
    return memory, (address_of(m, operand, kind), m.mask(i), size)


def _load(m: Machine, i: Instruction) -> None:
    target, source = i.operands[:2]
    if "param" in i.name:
        value = m.get(m.launch.arguments[source.base], i.type)
        return m.put(i, target, _extended(value, target))
    targets = target if isinstance(target, tuple) else (target,)
    memory, what = _access(m, i, source)
    numbers = memory.load(*what, len(targets) * TYPES[i.type].itemsize // what[-1])
    if TYPES[i.type].itemsize == 8:
        pairs = zip(numbers[::2], numbers[1::2], strict=True)
        numbers = [np.stack(pair, -1).view(np.uint64)[..., 0] for pair in pairs]
    for register, value in zip(targets, numbers, strict=True):
        m.put(i, register, _extended(value.view(TYPES[i.type]), register))


def _extended(value: np.ndarray, register: str) -> np.ndarray:
    """As wide as the register, whose name tells, with the value's sign."""
    size = {"%rd": 8, "%rs": 2}.get(register[:3], 4)
    if value.dtype.itemsize >= size:
        return value
    return value.astype(f"{value.dtype.kind if value.dtype.kind == 'i' else 'u'}{size}")


def _store(m: Machine, i: Instruction) -> None:
    target, source = i.operands[:2]
    memory, what = _access(m, i, target)
    numbers = []
    for x in source if isinstance(source, tuple) else (source,):
        size = TYPES[i.type].itemsize
        value = m.get(x, f"b{max(16, 8 * size)}").astype(f"u{size}")
        numbers += list(np.moveaxis(value[..., None].view(f"u{what[-1]}"), -1, 0))
    if memory is m.shared:
        memory.store(*what, numbers)
    else:
        memory.store(*what, numbers, m.programs)


def _add(m: Machine, i: Instruction) -> None:
    """red and atom of float32 sums in global memory, whose old value nobody reads."""
    *_, target, source = i.operands
    values = [m.get(x, "f32") for x in (source if isinstance(source, tuple) else (source,))]
    if "add" not in i.name or i.type != "f32":
        raise Fault("another atomic operation")
    address, mask = address_of(m, target, "u64"), m.mask(i)
    if len(np.unique(address[mask])) < mask.sum():
        raise Fault("threads add to one number in no order")
    before = m.launch.memory.load(address, mask, 4, len(values))
    after = [old.view(np.float32) + new for old, new in zip(before, values, strict=True)]
    m.launch.memory.store(address, mask, 4, [x.view(np.uint32) for x in after], m.programs)


def _copy(m: Machine, i: Instruction) -> None:
    if "commit_group" in i.name:
        m.copies.commit()
    elif "wait_group" in i.name:
        m.copies.wait(i.operands[0])
    else:
        target, source, size, *rest = i.operands
        mask, given = m.mask(i), m.get((*rest, size)[0], "u32")
        if not np.isin(given[mask], (0, size)).all():
            raise Fault("cp.async of part of its bytes")  # Triton never does
        address, reads = address_of(m, source, "u64"), mask & (given == size)
        values = m.launch.memory.load(address, reads, 4, size // 4)
        m.copies.add(address_of(m, target, "u32"), mask, values)


def _shuffle(m: Machine, i: Instruction) -> None:
    value, by = m.get(i.operands[1], "b32"), m.get(i.operands[2], "u32").astype(int)
    lane = np.arange(m.shape[1])
    source = {"bfly": lane ^ by, "idx": lane // 32 * 32 + by}[i.name[2]]
    m.put(i, i.operands[0], np.take_along_axis(value, source, 1))


def _matrices(m: Machine, i: Instruction, address: Address, count: int):
    """Of ldmatrix and stmatrix: for each matrix and number, the arguments of the accesses."""
    rows = address_of(m, address, "u32")
    lane, warp = np.arange(m.shape[1]) % 32, np.arange(m.shape[1]) // 32 * 32
    for matrix in range(count):
        first = warp + 8 * matrix
        if "trans" in i.name:
            for half in range(2):
                row = rows[:, first + 2 * (lane % 4) + half]
                yield matrix, half, (row + 2 * (lane // 4).astype(np.uint32), m.mask(i), 2)
        else:
            row = rows[:, first + lane // 4]
            yield matrix, 0, (row + 4 * (lane % 4).astype(np.uint32), m.mask(i), 4)


def _load_matrix(m: Machine, i: Instruction) -> None:
    """Eight by eight 16-bit numbers for each register, two of them for each thread."""
    targets, source = i.operands
    values = np.zeros((len(targets), *m.shape), np.uint32)
    for matrix, half, what in _matrices(m, i, source, len(targets)):
        (value,) = m.shared.load(*what, 1)
        values[matrix] |= value.astype(np.uint32) << np.uint32(16 * half)
    for register, value in zip(targets, values, strict=True):
        m.put(i, register, value)


def _store_matrix(m: Machine, i: Instruction) -> None:
    target, sources = i.operands
    for matrix, half, what in _matrices(m, i, target, len(sources)):
        value = m.get(sources[matrix], "b32") >> np.uint32(16 * half)
        m.shared.store(*what, [value.astype(f"u{what[-1]}")])


def _no_policy(m: Machine, i: Instruction) -> None:
    m.put(i, i.operands[0], np.zeros(m.shape, np.uint64))


HANDLERS = {
    "ld": _load,
    "st": _store,
    "red": _add,
    "atom": _add,
    "cp": _copy,
    "shfl": _shuffle,
    "ldmatrix": _load_matrix,
    "stmatrix": _store_matrix,
    "createpolicy": _no_policy,
}
