"""Picture files: finding and decoding them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from softvq.data.types import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
GREY_MODES = ("1", "L", "LA")
# Pillow would clip these to 0..255 instead of scaling them.
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


def find_images(folder: Path) -> list[Path]:
    """All picture files under `folder`, at any depth, sorted.

    Hidden files and folders (macOS leaves "._name.jpg" behind) are skipped, and links to folders
    are not followed. Raises DataError when there is no such folder or no picture in it.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give --data-dir a folder of images")
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not paths:
        raise DataError(f"{folder}: no images there; add files ending in {' '.join(SUFFIXES)}")
    return paths


def read_image(path: Path, channels: int | None = None) -> Tensor:
    """Decode one picture, upright, without its transparency: (C, H, W) uint8.

    C is `channels` (1 or 3) when given, else 1 for a grey picture and 3 for any other.
    Raises DataError when the file cannot be read or has more than 8 bits per grey value.
    """
    try:
        with Image.open(path) as image:
            grey = image.mode in GREY_MODES if channels is None else channels == 1
            deep = image.mode in DEEP_MODES
            pixels = np.array(ImageOps.exif_transpose(image).convert("L" if grey else "RGB"))
    # On a broken file Pillow's decoders raise nearly anything: OSError, SyntaxError, struct.error.
    except Exception as error:
        raise DataError(f"{path}: cannot read this image ({error}); repair or remove it") from error
    if deep:
        raise DataError(f"{path}: more than 8 bits per pixel value; save it as an 8-bit image")
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)


def load_images(paths: Sequence[Path], shape: tuple[int, int, int]) -> Tensor:
    """Decode pictures that must have one size: (N, C, H, W) uint8 for `shape` (C, H, W).

    Grey becomes RGB, or colour grey, as C (3 or 1) asks.
    Raises DataError naming the file that cannot be read or has another size.
    """
    channels, height, width = shape
    images = torch.empty(len(paths), *shape, dtype=torch.uint8)
    for index, path in enumerate(paths):
        image = read_image(path, channels)
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
