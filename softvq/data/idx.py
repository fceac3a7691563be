"""The idx file format."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from softvq.data.types import DataError

UNSIGNED_BYTE = 0x08


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read an idx file, plain or .gz, of unsigned bytes with that many dimensions, as uint8.

    Raises DataError when the file is unreadable or its header is not that of such a file or does
    not fit its length.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise _bad(path, f"cannot be read ({error})") from error

    start = 4 + 4 * dimensions
    if len(data) < start or data[:2] != b"\0\0":
        raise _bad(path, "is not an idx file")
    if data[2] != UNSIGNED_BYTE:
        raise _bad(path, f"has value type 0x{data[2]:02x} instead of 0x08 (unsigned byte)")
    if data[3] != dimensions:
        raise _bad(path, f"has {data[3]} dimensions instead of {dimensions}")
    shape = struct.unpack_from(f">{dimensions}I", data, 4)
    size = math.prod(shape)
    if size == 0:
        raise _bad(path, "holds no values")
    if size != len(data) - start:
        text = "x".join(map(str, shape))
        raise _bad(path, f"announces {text} = {size} bytes but has {len(data) - start}")
    # A copy, because torch wants memory it may write to.
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy()


def _bad(path: Path, problem: str) -> DataError:
    return DataError(f"{path}: {problem}; replace the file with a fresh copy")
