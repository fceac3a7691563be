"""The threads of several programs of one launch, run together, instruction by instruction.

A register is an array (programs, threads). Threads may part ways: of those that are not waiting,
the ones furthest behind come next.
"""

from typing import NamedTuple

import numpy as np

from bench.emulator import arithmetic, matrix_unit, tensor_memory, transfers
from bench.emulator.memory import POISON, Fault, GlobalMemory, SharedMemory
from bench.emulator.program import Instruction, Operand, Program
from bench.emulator.types import TYPES

HANDLERS = {
    **arithmetic.HANDLERS,
    **transfers.HANDLERS,
    **matrix_unit.HANDLERS,
    **tensor_memory.HANDLERS,
}


class Launch(NamedTuple):
    program: Program
    arguments: dict[str, int]  # parameter → value
    grid: tuple[int, int, int]
    memory: GlobalMemory
    shared_bytes: int
    architecture: int


class PartedWays(Exception):
    """Programs that a matrix unit serves together do not stay together: run this one (programs)
    mask and the rest apart."""


def run(launch: Launch, programs: np.ndarray) -> None:
    """Run these programs, by their numbers in the grid."""
    before = launch.memory.snapshot()
    try:
        with np.errstate(all="ignore"):
            Machine(launch, programs).run()
    except PartedWays as error:
        (these,) = error.args
        launch.memory.restore(before)  # or what they have added would be added twice
        run(launch, programs[these])
        run(launch, programs[~these])


class Machine:
    """The state of these programs."""

    def __init__(self, launch: Launch, programs: np.ndarray):
        threads, (x, y, _) = launch.program.threads, launch.grid
        self.launch, self.programs, self.shape = launch, programs, (len(programs), threads)
        self.shared = SharedMemory(len(programs), launch.shared_bytes, threads)
        self.copies = transfers.Copies(self.shared)
        self.products = matrix_unit.Products()
        self.tensor_memory = tensor_memory.TensorMemory(len(programs))
        thread = np.arange(threads)
        special = {
            "%tid.x": thread,
            "%ctaid.x": (programs % x)[:, None],
            "%ctaid.y": (programs // x % y)[:, None],
            "%ctaid.z": (programs // (x * y))[:, None],
            **{f"%nctaid.{axis}": size for axis, size in zip("xyz", launch.grid, strict=True)},
            "global_smem": 0,
        }
        self._registers = {
            name: np.broadcast_to(np.asarray(value, np.uint32), self.shape)
            for name, value in special.items()
        }
        instructions = launch.program.instructions
        self._together = any(i.name[0] in ("wgmma", "tcgen05") for i in instructions)
        self._active = np.ones(self.shape, bool)

    def run(self) -> None:
        """Until all threads have returned."""
        program = self.launch.program
        end = len(program.instructions)
        # (programs, threads): number of the next instruction, at a barrier, waiting for a product.
        position = np.zeros(self.shape, int)
        at_barrier, waiting = np.zeros(self.shape, bool), np.zeros(self.shape, bool)
        while (position < end).any():
            ready = (position < end) & ~at_barrier & ~waiting
            if not ready.any():
                # Something happens only when somebody waits for it.
                if not waiting.any() or not self.tensor_memory.progress():
                    raise Fault("all threads wait for ever")
                waiting[:] = False
                continue
            here = position[ready].min()
            self._active = ready & (position == here)
            instruction = program.instructions[here]
            position[self._active] += 1
            mask = self.mask(instruction)
            try:
                match instruction.name[0]:
                    case "bra":
                        if self._together and (mask != mask[0]).any():
                            raise PartedWays((mask == mask[0]).all(1))
                        position[mask] = program.labels[instruction.operands[0]]
                    case "ret":
                        position[mask] = end
                    case "trap":  # all that is left of a kernel the compiler could not compile
                        raise Fault("trap")
                    case "bar" | "barrier":
                        at_barrier |= mask
                        met = (at_barrier | (position == end)).all(1)
                        at_barrier[met] = False
                        self.shared.barrier(met)
                    case "mbarrier" if "try_wait" in instruction.name:
                        if not tensor_memory.try_wait(self, instruction):
                            waiting |= mask
                            position[mask] = here
                    case name:
                        HANDLERS[name](self, instruction)
            except PartedWays:
                raise
            except Exception as error:
                error.add_note(instruction.text)
                raise

    def mask(self, instruction: Instruction) -> np.ndarray:
        """The threads that do it."""
        if instruction.guard is None:
            return self._active
        guard = self._registers[instruction.guard]
        return self._active & (~guard if instruction.negated else guard)

    def get(self, operand: Operand, kind: str) -> np.ndarray:
        """An operand as this type of PTX, (programs, threads)."""
        dtype = TYPES[kind]
        if isinstance(operand, int):
            bits = operand & (1 << 8 * dtype.itemsize) - 1
            value = np.frombuffer(bits.to_bytes(dtype.itemsize, "little"), dtype)[0]
            return np.full(self.shape, operand != 0 if kind == "pred" else value)
        value = self._registers.get(operand)
        if value is None:  # what is never set is never used, but moved about
            return np.full(self.shape, _poison(dtype))
        if (value.dtype == bool) != (kind == "pred") or value.dtype.itemsize != dtype.itemsize:
            raise Fault(f"{operand} read as {kind}")
        return value if value.dtype == dtype else np.ascontiguousarray(value).view(dtype)

    def put(self, instruction: Instruction, register: str, value: np.ndarray) -> None:
        """Set a register of the threads that do it; the first value decides its width."""
        if value.dtype != bool:
            value = np.ascontiguousarray(value).view(f"u{value.dtype.itemsize}")
        mask = self.mask(instruction)
        if not mask.all():
            value = np.where(mask, value, self._registers.get(register, _poison(value.dtype)))
        self._registers[register] = value

    def only(self, instruction: Instruction, operand: Operand, kind: str):
        """An operand that is the same wherever it counts; None if no thread does this."""
        mask = self.mask(instruction)
        values = np.unique(self.get(operand, kind)[mask])
        if len(values) > 1 or (mask.any(1) != mask.any()).any():
            raise Fault(f"{operand} differs between threads")
        return values[0] if len(values) else None


def _poison(dtype: np.dtype) -> np.generic:
    return np.array([POISON, POISON], np.uint32).view(dtype)[0]
