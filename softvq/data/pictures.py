"""Picture files: finding and decoding them."""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from softvq.data.resize import fit
from softvq.data.types import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
GREY_MODES = ("1", "L", "LA")
# Pillow would clip these to 0..255 instead of scaling them.
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
LYING = (5, 6, 7, 8)  # EXIF orientations that change height for width


class UnreadableError(Exception):
    """A picture that cannot be used; its text says why, not which."""


class Header(NamedTuple):
    """What a picture says of itself before its pixels."""

    height: int  # upright
    width: int
    grey: bool


def find_images(folder: Path, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """All files under `folder` with these suffixes, those of pictures, at any depth, sorted.

    Hidden files and folders (macOS leaves "._name.jpg" behind) are skipped; links are followed,
    but for those back to a folder they lie in. Raises DataError when there is no such folder or no
    such file in it, and for a folder below it that cannot be read.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give --data-dir a folder of images")
    try:
        paths = sorted(path for path in _files_in(folder) if path.suffix.lower() in suffixes)
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be looked through ({error.strerror})") from error
    if not paths:
        raise DataError(f"{folder}: no images there; add files ending in {' '.join(suffixes)}")
    return paths


def _files_in(folder: Path) -> Iterator[Path]:
    """Not with rglob, which passes over folders that it may not read."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = folder / entry.name
            if entry.is_dir():
                if not (entry.is_symlink() and _leads_back(path)):
                    yield from _files_in(path)
            elif entry.is_file():
                yield path


def _leads_back(link: Path) -> bool:
    """Whether it leads to a folder it lies in, or was reached through."""
    return link.resolve() in {above.resolve() for above in link.absolute().parents}


def read_header(file: Path | BinaryIO) -> Header:
    """Size and colour of a picture, without decoding it. Raises UnreadableError.

    The size of a PNG whose orientation stands behind its pixels is that before it is turned.
    """
    with explained(), Image.open(file) as image:
        width, height = image.size
        # Not the method of PNG, which decodes all of the picture.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
        _check_depth(image.mode)
        if orientation in LYING and image.format != "TIFF":  # that size is upright
            width, height = height, width
        return Header(height, width, image.mode in GREY_MODES)


def read_image(file: Path | BinaryIO, channels: int | None = None) -> Tensor:
    """Decode one picture, upright, without its transparency: (C, H, W) uint8.

    C is `channels` (1 or 3) when given, else 1 for a grey picture and 3 for any other.
    Raises UnreadableError when it cannot be read or has more than 8 bits per grey value.
    """
    with explained(), Image.open(file) as image:
        grey = image.mode in GREY_MODES if channels is None else channels == 1
        _check_depth(image.mode)
        pixels = np.array(ImageOps.exif_transpose(image).convert("L" if grey else "RGB"))
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)


def load_images(
    paths: Sequence[Path], shape: tuple[int, int, int], *, fitted: bool = False
) -> Tensor:
    """Decode pictures of one size, or `fitted` to it: (N, C, H, W) uint8 for `shape` (C, H, W).

    Grey becomes RGB, or colour grey, as C (3 or 1) asks.
    Raises DataError naming the file that cannot be read or has another size.
    """
    channels, height, width = shape
    images = torch.empty(len(paths), *shape, dtype=torch.uint8)
    for index, path in enumerate(paths):
        try:
            image = read_image(path, channels)
        except UnreadableError as error:
            raise DataError(f"{path}: {error}; repair or remove it") from error
        if fitted:
            image = fit(image[None], (height, width))[0]
        if image.shape != shape:
            raise DataError(
                f"{path}: {size_text(image)} pixels, expected {height}x{width} (height x width); "
                "resize the picture"
            )
        images[index] = image
    return images


def size_text(image: Tensor) -> str:
    """Height and width of a (C, H, W) image as "HxW"."""
    return f"{image.shape[1]}x{image.shape[2]}"


@contextmanager
def explained() -> Iterator[None]:
    """Turn whatever goes wrong with a picture into an UnreadableError."""
    try:
        with warnings.catch_warnings():  # large pictures are allowed, huge ones an error of Pillow
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    except UnreadableError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableError("cannot read this image (not a picture that Pillow knows)") from error
    # On a broken file Pillow's decoders raise nearly anything: OSError, SyntaxError, struct.error.
    except Exception as error:
        raise UnreadableError(f"cannot read this image ({error})") from error


def _check_depth(mode: str) -> None:
    if mode in DEEP_MODES:
        raise UnreadableError("more than 8 bits per pixel value")
