"""What the wrappers in `softvq.kernels` would launch: every kernel with its types and constants.

A launch is recorded instead of run, so that no GPU is needed and no signature is written twice:
the table of `bench compile` describes exactly what a user of that shape would run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, compile
from triton.runtime.jit import JITFunction

from softvq.kernels import tiles

# Whose tiles an architecture uses.
FAMILY: dict[int, tiles.Architecture] = {
    80: "ampere",
    86: "ampere",
    89: "ampere",
    90: "hopper",
    100: "blackwell",
    120: "ampere",
}
OPTIONS = ("num_warps", "enable_fp_fusion")
TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


class Launch(NamedTuple):
    """One kernel as triton.compile wants it."""

    kernel: JITFunction
    signature: dict[str, str]  # argument → type
    constants: dict[str, object]
    divisible: tuple[int, ...]  # positions of the arguments that are multiples of 16
    options: dict[str, int]

    def key(self) -> str:
        """Equal for launches that compile to the same machine code."""
        return repr((self.kernel.__name__, *self[1:]))

    def compile(self, architecture: int) -> CompiledKernel:
        attributes = {(position,): [["tt.divisibility", 16]] for position in self.divisible}
        source = ASTSource(self.kernel, self.signature, self.constants, attributes)
        return compile(source, GPUTarget("cuda", architecture, 32), self.options)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside, launches are appended to the list and nothing runs: outputs keep what they held."""
    launches: list[Launch] = []
    run = JITFunction.run

    def record(kernel, *args, grid, warmup, **kwargs):
        launches.append(described(kernel, args, kwargs))

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


def described(kernel: JITFunction, args: tuple, kwargs: dict) -> Launch:
    """What Triton would compile for a call of `kernel` with these arguments and options."""
    options = {name: kwargs[name] for name in OPTIONS if name in kwargs}
    given = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    signature, constants, divisible = {}, {}, []
    for parameter in kernel.params:
        value = given.get(parameter.name, parameter.default)
        # Triton compiles a 1 and a None in, like the constants that the kernel declares.
        one = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or one:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:  # as everything that PyTorch allocates
                divisible.append(parameter.num)
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                divisible.append(parameter.num)
    return Launch(kernel, signature, constants, tuple(divisible), options)
