"""A card that is none, for the tests of autotuning."""

from types import SimpleNamespace

import torch

from softvq.kernels import tiles, tuning
from softvq.kernels.arithmetic import arithmetic

SHARED_MEMORY = 227 * 1024  # of a card like the H200
# For the call that `choose` below makes by default.
SHIPPED = tiles.shipped("forward", "bfloat16", 64, "hopper")
OTHER = SHIPPED._replace(rows=2 * SHIPPED.rows, warps=2 * SHIPPED.warps)
HOW = arithmetic(torch.bfloat16, torch.bfloat16, "highest")


class Card(SimpleNamespace):
    """A CUDA device that is none: how long each tile takes, and which have been timed."""

    times: dict[tiles.Tile, float]  # 1.0 if missing
    timed: list[tiles.Tile]
    wrong: list[tiles.Tile]
    capturing: bool

    def milliseconds(self, run, tile: tiles.Tile) -> float:
        self.timed.append(tile)
        return self.times.get(tile, 1.0)

    def agree(self, run, tile: tiles.Tile, shipped: tiles.Tile) -> bool:
        return tile not in self.wrong


def new_process() -> None:
    tuning._cache.cache_clear()


def choose(rows=1000, codes=1024, dim=64, heads=1, dtype=torch.bfloat16, how=HOW,
           kernel="forward", variant=True) -> tiles.Tile:  # fmt: skip
    z = torch.empty(heads, rows, dim, dtype=dtype, device="meta")
    return tiles.choose(kernel, how, z, codes, None, variant)
