"""Which tile each kernel works on: a fixed table, so that a shape never triggers a search, unless
asked to (`tuning.py`).

A tile is `rows` latents by `codes` codes. The output of the second product lies along the rows in
the row kernels (forward, row_gradients, nearest) and along the codes in code_sweep: there must be
one warp for 16 of them, or the warps repeat each other's exponentials. Small tiles with four warps
leave room for several programs on a multiprocessor, and one program's softmax then hides behind
another's matrix products. With two stages a load starts when the one before has been used, and is
waited for at once; with three it is there in time. Where Blackwell's tiles have one stage, it is
also because triton 3.8 lets the next load overwrite a code that a product has still to read.

No tile spills, as `python -m bench compile` prints, but for a few bytes on consumers' cards, which
share A100's. Of such, those of Hopper are the fastest on an H200 with 2^19 rows and 1024 codes; the
others' have the fewest instructions, of their machine code. For Ampere's products of [rows, codes]
and [codes, columns] that means no fewer rows than columns, or several warps need the same weights.
"""

import itertools
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from softvq.kernels import tuning
from softvq.kernels.arithmetic import Arithmetic, Operands

# "all": with the gradient of entropy, usage or temperature, or a log-partition's that moves z; each
# needs registers of its own.
Kernel = Literal[
    "forward", "row_gradients", "row_gradients, all", "code_sweep", "code_sweep, all", "nearest"
]
# By what a product needs: sm_90; sm_100; and all with less shared memory than they have, from sm_80
# on, where both operands of a product pass through registers, which small tiles must spare.
Architecture = Literal["hopper", "blackwell", "ampere"]

WIDEST = 256  # the largest D of the tables
CODE_MULTIPLE = 128  # codebooks are padded to a multiple of the largest tile


class Tile(NamedTuple):
    """The part of the problem that one program holds at a time, and how it is compiled."""

    rows: int
    codes: int
    warps: int
    stages: int = 2
    parts: int = 1  # of the output's columns, each left by a launch of its own: operands.py


# For padded D up to 64, 128 and WIDEST.
Row = tuple[Tile, Tile, Tile]
Table = dict[tuple[Kernel, Operands], Row]
_HOPPER: Table = {
    ("forward", "bfloat16"): (Tile(64, 64, 4, 3), Tile(64, 128, 4, 3), Tile(64, 64, 4)),
    ("forward", "mixed"): (Tile(64, 64, 4), Tile(64, 64, 4, 3), Tile(128, 32, 8, 3)),
    ("forward", "converted"): (Tile(128, 64, 4, 3), Tile(64, 128, 4, 3), Tile(128, 64, 8, 2, 2)),
    ("forward", "high"): (Tile(64, 128, 4, 3), Tile(128, 128, 8), Tile(128, 32, 8, 3, 2)),
    ("forward", "split"): (Tile(64, 64, 4, 3), Tile(64, 64, 4), Tile(128, 64, 8, 1, 2)),
    ("row_gradients", "bfloat16"): (Tile(64, 128, 4, 3), Tile(64, 64, 4, 3), Tile(128, 32, 8, 3)),
    ("row_gradients", "mixed"): (Tile(64, 64, 4, 3), Tile(64, 64, 4), Tile(128, 32, 8, 3)),
    ("row_gradients", "converted"): (Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 32, 4, 3, 2)),
    ("row_gradients", "high"): (Tile(64, 128, 4), Tile(128, 64, 8, 3), Tile(128, 32, 8, 1, 2)),
    ("row_gradients", "split"): (Tile(64, 64, 4, 3), Tile(64, 32, 4), Tile(64, 32, 4, 2, 2)),
    ("row_gradients, all", "bfloat16"): (
        Tile(64, 64, 4, 3),
        Tile(64, 32, 4, 3),
        Tile(128, 32, 8, 3),
    ),
    ("row_gradients, all", "mixed"): (Tile(64, 64, 4, 3), Tile(64, 64, 4), Tile(128, 32, 8, 3)),
    ("row_gradients, all", "converted"): (
        Tile(64, 64, 4, 3),
        Tile(64, 64, 4, 3),
        Tile(128, 32, 8, 3, 2),
    ),
    ("row_gradients, all", "high"): (Tile(64, 64, 4, 3), Tile(64, 64, 4), Tile(64, 64, 8, 1, 2)),
    ("row_gradients, all", "split"): (Tile(64, 64, 4, 3), Tile(64, 32, 4), Tile(64, 32, 4, 1, 2)),
    ("code_sweep", "bfloat16"): (Tile(128, 64, 4, 3), Tile(64, 64, 4), Tile(32, 64, 4, 3)),
    ("code_sweep", "mixed"): (Tile(128, 64, 4), Tile(64, 64, 4), Tile(32, 128, 8, 3)),
    ("code_sweep", "converted"): (Tile(32, 128, 4, 3), Tile(32, 64, 4, 3), Tile(32, 128, 8, 3, 2)),
    ("code_sweep", "high"): (Tile(32, 128, 4, 3), Tile(32, 64, 4, 3), Tile(32, 128, 8, 2, 2)),
    ("code_sweep", "split"): (Tile(64, 128, 8), Tile(16, 128, 8), Tile(16, 128, 8, 1, 2)),
    ("code_sweep, all", "bfloat16"): (Tile(32, 128, 4, 3), Tile(64, 64, 4), Tile(16, 64, 4, 3)),
    ("code_sweep, all", "mixed"): (Tile(32, 128, 4, 3), Tile(32, 64, 4, 3), Tile(32, 128, 8, 3)),
    ("code_sweep, all", "converted"): (Tile(32, 128, 8), Tile(32, 64, 4), Tile(32, 128, 8, 3, 2)),
    ("code_sweep, all", "high"): (Tile(32, 128, 4, 3), Tile(32, 64, 4, 3), Tile(32, 128, 8, 2, 2)),
    ("code_sweep, all", "split"): (
        Tile(32, 128, 8, 3),
        Tile(16, 128, 8, 1),
        Tile(16, 128, 8, 1, 2),
    ),
    ("nearest", "converted"): (Tile(128, 128, 4, 3), Tile(64, 128, 4, 3), Tile(64, 64, 4)),
    ("nearest", "split"): (Tile(128, 128, 4), Tile(128, 128, 8), Tile(128, 64, 8, 1)),
}
_BLACKWELL: Table = {
    ("forward", "bfloat16"): (Tile(64, 128, 4), Tile(64, 128, 4), Tile(64, 64, 8)),
    ("forward", "mixed"): (Tile(64, 128, 4), Tile(64, 64, 4, 1), Tile(64, 64, 8)),
    ("forward", "converted"): (Tile(64, 128, 4), Tile(64, 64, 4, 1), Tile(64, 128, 4, 1, 2)),
    ("forward", "high"): (Tile(64, 128, 4), Tile(64, 64, 4, 1), Tile(64, 32, 4, 1, 2)),
    ("forward", "split"): (Tile(64, 64, 4, 1), Tile(64, 64, 8, 1), Tile(64, 64, 4, 1, 2)),
    ("row_gradients", "bfloat16"): (Tile(64, 128, 4), Tile(64, 64, 4), Tile(64, 64, 4)),
    ("row_gradients", "mixed"): (Tile(64, 128, 4), Tile(64, 64, 4), Tile(64, 64, 4)),
    ("row_gradients", "converted"): (Tile(64, 64, 4), Tile(64, 64, 4), Tile(64, 128, 4, 1, 2)),
    ("row_gradients", "high"): (Tile(64, 64, 4), Tile(64, 64, 4), Tile(64, 64, 8, 1, 2)),
    ("row_gradients", "split"): (Tile(64, 64, 4), Tile(64, 64, 8, 1), Tile(64, 64, 8, 1, 2)),
    ("row_gradients, all", "bfloat16"): (Tile(64, 64, 4), Tile(128, 64, 8), Tile(64, 32, 4)),
    ("row_gradients, all", "mixed"): (Tile(64, 64, 4), Tile(128, 64, 8), Tile(64, 32, 4)),
    ("row_gradients, all", "converted"): (Tile(128, 64, 8), Tile(64, 32, 4), Tile(64, 64, 4, 1, 2)),
    ("row_gradients, all", "high"): (Tile(64, 64, 4), Tile(64, 64, 8), Tile(64, 64, 8, 1, 2)),
    ("row_gradients, all", "split"): (
        Tile(64, 64, 4, 1),
        Tile(64, 32, 8, 1),
        Tile(64, 64, 8, 1, 2),
    ),
    ("code_sweep", "bfloat16"): (Tile(128, 64, 4), Tile(64, 64, 4), Tile(32, 64, 4)),
    ("code_sweep", "mixed"): (Tile(128, 64, 4), Tile(64, 64, 4), Tile(32, 64, 4)),
    ("code_sweep", "converted"): (Tile(64, 128, 8), Tile(64, 128, 8), Tile(64, 128, 8, 1, 2)),
    ("code_sweep", "high"): (Tile(64, 128, 8), Tile(32, 128, 4, 1), Tile(64, 128, 8, 1, 2)),
    ("code_sweep", "split"): (Tile(32, 128, 4, 1), Tile(32, 128, 8, 1), Tile(32, 128, 8, 1, 2)),
    ("code_sweep, all", "bfloat16"): (Tile(64, 64, 4), Tile(64, 64, 4), Tile(32, 64, 4)),
    ("code_sweep, all", "mixed"): (Tile(64, 64, 4), Tile(64, 64, 4), Tile(32, 64, 4)),
    ("code_sweep, all", "converted"): (Tile(64, 128, 8), Tile(32, 128, 4), Tile(64, 128, 8, 1, 2)),
    ("code_sweep, all", "high"): (Tile(64, 128, 8), Tile(32, 128, 4), Tile(64, 128, 8, 1, 2)),
    ("code_sweep, all", "split"): (
        Tile(32, 128, 4, 1),
        Tile(32, 128, 8, 1),
        Tile(32, 128, 8, 1, 2),
    ),
    ("nearest", "converted"): (Tile(128, 128, 8), Tile(128, 128, 8), Tile(128, 128, 8)),
    ("nearest", "split"): (Tile(128, 128, 8), Tile(128, 128, 8, 1), Tile(64, 64, 4, 1)),
}
_AMPERE: Table = {
    ("forward", "bfloat16"): (Tile(128, 64, 8), Tile(128, 64, 8), Tile(128, 32, 8, 1, 2)),
    ("forward", "mixed"): (Tile(128, 64, 8), Tile(128, 64, 8), Tile(16, 32, 2, 1, 2)),
    ("forward", "converted"): (Tile(128, 64, 8), Tile(128, 32, 8), Tile(16, 32, 2, 1, 2)),
    ("forward", "high"): (Tile(128, 64, 8), Tile(128, 32, 8), Tile(16, 32, 2, 1, 2)),
    ("forward", "split"): (Tile(128, 64, 8), Tile(16, 64, 2), Tile(16, 32, 2, 1, 2)),
    ("row_gradients", "bfloat16"): (Tile(128, 64, 8), Tile(128, 32, 8), Tile(64, 32, 4, 1, 2)),
    ("row_gradients", "mixed"): (Tile(128, 64, 8), Tile(128, 32, 8), Tile(16, 32, 2, 1, 2)),
    ("row_gradients", "converted"): (Tile(128, 64, 8), Tile(128, 32, 8), Tile(16, 32, 2, 1, 2)),
    ("row_gradients", "high"): (Tile(128, 64, 8), Tile(32, 32, 2), Tile(16, 32, 2, 1, 2)),
    ("row_gradients", "split"): (Tile(128, 32, 8), Tile(16, 32, 2), Tile(16, 32, 4, 1, 2)),
    ("row_gradients, all", "bfloat16"): (Tile(128, 64, 8), Tile(128, 32, 8), Tile(64, 32, 4, 1, 2)),
    ("row_gradients, all", "mixed"): (Tile(128, 64, 8), Tile(128, 32, 8), Tile(16, 32, 2, 1, 2)),
    ("row_gradients, all", "converted"): (
        Tile(128, 32, 8),
        Tile(128, 32, 8),
        Tile(16, 32, 2, 1, 2),
    ),
    ("row_gradients, all", "high"): (Tile(128, 64, 8), Tile(16, 32, 2), Tile(16, 32, 2, 1, 2)),
    ("row_gradients, all", "split"): (Tile(64, 16, 4), Tile(16, 32, 2), Tile(16, 32, 4, 1, 2)),
    ("code_sweep", "bfloat16"): (Tile(64, 128, 8), Tile(32, 128, 8), Tile(16, 128, 8, 1, 2)),
    ("code_sweep", "mixed"): (Tile(64, 128, 8), Tile(32, 128, 8), Tile(32, 32, 4, 1, 2)),
    ("code_sweep", "converted"): (Tile(32, 128, 8), Tile(32, 128, 8), Tile(32, 32, 4, 1, 2)),
    ("code_sweep", "high"): (Tile(32, 128, 8), Tile(16, 128, 8), Tile(16, 16, 2, 1, 2)),
    ("code_sweep", "split"): (Tile(16, 128, 8), Tile(16, 128, 8), Tile(16, 16, 4, 1, 2)),
    ("code_sweep, all", "bfloat16"): (Tile(64, 128, 8), Tile(32, 128, 8), Tile(16, 128, 8, 1, 2)),
    ("code_sweep, all", "mixed"): (Tile(32, 128, 8), Tile(32, 128, 8), Tile(32, 32, 4, 1, 2)),
    ("code_sweep, all", "converted"): (Tile(32, 128, 8), Tile(32, 128, 8), Tile(32, 32, 4, 1, 2)),
    ("code_sweep, all", "high"): (Tile(32, 128, 8), Tile(16, 128, 8), Tile(16, 16, 2, 1, 2)),
    ("code_sweep, all", "split"): (Tile(16, 128, 8), Tile(16, 64, 4, 1, 2), Tile(16, 16, 4, 1, 2)),
    ("nearest", "converted"): (Tile(128, 64, 8), Tile(128, 64, 8), Tile(64, 64, 4)),
    ("nearest", "split"): (Tile(128, 64, 8), Tile(128, 32, 8), Tile(32, 64, 4, 1)),
}
_TABLES: dict[Architecture, Table] = {
    "hopper": _HOPPER,
    "blackwell": _BLACKWELL,
    "ampere": _AMPERE,
}
_HOPPER_SHARED_MEMORY = 227 * 1024  # the consumer's cards, also the latest, have 99 KB


def padded_dim(dim: int) -> int:
    """The next power of two, at least the 16 that a matrix unit needs."""
    return max(16, 1 << (dim - 1).bit_length())


def architecture(device: torch.device) -> Architecture:
    """Whose tiles suit this device; anyone's where nothing is compiled."""
    if device.type != "cuda":
        return "hopper"
    if shared_memory(device) < _HOPPER_SHARED_MEMORY:
        return "ampere"
    return "hopper" if torch.cuda.get_device_properties(device).major == 9 else "blackwell"


def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have on a CUDA device."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def shipped(kernel: Kernel, operands: Operands, dim: int, architecture: Architecture) -> Tile:
    """The table's tile for this kernel, these operands and codes of `dim` elements."""
    return _TABLES[architecture][kernel, operands][max(0, padded_dim(dim).bit_length() - 7)]


def choose(
    kernel: Kernel, how: Arithmetic, z: Tensor, codes: int, run: tuning.Run, *variant: object
) -> Tile:
    """The tile for a call: the shipped one or, where tuning is on, the fastest of its neighbours.

    z is (H, N, D), `codes` the padded K, `run` launches the kernel with a tile, and `variant` is
    what else decides which parts of the kernel are compiled.
    """
    heads, rows, dim = z.shape
    tile = shipped(kernel, how.operands, dim, architecture(z.device))
    if not rows or not tuning.applies(z.device):
        return tile
    # Coarsely by size: few rows, enough for some multiprocessors of a card, enough for all.
    least = max(bound for bound in (0, 1024, 16384) if heads * rows >= bound)
    size = (f"D={dim}", f"K<={1 << (codes - 1).bit_length()}", f"N>={least}")
    key = " ".join(map(str, (kernel, *size, z.dtype, *how, *variant)))
    candidates = neighbours(kernel, how.operands, dim, tile, shared_memory(z.device))
    return tuning.fastest(z.device, key, candidates, run)


def neighbours(
    kernel: Kernel, operands: Operands, dim: int, tile: Tile, shared_memory: int
) -> list[Tile]:
    """A tile, and those of half or twice its rows, codes and warps that fit into shared memory, of
    half to twice its size.

    Of the axis the output lies along, a warp has 16 or 32: see above, and more would spill.
    """
    size = tile.rows * tile.codes
    indexes = kernel in ("forward", "nearest")  # by quads of eight lanes
    candidates = [tile]
    for shape in itertools.product(*((x // 2, x, x * 2) for x in tile[:3])):
        candidate = Tile(*shape, *tile[3:])
        along = candidate.codes if kernel.startswith("code_sweep") else candidate.rows
        if (
            candidate != tile
            and size <= 2 * candidate.rows * candidate.codes <= 4 * size
            and candidate.rows >= 16
            and (32 if indexes else 16) <= candidate.codes <= CODE_MULTIPLE
            and 16 * candidate.warps <= along <= 32 * candidate.warps
            and shared_bytes(kernel, operands, dim, candidate) <= shared_memory
        ):
            candidates.append(candidate)
    return candidates


def shared_bytes(kernel: Kernel, operands: Operands, dim: int, tile: Tile) -> int:
    """What the operands of the products take; the compiler may need more, and then refuses."""
    latents = 4 if operands in ("high", "split") else 2  # bytes of an element of z,
    gradient = 4 if operands == "split" else 2  # and of the gradient of q
    row = latents if kernel in ("forward", "nearest") else latents + gradient
    if kernel.startswith("code_sweep") and tile.parts > 1 and tile.stages == 1:
        # Once it has the scores, it needs only its own part of z, and as the gradient is.
        row = max(latents, gradient + gradient // tile.parts)
    rows = tile.rows * row
    codes = tile.codes * (2 if operands in ("bfloat16", "converted") else 4)
    kept, streamed = (codes, rows) if kernel.startswith("code_sweep") else (rows, codes)
    return padded_dim(dim) * (kept + tile.stages * streamed)


def resident(kernel: Kernel, operands: Operands, dim: int, tile: Tile) -> int:
    """How many programs, of two, a multiprocessor holds at a time: eight warps fill one."""
    fit = 2 * shared_bytes(kernel, operands, dim, tile) <= _HOPPER_SHARED_MEMORY
    return 2 if fit and tile.warps <= 4 else 1


def constants(tile: Tile, part: int, how: Arithmetic, z: Tensor) -> dict[str, object]:
    """What the soft kernels are compiled for, as arguments of the launch that leaves this part."""
    rows, dim = z.shape[1:]
    return {
        "SPLIT_LATENTS": how.split_latents,
        "SPLIT_ALL": how.split_all,
        "WHOLE_TILES": rows >= tile.rows,
        "DIM": dim,
        "PAD": padded_dim(dim),
        "PART": part,
        "PARTS": tile.parts,
        "ROWS": tile.rows,
        "CODES": tile.codes,
        "STAGES": tile.stages,
        "num_warps": tile.warps,
        "enable_fp_fusion": True,
    }
