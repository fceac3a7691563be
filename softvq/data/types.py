"""What every data set looks like to the rest of the engine."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class DataError(Exception):
    """Data that cannot be used; its one line names the file or argument and what to do."""


class Batch(NamedTuple):
    """Some images of a set with their labels, on one device."""

    images: Tensor  # (B, C, H, W) uint8
    labels: Tensor  # (B,) int64

    def to(self, device: torch.device) -> "Batch":
        """The same on a device, which is not waited for."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


class Images(Protocol):
    """A set of images with their labels, wherever it lies."""

    labels: Tensor  # (N,) int64 index into the class names, -1 for an image without a class

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image; C is 1 (grey) or 3 (RGB)."""

    @property
    def nbytes(self) -> int:
        """The memory that the set takes."""

    @property
    def decoded_bytes(self) -> int:
        """The memory that all its images take when they are decoded."""

    @property
    def streamed(self) -> bool:
        """Whether images are decoded only when they are loaded."""

    def __len__(self) -> int: ...

    def identity(self) -> Iterator[bytes]:
        """What tells this set from others, short of all its pixels."""

    def select(self, indices: Tensor) -> "Images":
        """The set of the images at `indices`, (M,) int64, in that order."""

    def to(self, device: torch.device) -> "Images":
        """The set with what it holds in memory on that device."""

    def load(self, batches: Iterable[Tensor], device: torch.device) -> Iterator[Batch]:
        """The images of each batch of indices, (B,) int64 where the labels are, on `device`."""


# Comparing tensors gives no single bool, so image sets compare by identity (eq=False).
@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with their labels, in memory.

    images: (N, C, H, W) uint8, C is 1 (grey) or 3 (RGB).
    labels: (N,) int64 index into the class names, -1 for an image without a class.
    """

    images: Tensor
    labels: Tensor

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def nbytes(self) -> int:
        """The memory of images and labels."""
        return self.images.nbytes + self.labels.nbytes

    @property
    def decoded_bytes(self) -> int:
        """The memory of the images."""
        return self.images.nbytes

    @property
    def streamed(self) -> bool:
        """No: they have been decoded."""
        return False

    def __len__(self) -> int:
        return len(self.images)

    def identity(self) -> Iterator[bytes]:
        """Shape and labels."""
        yield repr(self.image_shape).encode()
        yield self.labels.numpy().tobytes()

    def select(self, indices: Tensor) -> "ImageSet":
        """The images and labels at `indices`, (M,) int64, in that order."""
        return ImageSet(self.images[indices], self.labels[indices])

    def to(self, device: torch.device) -> "ImageSet":
        """The same on a device."""
        return ImageSet(self.images.to(device), self.labels.to(device))

    def load(self, batches: Iterable[Tensor], device: torch.device) -> Iterator[Batch]:
        """The images of each batch of indices, (B,) int64 where the labels are, on `device`."""
        for chosen in batches:
            yield Batch(self.images[chosen], self.labels[chosen]).to(device)


class Source(NamedTuple):
    """What one reader found: a data set whose validation split may still have to be made."""

    train: Images
    test: Images
    class_names: tuple[str, ...]
    validation: Images | None = None


class DataSplits(NamedTuple):
    """Three disjoint, non-empty sets of images of one shape."""

    train: Images
    validation: Images
    test: Images
    class_names: tuple[str, ...]
    fingerprint: str  # of what is in which split, wherever it lies; pixels do not count

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        return self.train.image_shape
