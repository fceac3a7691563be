"""A data set that need not fit in memory: pictures are decoded when their turn comes."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from softvq.data.bad import BadPictures
from softvq.data.index import Pictures
from softvq.data.pictures import UnreadableError, size_text
from softvq.data.resize import fit
from softvq.data.types import Batch, DataError, ImageSet
from softvq.data.watch import Watch
from softvq.data.workers import AHEAD, in_workers

SEEN = ["height", "width", "grey"]  # of a picture's header
CHUNK = 64  # pictures that a process decodes in one go: several share a batch


class Chunk(NamedTuple):
    """Some images to decode."""

    positions: list[int]
    last: bool  # of its batch
    full: bool = True  # another image takes the place of one that cannot be read


class Decoded(NamedTuple):
    """The images of a chunk."""

    images: Tensor  # (B, C, H, W) uint8
    labels: Tensor  # (B,) int64
    problems: dict[str, str]  # what is wrong with those that cannot be read, by name
    last: bool


@dataclass(frozen=True, eq=False)
class StreamedSet:
    """Images with their labels, on the disk.

    pictures: of all splits. chosen: (N,) int64, which of them. labels: (N,) int64, −1 for an image
    without a class. image_shape: (C, H, W) of all. fitted: they have to be resized and cropped to
    it. workers: processes that decode; 0: this one. bad: takes those that cannot be read.
    """

    pictures: Pictures
    chosen: Tensor
    labels: Tensor
    image_shape: tuple[int, int, int]
    fitted: bool
    workers: int
    bad: BadPictures

    @property
    def nbytes(self) -> int:
        """The most memory that labels and images decoded ahead take."""
        ahead = AHEAD * CHUNK * max(1, self.workers)
        return ahead * math.prod(self.image_shape) + self.labels.nbytes

    @property
    def decoded_bytes(self) -> int:
        """What all the images would take in memory."""
        return len(self) * math.prod(self.image_shape)

    @property
    def streamed(self) -> bool:
        """Yes: images are decoded when they are loaded."""
        return True

    def __len__(self) -> int:
        return len(self.chosen)

    def identity(self) -> Iterator[bytes]:
        """Names and headers of the pictures, and the labels."""
        rows = self.pictures.rows[self.chosen.numpy()]
        for column in (self.pictures.names[self.chosen.numpy()], *map(rows.__getitem__, SEEN)):
            yield column.tobytes()
        yield self.labels.numpy().tobytes()

    def select(self, indices: Tensor) -> "StreamedSet":
        """The set of the images at `indices`, (M,) int64, in that order; nothing is read."""
        return replace(self, chosen=self.chosen[indices], labels=self.labels[indices])

    def to(self, device: torch.device) -> "StreamedSet":
        """The same: it holds nothing."""
        return self

    def load(self, batches: Iterable[Tensor], device: torch.device) -> Iterator[Batch]:
        """Decode the images of each batch of indices, (B,) int64 on the CPU, on to `device`.

        The next image that can be read takes the place of one that cannot, if bad ones are skipped.
        Raises DataError, when its turn comes, for an image that cannot be read.
        """
        parts: list[Batch] = []
        loaded = 0
        pin = device.type == "cuda"
        try:
            for decoded in in_workers(self._decode, _chunks(batches), self.workers, pin=pin):
                self.bad.found(decoded.problems)
                parts.append(Batch(decoded.images, decoded.labels).to(device))
                if not decoded.last:
                    continue
                batch = Batch(*map(torch.cat, zip(*parts, strict=True)))
                parts.clear()
                yield batch
                loaded += len(batch.labels)
                if loaded >= len(self):  # an epoch
                    loaded = 0
                    self.bad.tell()
        finally:
            self.bad.tell()

    def in_memory(self, watch: Watch) -> ImageSet:
        """All images decoded; those that cannot be read are left out, if bad ones are skipped.

        Raises DataError for an image that cannot be read, and when none is left.
        """
        images = torch.empty(len(self), *self.image_shape, dtype=torch.uint8)
        labels = torch.empty_like(self.labels)
        count = 0
        chunks = [
            Chunk(positions.tolist(), last=True, full=False)
            for positions in torch.arange(len(self)).split(CHUNK)
        ]
        loaded = in_workers(self._decode, chunks, self.workers)
        for decoded in watch(loaded, len(chunks), "decoding pictures"):
            self.bad.found(decoded.problems)
            place = slice(count, count + len(decoded.labels))
            images[place], labels[place] = decoded.images, decoded.labels
            count = place.stop
        if not count:
            raise self._none_left()
        return ImageSet(images[:count], labels[:count])

    def _decode(self, chunk: Chunk) -> Decoded:
        images: list[Tensor] = []
        used: list[int] = []
        problems: dict[str, str] = {}
        for position in chunk.positions:
            others = chain(range(position + 1, len(self)), range(position)) if chunk.full else ()
            for candidate in chain([position], others):
                try:
                    images.append(self._image(candidate))
                    used.append(candidate)
                    break
                except UnreadableError as error:
                    problems[self._name(candidate)] = str(error)
                    self.bad.found(problems)
        if chunk.full and not used:
            raise self._none_left()
        pixels = torch.empty(len(images), *self.image_shape, dtype=torch.uint8)
        for row, image in enumerate(images):
            pixels[row] = image
        return Decoded(pixels, self.labels[used], problems, chunk.last)

    def _name(self, position: int) -> str:
        return self.pictures.name(int(self.chosen[position]))

    def _none_left(self) -> DataError:
        return DataError(f"{self._name(0)}: neither this image nor any other of its split is whole")

    def _image(self, position: int) -> Tensor:
        """(C, H, W) uint8. Raises UnreadableError."""
        channels, *size = self.image_shape
        image = self.pictures.read(int(self.chosen[position]))
        if self.fitted:
            image = fit(image[None], (size[0], size[1]))[0]
        if list(image.shape[1:]) != size or len(image) > channels:
            raise UnreadableError(
                f"{len(image)} channels of {size_text(image)}, but its header says "
                f"{channels} of {size[0]}x{size[1]}"
            )
        return image.expand(channels, -1, -1)


def _chunks(batches: Iterable[Tensor]) -> Iterator[Chunk]:
    """Each batch in pieces."""
    for batch in batches:
        *others, last = batch.split(CHUNK)
        for positions in others:
            yield Chunk(positions.tolist(), last=False)
        yield Chunk(last.tolist(), last=True)
