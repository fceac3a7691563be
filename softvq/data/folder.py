"""A folder of pictures as a data set."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from softvq.data.pictures import find_images, read_image, size_text
from softvq.data.resize import fit
from softvq.data.splits import split_off
from softvq.data.types import DataError, ImageSet, Source

TEST_FRACTION = 0.2
TEST_SEED = 0


def load_folder(root: Path, image_size: tuple[int, int] | None) -> Source:
    """Read root/train, root/test and root/validation (or val) if there is a root/train, else root.

    Without root/train a fixed 20 % of all images is the test split. The class of an image is the
    first folder below the split's folder, classes in sorted order.
    Raises DataError for a missing or empty folder and for an image that is unreadable or, without
    `image_size`, of another size than the first.
    """
    folders = _split_folders(root)
    files = [find_images(folder) for folder in folders]
    classes = [
        _class_of(path, folder)
        for folder, paths in zip(folders, files, strict=True)
        for path in paths
    ]
    names = tuple(sorted({name for name in classes if name is not None}))
    index = {None: -1} | {name: number for number, name in enumerate(names)}
    labels = torch.tensor([index[name] for name in classes])
    images = _read_all([path for paths in files for path in paths], image_size)

    if len(folders) == 1:
        train, test = split_off(ImageSet(images, labels), TEST_FRACTION, TEST_SEED, "test")
        return Source(train, test, names)
    sizes = [len(paths) for paths in files]
    train, test, *validation = map(ImageSet, images.split(sizes), labels.split(sizes))
    return Source(train, test, names, *validation)


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


def _class_of(path: Path, folder: Path) -> str | None:
    below = path.relative_to(folder).parts
    return below[0] if len(below) > 1 else None


def _read_all(paths: Sequence[Path], image_size: tuple[int, int] | None) -> Tensor:
    """All pictures as (N, C, H, W) uint8, with C = 3 as soon as one of them has colour."""
    images: list[Tensor] = []
    for path in paths:
        image = read_image(path)
        if image_size is not None:
            image = fit(image[None], image_size)[0]
        elif images and image.shape[1:] != images[0].shape[1:]:
            raise DataError(
                f"{path}: {size_text(image)} pixels, but {paths[0]} has {size_text(images[0])} "
                "(height x width); give one size for all with --image-size"
            )
        images.append(image)
    channels = max(len(image) for image in images)
    return torch.stack([image.expand(channels, -1, -1) for image in images])
