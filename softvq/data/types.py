"""What every data set looks like to the rest of the engine."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class DataError(Exception):
    """Data that cannot be used; its one line names the file or argument and what to do."""


# Comparing tensors gives no single bool, so image sets compare by identity (eq=False).
@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with their labels.

    images: (N, C, H, W) uint8, C is 1 (grey) or 3 (RGB).
    labels: (N,) int64 index into the class names, -1 for an image without a class.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def select(self, indices: Tensor) -> "ImageSet":
        """The images and labels at `indices`, (M,) int64, in that order."""
        return ImageSet(self.images[indices], self.labels[indices])


class Source(NamedTuple):
    """What one reader found: a data set whose validation split may still have to be made."""

    train: ImageSet
    test: ImageSet
    class_names: tuple[str, ...]
    validation: ImageSet | None = None


class DataSplits(NamedTuple):
    """Three disjoint, non-empty sets of images of one shape."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet
    class_names: tuple[str, ...]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width
