"""Memory as the threads of a GPU see it: what is out of bounds, misaligned or a race is a Fault.

Addresses and masks are (programs, threads); `size` is the bytes of one number, 1, 2 or 4, and
`count` how many of them each thread moves at once.
"""

import bisect
import ctypes
from collections.abc import Iterable, Sequence

import numpy as np
import torch

POISON = 0xFFFFFFFF  # a NaN in every format


class Fault(Exception):
    """What a GPU would report or, worse, not report."""


class GlobalMemory:
    """The storages of some CPU tensors, at their own addresses, in one launch."""

    def __init__(self, tensors: Iterable[torch.Tensor]):
        storages = (x.untyped_storage() for x in tensors)
        sizes = {x.data_ptr(): x.nbytes() for x in storages if x.nbytes()}
        self._bases = sorted(sizes)
        self._views, self._writers = [], []  # by byte: the program that wrote it, or −1
        for base in self._bases:
            data = np.frombuffer((ctypes.c_uint8 * sizes[base]).from_address(base), np.uint8)
            views = {size: data[: len(data) // size * size].view(f"u{size}") for size in (1, 2, 4)}
            self._views.append(views)
            self._writers.append(np.full(len(data), -1))

    def snapshot(self) -> list[np.ndarray]:
        """What is there now, for `restore`."""
        return [views[1].copy() for views in self._views]

    def restore(self, snapshot: list[np.ndarray]) -> None:
        for views, data in zip(self._views, snapshot, strict=True):
            views[1][:] = data

    def load(self, address, mask, size: int, count: int) -> list[np.ndarray]:
        """`count` arrays (programs, threads); zero where the mask is not set."""
        if not mask.any():
            return [np.zeros(mask.shape, f"u{size}")] * count
        tensor, index = self._find(address, mask, size, count)
        view = self._views[tensor][size]
        return [np.where(mask, view[index + i], view.dtype.type(0)) for i in range(count)]

    def store(self, address, mask, size: int, values: Sequence[np.ndarray], programs) -> None:
        """By programs (programs) of these numbers in the grid. Two must not write one word: nobody
        knows who is last.
        """
        if not mask.any():
            return
        tensor, index = self._find(address, mask, size, len(values))
        view, writer = self._views[tensor][size], self._writers[tensor]
        for i, value in enumerate(values):
            view[index[mask] + i] = value[mask]
        number = np.broadcast_to(programs[:, None], mask.shape)[mask]
        for byte in range(size * len(values)):
            written = index[mask] * size + byte
            before = writer[written]
            writer[written] = number
            if ((before != -1) & (before != number) | (writer[written] != number)).any():
                raise Fault("two programs write the same word")

    def _find(self, address, mask, size, count) -> tuple[int, np.ndarray]:
        """Which tensor is accessed, and where it has the first numbers."""
        used = address[mask]
        if (used % np.uint64(size * count)).any():
            raise Fault("global memory misaligned")
        first, end = int(used.min()), int(used.max()) + size * count
        tensor = bisect.bisect_right(self._bases, first) - 1
        if tensor < 0 or end > self._bases[tensor] + self._views[tensor][size].nbytes:
            raise Fault(f"global memory out of bounds, {first:#x} to {end:#x}")
        offset = np.where(mask, address - np.uint64(self._bases[tensor]), 0)
        return tensor, offset.astype(np.int64) // size


class SharedMemory:
    """That of each program, poisoned at first; who used a word since the last barrier is known."""

    def __init__(self, programs: int, size: int, threads: int):
        words = -(-size // 4)
        self.words = np.full((programs, words), POISON, np.uint32)
        self._size = size
        self._program = np.arange(programs)[:, None]
        # Times a program has been at a barrier, times 64, plus the warp; of no warp, −1.
        self._clock = np.tile(np.arange(threads) // 32, (programs, 1))
        self._written = np.full((programs, words), -1)
        self._reserved = np.zeros(words, int)  # products under way that read the word
        self._read = np.full((programs, words), -1)

    def barrier(self, programs: np.ndarray) -> None:
        """All threads of the programs (programs) of this mask have met."""
        self._clock[programs] += 64

    def reserve(self, words: np.ndarray, times: int = 1) -> None:
        """These words are read by a product, once more or, with −1, no longer."""
        self._reserved[words] += times

    def load(self, address, mask, size: int, count: int) -> list[np.ndarray]:
        view, index = self._find(address, mask, size, count)
        values = []
        for i in range(count):
            self._note_read((index + i) * size // 4, mask)
            values.append(np.where(mask, view[self._program, index + i], view.dtype.type(0)))
        return values

    def store(self, address, mask, size: int, values: Sequence[np.ndarray]) -> None:
        view, index = self._find(address, mask, size, len(values))
        program = np.broadcast_to(self._program, mask.shape)[mask]
        for i, value in enumerate(values):
            self._note_write((index + i) * size // 4, mask)
            view[program, (index + i)[mask]] = value[mask]

    def _find(self, address, mask, size, count) -> tuple[np.ndarray, np.ndarray]:
        address = np.where(mask, address, 0).astype(np.int64)
        if (address % (size * count)).any():
            raise Fault("shared memory misaligned")
        if address.max() + size * count > self._size:
            raise Fault(f"shared memory out of bounds, byte {address.max()} of {self._size}")
        return self.words.view(f"u{size}"), address // size

    def _note_read(self, word, mask) -> None:
        program, now = np.broadcast_to(self._program, mask.shape)[mask], self._clock[mask]
        word, several = word[mask], now | 63
        written, read = self._written[program, word], self._read[program, word]
        if ((written // 64 == now // 64) & (written != now)).any():
            raise Fault("a warp reads what another has written, without a barrier")
        others = (read // 64 == now // 64) & (read != now)
        self._read[program, word] = np.where(others, several, now)

    def _note_write(self, word, mask) -> None:
        program, now = np.broadcast_to(self._program, mask.shape)[mask], self._clock[mask]
        word = word[mask]
        if self._reserved[word].any():
            raise Fault("what a product under way reads is written")
        for used in (self._written[program, word], self._read[program, word]):
            if ((used // 64 == now // 64) & (used != now)).any():
                raise Fault("a warp writes what another has used, without a barrier")
        self._written[program, word] = now
