"""Launches of Triton kernels, compiled for a GPU and run on a CPU."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import torch
from triton.runtime.jit import JITFunction

from bench.emulator.machine import Launch, run
from bench.emulator.memory import Fault, GlobalMemory
from bench.emulator.program import Program, parse
from bench.launches import FAMILY, described
from bench.launches import Launch as Compilation
from bench.machine_code import SHARED_LIMIT
from softvq.kernels import support, tiles

TOGETHER = 64  # programs


@contextmanager
def emulated(architecture: int) -> Iterator[None]:
    """Inside, the backend "triton" takes CPU tensors, and runs as on this architecture."""

    def launch(kernel, *args, grid, warmup, **kwargs):
        _run(kernel, args, kwargs, (*grid, 1, 1)[:3], architecture)

    family = FAMILY[architecture]
    with (
        patch.object(JITFunction, "run", launch),
        patch.object(support, "obstacle", lambda z: None),
        patch.object(tiles, "architecture", lambda device: family),
    ):
        yield


def _run(kernel: JITFunction, args: tuple, kwargs: dict, grid, architecture: int) -> None:
    launch = described(kernel, args, kwargs)
    program, shared_bytes = _compiled(launch, architecture)
    if shared_bytes > SHARED_LIMIT[FAMILY[architecture]]:
        raise Fault(f"{kernel.__name__} needs more shared memory than there is")
    given = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    values = [given[name] for name, kind in launch.signature.items() if kind != "constexpr"]
    memory = GlobalMemory(x for x in values if isinstance(x, torch.Tensor))
    values = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in values]
    values += [0] * (len(program.parameters) - len(values))  # Triton's own scratch memory
    arguments = dict(zip(program.parameters, values, strict=True))
    machines = Launch(program, arguments, grid, memory, shared_bytes, architecture)
    programs = np.arange(math.prod(grid))
    for some in np.split(programs, range(TOGETHER, len(programs), TOGETHER)):
        run(machines, some)


_programs: dict[tuple[str, int], tuple[Program, int]] = {}


def _compiled(launch: Compilation, architecture: int) -> tuple[Program, int]:
    """The program, and the bytes of shared memory it takes; compiled once."""
    key = (launch.key(), architecture)
    if key not in _programs:
        kernel = launch.compile(architecture)
        _programs[key] = parse(kernel.asm["ptx"]), kernel.metadata.shared
    return _programs[key]
