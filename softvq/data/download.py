"""Downloads, left to torchvision, with its failures told in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from types import ModuleType

from softvq.data.types import DataError


def torchvision_datasets(name: str) -> ModuleType:
    """The module torchvision.datasets, imported only when a data set needs it.

    Raises DataError naming the data set when torchvision cannot be imported.
    """
    try:
        from torchvision import datasets
    # A torchvision built for another torch fails with RuntimeError.
    except (ImportError, RuntimeError) as error:
        raise DataError(
            f"{name}: needs torchvision, which cannot be imported ({_one_line(error)}); "
            "install the torchvision that belongs to your torch"
        ) from error
    return datasets


@contextmanager
def explained(name: str, folder: Path, files: str) -> Iterator[None]:
    """Turn a failed download or checksum into a DataError saying which `files` go to `folder`."""
    try:
        yield
    except (OSError, RuntimeError, HTTPException) as error:
        raise DataError(
            f"{folder}: cannot get {name} ({_one_line(error)}); put {files} there yourself, "
            "or name the folder that has them with --data-dir, or try again with a network"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
