"""A folder of pictures, or of tar shards of them, as a data set."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from softvq.data.bad import BadPictures
from softvq.data.index import Pictures, find_pictures
from softvq.data.splits import split_off
from softvq.data.streamed import StreamedSet
from softvq.data.types import DataError, Source
from softvq.data.watch import Watch, unwatched

TEST_FRACTION = 0.2
TEST_SEED = 0


@dataclass(frozen=True)
class Reading:
    """How pictures are read.

    stream_above: training images that take more bytes when decoded are not held in memory.
    workers: processes that decode; 0: this one.
    skip_bad: leave out pictures that cannot be read, and tell `note` in one line; else they are an
    error.
    leads: of the processes that read the same pictures, this one tells of them.
    watch: (items, their number, what is done) → the same items, perhaps with a bar meanwhile.
    """

    stream_above: float = math.inf
    workers: int = 0
    skip_bad: bool = False
    note: Callable[[str], None] = print
    leads: bool = True
    watch: Watch = unwatched


def load_folder(root: Path, image_size: tuple[int, int] | None, reading: Reading) -> Source:
    """What is in root/train, root/test and root/validation (or val), or without train in root.

    Without root/train a fixed 20 % of all images is the test split. The class of a picture is the
    first folder below the split's folder; that of KEY.jpg in a shard the text of KEY.cls, or else
    the first folder of its name. Classes are sorted, numbers by their value.
    The sets are `StreamedSet`s: headers have been read, and nothing is decoded yet.
    Raises DataError for a missing or empty folder, a damaged shard, pictures that cannot be read
    and, without `image_size`, one of another size than the first.
    """
    folders = _split_folders(root)
    bad = BadPictures(reading.skip_bad, reading.note)
    pictures, classes = find_pictures(folders, reading.workers, bad, reading.watch)
    names, labels = _number(classes)
    whole = StreamedSet(
        pictures,
        torch.arange(len(labels)),
        labels,
        _shape(pictures, image_size),
        image_size is not None,
        reading.workers,
        bad,
    )
    if len(folders) == 1:
        advice = f"add some to {root}, or make folders 'train' and 'test' of them there"
        return Source(*split_off(whole, TEST_FRACTION, TEST_SEED, "test", advice), names)
    parts = torch.from_numpy(pictures.rows["folder"].copy())
    train, test, *validation = (
        whole.select((parts == part).nonzero().flatten()) for part in range(len(folders))
    )
    return Source(train, test, names, *validation)


def is_among(root: Path, path: Path) -> bool:
    """Whether pictures in the folder `path` are, or would be, images of `load_folder(root)`.

    The links that are followed are those to folders of classes, not those further down.
    """
    folders = _split_folders(root)
    links = (entry for folder in folders for entry in folder.glob("*") if entry.is_symlink())
    place = path.resolve()
    # Of a link that leads to itself resolve() makes an error.
    return any(place.is_relative_to(os.path.realpath(folder)) for folder in (*folders, *links))


def _split_folders(root: Path) -> list[Path]:
    """The folders of train, test and perhaps validation, or only `root`."""
    train, test = root / "train", root / "test"
    if not train.is_dir():
        return [root]
    if not test.is_dir():
        raise DataError(
            f"{root}: has a folder 'train' but no folder 'test'; "
            "add it, or rename 'train' to have the images split for you"
        )
    validation = [root / name for name in ("validation", "val") if (root / name).is_dir()]
    return [train, test, *validation[:1]]


def _number(classes: Sequence[str | None]) -> tuple[tuple[str, ...], Tensor]:
    """The names of the classes in order, and the number (N,) of each picture's, −1 for none."""
    found = {name for name in classes if name is not None}
    names = sorted(found, key=lambda name: (int(name) if name.isdecimal() else math.inf, name))
    index = {None: -1} | {name: number for number, name in enumerate(names)}
    return tuple(names), torch.tensor([index[name] for name in classes])


def _shape(pictures: Pictures, image_size: tuple[int, int] | None) -> tuple[int, int, int]:
    """(C, H, W) of all images, C = 3 as soon as one of them has colour. Raises DataError."""
    rows = pictures.rows
    channels = 1 if rows["grey"].all() else 3
    if image_size is not None:
        return channels, *image_size
    height, width = (int(rows[side][0]) for side in ("height", "width"))
    others = np.flatnonzero((rows["height"] != height) | (rows["width"] != width))
    if len(others):
        other = int(others[0])
        raise DataError(
            f"{pictures.name(other)}: {rows['height'][other]}x{rows['width'][other]} pixels, but "
            f"{pictures.name(0)} has {height}x{width} (height x width); a model is trained on one "
            "size, which softvq train --image-size makes of all"
        )
    return channels, height, width
