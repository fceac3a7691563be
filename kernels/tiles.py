"""Which tile each kernel works on: a fixed table, so that a shape never triggers a search.

A tile is `rows` latents by `codes` codes. The output of the second product lies along the rows in
the row kernels (forward, row_gradients) and along the codes in the code kernels (code_sweep,
nearest is a row kernel): there must be one warp for 16 of them, or the warps repeat each other's
exponentials. Small tiles with four warps leave room for several programs on a multiprocessor, and
one program's softmax then hides behind another's matrix products.
"""

from typing import Literal, NamedTuple

import torch

Kernel = Literal["forward", "row_gradients", "code_sweep", "nearest"]

CODE_MULTIPLE = 128  # codebooks are padded to a multiple of the largest tile
MAX_DIM = 256


class Tile(NamedTuple):
    """The part of the problem that one program holds at a time, and how it is compiled."""

    rows: int
    codes: int
    warps: int
    stages: int


# By the bytes of an operand (2: 16-bit parts, 4: float32 in three tf32 products), then by padded D.
_TABLE: dict[str, dict[int, dict[int, Tile]]] = {
    "forward": {
        2: {64: Tile(64, 128, 4, 2), 128: Tile(64, 64, 4, 2), 256: Tile(64, 64, 4, 2)},
        4: {64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 4, 2), 256: Tile(64, 16, 4, 1)},
    },
    "row_gradients": {
        2: {64: Tile(64, 128, 4, 2), 128: Tile(64, 64, 4, 2), 256: Tile(128, 64, 8, 2)},
        4: {64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 4, 1), 256: Tile(64, 16, 4, 1)},
    },
    "code_sweep": {
        2: {64: Tile(128, 128, 8, 2), 128: Tile(64, 64, 4, 2), 256: Tile(16, 64, 4, 2)},
        4: {64: Tile(32, 64, 4, 2), 128: Tile(16, 64, 4, 1), 256: Tile(16, 64, 4, 1)},
    },
    # Operands are float16; 4 bytes stand for a high and a low part.
    "nearest": {
        2: {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(128, 64, 8, 2)},
        4: {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(64, 64, 4, 2)},
    },
}
# Before sm_90 both operands of a product pass through registers, which small tiles must spare.
# Such a device is known by its shared memory.
_HOPPER_SHARED_MEMORY = 227 * 1024
_BEFORE_HOPPER: dict[tuple[str, int, int], Tile] = {
    ("nearest", 4, 128): Tile(128, 32, 8, 2),
    ("nearest", 4, 256): Tile(32, 64, 4, 2),
}


def padded_dim(dim: int) -> int:
    """The next power of two, at least the 16 that a matrix unit needs."""
    return max(16, 1 << (dim - 1).bit_length())


def shared_memory_limit(device: torch.device) -> int:
    """Bytes of shared memory one program may use; generous where nothing is compiled."""
    if device.type != "cuda":
        return 227 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def choose(kernel: Kernel, operand: torch.dtype, dim: int, parts: int, shared_memory: int) -> Tile:
    """The tile for operands of this dtype and codes of `parts` (1, or 2 with a low part)."""
    pad = padded_dim(dim)
    tile = _TABLE[kernel][operand.itemsize][max(64, pad)]
    if shared_memory < _HOPPER_SHARED_MEMORY:
        tile = _BEFORE_HOPPER.get((kernel, operand.itemsize, pad), tile)
    along = "rows" if kernel == "code_sweep" else "codes"  # the dimension of the loop
    while _shared_memory(kernel, tile, operand.itemsize * pad, parts) > shared_memory:
        if tile.stages > 1:
            tile = tile._replace(stages=tile.stages - 1)
        elif getattr(tile, along) > 16:
            tile = tile._replace(**{along: getattr(tile, along) // 2})
        else:
            break
    return tile


def _shared_memory(kernel: Kernel, tile: Tile, row_bytes: int, parts: int) -> int:
    """Bytes the operands take when all of them lie in shared memory."""
    if kernel == "code_sweep":  # z and its gradient stream past resident codes
        return row_bytes * (2 * tile.stages * tile.rows + parts * tile.codes)
    resident = tile.rows * (2 if kernel == "row_gradients" else 1)
    return row_bytes * (parts * tile.stages * tile.codes + resident)


def every_choice(shared_memory: int) -> list[tuple[Kernel, torch.dtype, int, int, Tile]]:
    """All that `choose` can answer: (kernel, operand dtype, padded D, parts, tile)."""
    return [
        (kernel, operand, dim, parts, choose(kernel, operand, dim, parts, shared_memory))
        for kernel in _TABLE
        for operand in (torch.float16, torch.bfloat16, torch.float32)
        for dim in (16, 32, 64, 128, 256)
        for parts in ((1,) if operand == torch.float32 else (1, 2))
    ]
