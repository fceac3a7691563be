"""MNIST and Fashion-MNIST: the same four idx files."""

import tempfile
from pathlib import Path

import torch

from softvq.data.download import explained, torchvision_datasets
from softvq.data.idx import read_idx
from softvq.data.types import DataError, ImageSet, Source

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
TORCHVISION_CLASS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}
CLASS_NAMES = {
    "mnist": tuple("0123456789"),
    "fashion-mnist": (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
}


def load_mnist(name: str, root: Path, *, download: bool) -> Source:
    """Read "mnist" or "fashion-mnist" from root or torchvision's folder below it, else download.

    The files themselves do not say which of the two they are; `name` only picks the class names
    and what is downloaded.
    Raises DataError for a missing or bad file and when there is nothing to read or download.
    """
    raw = root / TORCHVISION_CLASS[name] / "raw"
    paths = _find_files(root) or _find_files(raw)
    if not paths:
        if not download:
            raise DataError(
                f"{root}: no {name} there; put {', '.join(FILES)} (plain or .gz) there, "
                "name the folder that has them with --data-dir, or allow the download"
            )
        _download(name, root, raw)
        paths = _find_files(raw)
    train, test = _read_pair(*paths[:2]), _read_pair(*paths[2:])
    if train.images.shape[1:] != test.images.shape[1:]:
        raise DataError(
            f"{paths[2]}: its images have another size than those of {paths[0].name}; "
            "take all four files from the same data set"
        )
    return Source(train, test, CLASS_NAMES[name])


def _find_files(folder: Path) -> list[Path]:
    """The paths of FILES in `folder`, plain before .gz, or an empty list when it has none."""
    found = {
        name: path
        for name in FILES
        for path in (folder / f"{name}.gz", folder / name)
        if path.is_file()
    }
    missing = [name for name in FILES if name not in found]
    if found and missing:
        raise DataError(
            f"{folder}: {', '.join(missing)} (plain or .gz) missing; "
            "add what is missing, or remove the other idx files to download all four"
        )
    return [found[name] for name in FILES if found]


def _read_pair(images_path: Path, labels_path: Path) -> ImageSet:
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise DataError(
            f"{labels_path}: {len(labels)} labels for the {len(images)} images of "
            f"{images_path.name}; take both files from the same data set"
        )
    if labels.max() > 9:
        raise DataError(f"{labels_path}: label {labels.max()} is not in 0..9; check the data set")
    return ImageSet(torch.from_numpy(images)[:, None], torch.from_numpy(labels).long())


def _download(name: str, root: Path, raw: Path) -> None:
    """Download into a folder of its own first: an interrupted download leaves no partial set."""
    datasets = torchvision_datasets(name)
    with explained(name, root, ", ".join(FILES)):
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as temporary:
            fetched = getattr(datasets, TORCHVISION_CLASS[name])(temporary, download=True)
            raw.mkdir(parents=True, exist_ok=True)
            for file in FILES:
                Path(fetched.raw_folder, file).replace(raw / file)
