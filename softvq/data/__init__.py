"""Image data sets as uint8 tensors in memory, or on the disk where they are too large for it."""

from difflib import get_close_matches
from pathlib import Path

from softvq.data.cifar10 import load_cifar10
from softvq.data.digits import load_digits
from softvq.data.fingerprint import fingerprint
from softvq.data.folder import Reading, is_among, load_folder
from softvq.data.mnist import load_mnist
from softvq.data.pictures import find_images, load_images
from softvq.data.resize import fit
from softvq.data.splits import split_off
from softvq.data.streamed import StreamedSet
from softvq.data.types import Batch, DataError, DataSplits, Images, ImageSet, Source

__all__ = [
    "DATASETS",
    "DATA_DIR",
    "DOWNLOADED",
    "Batch",
    "DataError",
    "DataSplits",
    "ImageSet",
    "Images",
    "Reading",
    "StreamedSet",
    "find_images",
    "is_among",
    "load_data",
    "load_images",
]

DOWNLOADED = ("mnist", "fashion-mnist", "cifar10")
DATASETS = ("digits", *DOWNLOADED, "folder")
DATA_DIR = Path("data")  # of DOWNLOADED, where no other is given


def load_data(
    name: str,
    data_dir: Path | None = None,
    *,
    seed: int = 0,
    validation_fraction: float = 0.1,
    download: bool = True,
    image_size: tuple[int, int] | None = None,
    reading: Reading = Reading(),
) -> DataSplits:
    """Load one of DATASETS, all of it, as images (N, C, H, W) uint8 and labels (N,) int64.

    A folder too large for memory, as `reading` has it, is only looked through: its images are
    decoded when they are loaded, the same images in the same order.

    data_dir: where the files are or go, "data" by default; "folder" needs it, "digits" ignores it.
    seed: picks the validation images out of the training images; the test split is always the same.
    validation_fraction: their share, unless a folder brings its own validation images.
    download: whether missing files may be downloaded.
    image_size: (H, W) to which all images are resized (shorter side) and centre-cropped.
    reading: of the pictures of a folder; the others ignore it.

    Raises DataError for an unknown name, a bad argument, and data that are missing or damaged.
    """
    if not 0 < validation_fraction < 1:
        raise DataError(f"validation_fraction: {validation_fraction} is not between 0 and 1")
    if image_size is not None and min(image_size) < 1:
        raise DataError(f"image_size: {image_size} is not a height and a width of 1 or more")

    source = _read(name, data_dir, download, image_size, reading)
    train, validation = source.train, source.validation
    if validation is None:
        advice = "give more"
        if len(train) > 1:
            advice += ", or train with another --validation-fraction"
        train, validation = split_off(train, validation_fraction, seed, "validation", advice)
    parts = (train, validation, source.test)
    digest = fingerprint(parts, source.class_names)
    if isinstance(train, StreamedSet):
        if train.decoded_bytes <= reading.stream_above:
            parts = tuple(part.in_memory(reading.watch) for part in parts)
        train.bad.tell(reading.leads)
    elif image_size is not None:
        parts = tuple(ImageSet(fit(part.images, image_size), part.labels) for part in parts)
    return DataSplits(*parts, source.class_names, digest)


def _read(
    name: str,
    data_dir: Path | None,
    download: bool,
    image_size: tuple[int, int] | None,
    reading: Reading,
) -> Source:
    root = data_dir or DATA_DIR
    match name:
        case "digits":
            return load_digits()
        case "mnist" | "fashion-mnist":
            return load_mnist(name, root, download=download)
        case "cifar10":
            return load_cifar10(root, download=download)
        case "folder":
            if data_dir is None:
                raise DataError("folder: needs the folder of the images; give it with --data-dir")
            return load_folder(data_dir, image_size, reading)
    nearest = get_close_matches(name.lower(), DATASETS, n=1, cutoff=0)[0]
    raise DataError(
        f"{name}: no such data set, did you mean {nearest}? Choose from {', '.join(DATASETS)}"
    )
