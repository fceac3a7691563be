"""Which tile each kernel works on: a fixed table, so that a shape never triggers a search.

A tile is `rows` latents by `codes` codes. The output of the second product lies along the rows in
the row kernels (forward, row_gradients, nearest) and along the codes in code_sweep: there must be
one warp for 16 of them, or the warps repeat each other's exponentials. Small tiles with four warps
leave room for several programs on a multiprocessor, and one program's softmax then hides behind
another's matrix products.
"""

from typing import Literal, NamedTuple

import torch

Kernel = Literal["forward", "row_gradients", "code_sweep", "nearest"]
Operands = Literal["plain", "split scores", "split"]

CODE_MULTIPLE = 128  # codebooks are padded to a multiple of the largest tile
MAX_DIM = 256


class Tile(NamedTuple):
    """The part of the problem that one program holds at a time, and how it is compiled."""

    rows: int
    codes: int
    warps: int
    stages: int


# For padded D up to 64, 128 and 256.
_Row = tuple[Tile, Tile, Tile]
_TABLE: dict[tuple[Kernel, Operands], _Row] = {
    ("forward", "plain"): (Tile(64, 128, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    ("forward", "split scores"): (Tile(64, 128, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    ("forward", "split"): (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)),
    ("row_gradients", "plain"): (Tile(64, 128, 4, 2), Tile(64, 64, 4, 2), Tile(128, 64, 8, 2)),
    ("row_gradients", "split scores"): (
        *(Tile(64, 128, 4, 2), Tile(64, 64, 4, 2), Tile(128, 64, 8, 2)),
    ),
    ("row_gradients", "split"): (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 32, 4, 1)),
    ("code_sweep", "plain"): (Tile(128, 64, 4, 2), Tile(64, 64, 4, 2), Tile(16, 64, 4, 2)),
    ("code_sweep", "split scores"): (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(16, 64, 4, 2)),
    ("code_sweep", "split"): (Tile(64, 64, 4, 2), Tile(32, 64, 4, 2), Tile(16, 64, 4, 1)),
    ("nearest", "plain"): (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
    ("nearest", "split"): (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
}
# Before sm_90 both operands of a product pass through registers, which small tiles must spare.
# Such a device is known by its shared memory.
_HOPPER_SHARED_MEMORY = 227 * 1024
_BEFORE_HOPPER: dict[tuple[Kernel, Operands], _Row] = {
    ("nearest", "split"): (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(32, 64, 4, 2)),
}


def padded_dim(dim: int) -> int:
    """The next power of two, at least the 16 that a matrix unit needs."""
    return max(16, 1 << (dim - 1).bit_length())


def shared_memory_limit(device: torch.device) -> int:
    """Bytes of shared memory one program may use; generous where nothing is compiled."""
    if device.type != "cuda":
        return _HOPPER_SHARED_MEMORY
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def choose(kernel: Kernel, operands: Operands, dim: int, shared_memory: int) -> Tile:
    """The tile for this kernel, these operands and codes of `dim` elements."""
    row = _TABLE[kernel, operands]
    if shared_memory < _HOPPER_SHARED_MEMORY:
        row = _BEFORE_HOPPER.get((kernel, operands), row)
    return row[max(0, padded_dim(dim).bit_length() - 7)]


def every_choice() -> list[Tile]:
    """All that `choose` can answer."""
    return [tile for table in (_TABLE, _BEFORE_HOPPER) for row in table.values() for tile in row]
