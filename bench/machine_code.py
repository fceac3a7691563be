"""What a compiled kernel is made of, read from its machine code: no GPU needed.

Instructions per (row, code) pair. The inner loop is the innermost loop of the machine code that
holds tensor-core instructions. Every instruction in it counts once, whatever its price, predicated
or not: an iteration issues each of them once per warp. A warp's instruction serves 32 threads, and
an iteration handles rows × codes pairs of the tile, so that

    instructions per pair = instructions in the loop · warps · 32 / (rows · codes)

counts thread instructions. A multiprocessor issues 128 of them per clock, hence 1 instruction per
pair is 1 clock per 128 pairs.
"""

import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import networkx
from triton import knobs
from triton.compiler import CompiledKernel

TENSOR_CORE = re.compile(r"\b(UTC\w*MMA|HGMMA|HMMA|IGMMA|QGMMA|DMMA)\b")
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
BRANCH = re.compile(r"\bBRA\S*\s.*?(0x[0-9a-f]+)")
LEAVES = re.compile(r"BRA\S*\s+0x|EXIT|RET")  # without a condition
SPILL = re.compile(r"\b(STL|LDL)(?:\.LU)?(?:\.(64|128))?\b")
# Bytes per block, by whose tiles: A100 has 163 KB, but shares them with consumers' cards.
SHARED_LIMIT = {"ampere": 99 * 1024, "hopper": 227 * 1024, "blackwell": 227 * 1024}
TENSOR_MEMORY_LIMIT = 512  # columns; a kernel that wants more is compiled to an empty trap


class MachineCode(NamedTuple):
    """The essentials of one kernel on one architecture."""

    registers: int
    spills: int  # bytes stored to local memory, counted once per instruction
    loop_spills: int  # bytes stored to or loaded from it in the inner loop
    shared: int  # bytes per block
    tensor_memory: int  # columns, 0 before sm_100
    tensor_core: str  # the instruction found, "" if none
    instructions: int  # in the whole kernel
    loop_instructions: int  # in the inner loop, 0 if it holds no tensor-core instruction
    serialized: bool  # each wgmma waits for the one before: ptxas could not keep them in flight

    def per_pair(self, pairs: int, warps: int) -> float:
        """Instructions per (row, code) pair of a loop that handles `pairs` in an iteration."""
        return self.loop_instructions * warps * 32 / pairs


def inspect(kernel: CompiledKernel) -> MachineCode:
    """Disassemble a compiled kernel and count."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        code = _cuobjdump("-sass", file.name)
        resources = _cuobjdump("--dump-resource-usage", file.name)
    instructions = [(int(a, 16), text) for a, text in INSTRUCTION.findall(code)]
    found = TENSOR_CORE.search(code)
    loop = inner_loop(instructions)
    products = sum("HGMMA" in text for text in loop)
    waits = sum("WARPGROUP.DEPBAR" in text for text in loop)
    return MachineCode(
        registers=int(re.search(r"REG:(\d+)", resources)[1]),
        spills=_spilled((text for _, text in instructions), "STL"),
        loop_spills=_spilled(loop, "STL", "LDL"),
        shared=kernel.metadata.shared,
        tensor_memory=kernel.metadata.tmem_size or 0,
        tensor_core=found[1] if found else "",
        instructions=len(instructions),
        loop_instructions=len(loop),
        serialized=2 * waits > products,
    )


def _spilled(instructions: Iterable[str], *kinds: str) -> int:
    found = (SPILL.search(text) for text in instructions)
    return sum(int(spill[2] or 32) // 8 for spill in found if spill and spill[1] in kinds)


def inner_loop(instructions: list[tuple[int, str]]) -> list[str]:
    """Instructions of the smallest loop around a tensor-core instruction; [] if there is none."""
    texts = dict(instructions)
    flow = networkx.DiGraph()
    for (address, text), (following, _) in itertools.pairwise(instructions):
        if branch := BRANCH.search(text):
            flow.add_edge(address, int(branch[1], 16))
        if not LEAVES.match(text):
            flow.add_edge(address, following)
    loops = (sorted(loop) for loop in _loops(flow, set(flow)))
    bodies = ([texts[address] for address in loop] for loop in loops)
    return min((body for body in bodies if any(map(TENSOR_CORE.search, body))), key=len, default=[])


def _loops(flow: networkx.DiGraph, among: set[int]) -> Iterator[set[int]]:
    """Loops, outer before inner: what comes back to itself, then that without where it is entered.

    Not all that lies between a branch and where it leads back to: what waits in vain for a barrier
    of sm_100 is put behind the end, and leads back into the middle.
    """
    for loop in networkx.strongly_connected_components(flow.subgraph(among)):
        if len(loop) > 1:
            yield loop
            entered = {x for x in loop if not loop.issuperset(flow.predecessors(x))}
            yield from _loops(flow, loop - (entered or {min(loop)}))  # {}: where all begins


def _cuobjdump(*arguments: str) -> str:
    command = [knobs.nvidia.cuobjdump.path, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
