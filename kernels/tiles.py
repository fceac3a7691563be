"""Which tile each kernel works on: a fixed table, so that a shape never triggers a search.

A tile is `rows` latents by `codes` codes. The output of the second product lies along the rows in
the row kernels (forward, row_gradients, nearest) and along the codes in code_sweep: there must be
one warp for 16 of them, or the warps repeat each other's exponentials. Small tiles with four warps
leave room for several programs on a multiprocessor, and one program's softmax then hides behind
another's matrix products. Every row of the table was chosen by its machine code, as
`python -m bench compile` prints it: no spill first, then the fewest instructions.
"""

from typing import Literal, NamedTuple

import torch

# "all": with the gradients of entropy, usage or temperature, which need registers of their own.
Kernel = Literal[
    "forward", "row_gradients", "row_gradients, all", "code_sweep", "code_sweep, all", "nearest"
]
# bfloat16 latents as they are; anything else that is rounded once; two parts in every product.
Operands = Literal["bfloat16", "converted", "split"]

CODE_MULTIPLE = 128  # codebooks are padded to a multiple of the largest tile


class Tile(NamedTuple):
    """The part of the problem that one program holds at a time, and how it is compiled."""

    rows: int
    codes: int
    warps: int
    stages: int = 2


# For padded D up to 64, 128 and, where the kernel goes that far, 256.
Row = tuple[Tile, ...]
_TABLE: dict[tuple[Kernel, Operands], Row] = {
    ("forward", "bfloat16"): (Tile(64, 128, 4), Tile(64, 128, 4), Tile(64, 64, 4)),
    ("forward", "converted"): (Tile(64, 128, 4), Tile(64, 128, 4), Tile(64, 64, 4, 1)),
    ("forward", "split"): (Tile(64, 64, 4), Tile(64, 32, 4, 1), Tile(64, 32, 4, 1)),
    ("row_gradients", "bfloat16"): (Tile(64, 128, 4), Tile(64, 64, 4), Tile(64, 64, 4)),
    ("row_gradients", "converted"): (Tile(64, 64, 4), Tile(64, 64, 4), Tile(64, 32, 4, 1)),
    ("row_gradients", "split"): (Tile(64, 64, 4), Tile(64, 64, 4), Tile(64, 32, 4, 1)),
    ("row_gradients, all", "bfloat16"): (Tile(64, 64, 4), Tile(128, 64, 8), Tile(64, 32, 4)),
    ("row_gradients, all", "converted"): (Tile(64, 64, 4), Tile(64, 32, 4), Tile(64, 32, 4, 1)),
    ("row_gradients, all", "split"): (Tile(64, 64, 4), Tile(64, 32, 4), Tile(64, 32, 4, 1)),
    ("code_sweep", "bfloat16"): (Tile(128, 64, 4), Tile(64, 64, 4), Tile(32, 64, 4)),
    ("code_sweep", "converted"): (Tile(64, 128, 8), Tile(64, 128, 8), Tile(32, 64, 4)),
    ("code_sweep", "split"): (Tile(64, 128, 8), Tile(32, 128, 8, 1), Tile(16, 64, 4, 1)),
    ("code_sweep, all", "bfloat16"): (Tile(64, 64, 4), Tile(64, 64, 4), Tile(32, 64, 4)),
    ("code_sweep, all", "converted"): (Tile(64, 128, 8), Tile(32, 128, 8), Tile(16, 64, 4, 1)),
    ("code_sweep, all", "split"): (Tile(32, 128, 8), Tile(32, 128, 8, 1), Tile(16, 64, 4, 1)),
    ("nearest", "converted"): (Tile(128, 128, 8), Tile(128, 128, 8), Tile(128, 128, 8)),
    ("nearest", "split"): (Tile(128, 128, 8), Tile(128, 128, 8), Tile(64, 64, 4)),
}
# Before sm_90 both operands of a product pass through registers, which small tiles must spare and
# which codes of more than 128 elements do not leave; so too on the consumer's cards after it. All
# of these are known by their shared memory, of which the smallest have 99 KB.
_HOPPER_SHARED_MEMORY = 227 * 1024
_SMALL: dict[tuple[Kernel, Operands], Row] = {
    ("forward", "bfloat16"): (Tile(128, 64, 8), Tile(128, 64, 8)),
    ("forward", "converted"): (Tile(128, 64, 8), Tile(128, 32, 8)),
    ("forward", "split"): (Tile(128, 64, 8), Tile(128, 32, 8)),
    ("row_gradients", "bfloat16"): (Tile(128, 64, 8), Tile(128, 32, 8)),
    ("row_gradients", "converted"): (Tile(128, 64, 8), Tile(128, 32, 8)),
    ("row_gradients", "split"): (Tile(128, 32, 8), Tile(64, 32, 4, 1)),
    ("row_gradients, all", "bfloat16"): (Tile(128, 64, 8), Tile(128, 32, 8)),
    ("row_gradients, all", "converted"): (Tile(128, 64, 8), Tile(128, 32, 8)),
    ("row_gradients, all", "split"): (Tile(128, 32, 8), Tile(64, 32, 4, 1)),
    ("code_sweep", "bfloat16"): (Tile(64, 128, 8), Tile(32, 128, 8)),
    ("code_sweep", "converted"): (Tile(32, 128, 8), Tile(32, 128, 8)),
    ("code_sweep", "split"): (Tile(32, 128, 8), Tile(32, 128, 8, 1)),
    ("code_sweep, all", "bfloat16"): (Tile(64, 128, 8), Tile(32, 128, 8)),
    ("code_sweep, all", "converted"): (Tile(32, 128, 8), Tile(32, 128, 8)),
    ("code_sweep, all", "split"): (Tile(32, 128, 8), Tile(32, 128, 8, 1)),
    ("nearest", "converted"): (Tile(128, 64, 8), Tile(128, 64, 8), Tile(64, 64, 4)),
    ("nearest", "split"): (Tile(128, 64, 8), Tile(128, 32, 8), Tile(32, 64, 4, 1)),
}


def padded_dim(dim: int) -> int:
    """The next power of two, at least the 16 that a matrix unit needs."""
    return max(16, 1 << (dim - 1).bit_length())


def shared_memory_limit(device: torch.device) -> int:
    """Bytes of shared memory one program may use; generous where nothing is compiled."""
    if device.type != "cuda":
        return _HOPPER_SHARED_MEMORY
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def widest(shared_memory: int) -> int:
    """The largest D that the soft kernels take on such a device."""
    return 256 if shared_memory >= _HOPPER_SHARED_MEMORY else 128


def choose(kernel: Kernel, operands: Operands, dim: int, shared_memory: int) -> Tile:
    """The tile for this kernel, these operands and codes of `dim` elements."""
    table = _TABLE if shared_memory >= _HOPPER_SHARED_MEMORY else _SMALL
    return table[kernel, operands][max(0, padded_dim(dim).bit_length() - 7)]


def every_choice() -> set[Tile]:
    """All that `choose` can answer."""
    return {tile for table in (_TABLE, _SMALL) for row in table.values() for tile in row}
