"""Where all pictures of a data set lie, found once and read in any order."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from torch import Tensor

from softvq.data.bad import BadPictures
from softvq.data.pictures import explained, read_image
from softvq.data.shares import look_at, shares_of
from softvq.data.types import DataError
from softvq.data.watch import Watch
from softvq.data.workers import in_workers

ROW = np.dtype(
    [
        ("folder", "i4"),  # index into the folders that were looked through
        ("shard", "i4"),  # index into the shards, −1 for a file of its own
        ("offset", "i8"),  # in the shard, of `size` bytes
        ("size", "i8"),
        ("height", "i4"),  # upright, as the header says
        ("width", "i4"),
        ("grey", "?"),
    ]
)


@dataclass(frozen=True, eq=False)
class Pictures:
    """N pictures, in arrays, which worker processes share without a copy.

    names: (N,) bytes, the path of a file of its own below its folder, or the name in the shard.
    rows: (N,) of ROW. folders, shards: their paths.
    """

    names: np.ndarray
    rows: np.ndarray
    folders: tuple[Path, ...]
    shards: tuple[Path, ...]

    def name(self, index: int) -> str:
        """The path of a picture's file, or "SHARD: NAME"."""
        name, shard = os.fsdecode(self.names[index]), self._shard_of(index)
        return _full_name(name, self._folder_of(index), shard)

    def read(self, index: int) -> Tensor:
        """Decode one picture: (C, H, W) uint8. Raises UnreadableError."""
        with explained():
            return read_image(self._open(index))

    def _open(self, index: int) -> Path | BinaryIO:
        shard, row = self._shard_of(index), self.rows[index]
        if shard is None:
            return self._folder_of(index) / os.fsdecode(self.names[index])
        with shard.open("rb") as file:
            file.seek(row["offset"])
            return BytesIO(file.read(row["size"]))

    def _folder_of(self, index: int) -> Path:
        return self.folders[self.rows[index]["folder"]]

    def _shard_of(self, index: int) -> Path | None:
        number = self.rows[index]["shard"]
        return None if number < 0 else self.shards[number]


def find_pictures(
    folders: Sequence[Path], workers: int, bad: BadPictures, watch: Watch
) -> tuple[Pictures, list[str | None]]:
    """The pictures of some folders, folder by folder, and the name of the class of each.

    Every header is read, in so many processes. Raises DataError for a missing or empty folder, a
    damaged shard and, unless they are to be skipped, all pictures that cannot be read.
    """
    shares = [(number, s) for number, folder in enumerate(folders) for s in shares_of(folder)]
    looked = in_workers(look_at, [share for _, share in shares], workers)
    names: list[bytes] = []
    rows: list[tuple[int | bool, ...]] = []
    classes: list[str | None] = []
    shards: list[Path] = []
    problems: dict[str, str] = {}
    found = watch(zip(shares, looked, strict=True), len(shares), "looking at pictures")
    for (number, share), (entries, others) in found:
        bad.leave_out(_full_name(name, share.folder, share.shard) for name in others)
        if share.shard is not None:
            shards.append(share.shard)
        shard = -1 if share.shard is None else len(shards) - 1
        for entry in entries:
            if entry.header is None:
                problems[_full_name(entry.name, share.folder, share.shard)] = entry.problem
            else:
                names.append(os.fsencode(entry.name))
                rows.append((number, shard, entry.offset, entry.size, *entry.header))
                classes.append(entry.label)
    bad.found(problems)
    pictures = Pictures(np.array(names, "S"), np.array(rows, ROW), tuple(folders), tuple(shards))
    for number, folder in enumerate(folders):
        if not (pictures.rows["folder"] == number).any():
            raise DataError(f"{folder}: none of the images there can be read")
    return pictures, classes


def _full_name(name: str, folder: Path, shard: Path | None) -> str:
    return str(folder / name) if shard is None else f"{shard}: {name}"
