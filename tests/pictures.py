"""Making folders of tiny pictures, tar shards of them, and pictures that are broken."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (6, 8)  # height, width


def picture(number: int, size=SIZE) -> bytes:
    """A PNG whose first pixel is `number`, the others random."""
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    pixels[0, 0] = number
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def paint(folder: Path, count: int, classes=("ant", "bee"), size=SIZE) -> Path:
    """A folder with a folder for each class, `count` pictures in all."""
    for number in range(count):
        path = folder / classes[number * len(classes) // count] / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number, size))
    return folder


def plain(folder: Path, sizes) -> Path:
    """A folder of black pictures 0.png, 1.png … of these (width, height)."""
    folder.mkdir()
    for number, size in enumerate(sizes):
        Image.new("L", size).save(folder / f"{number}.png")
    return folder


def pack(path: Path, members: dict[str, bytes]) -> Path:
    """A tar shard of files by name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as shard:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    return path


def packed(folder: Path, out: Path, per_shard: int) -> Path:
    """The pictures of a folder as shards in another one, in the same order."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for start in range(0, len(files), per_shard):
        members = {
            str(path.relative_to(folder)): path.read_bytes()
            for path in files[start : start + per_shard]
        }
        pack(out / f"{start:05}.tar", members)
    return out


def deep() -> bytes:
    """A PNG of 16 bits per pixel."""
    buffer = io.BytesIO()
    Image.fromarray(np.full(SIZE, 4000, np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


# kind -> its bytes; the header of the last one is whole
BAD = {
    "empty": b"",
    "no picture": b"nonsense",
    "deep": deep(),
    "torn": picture(77)[:-60],
}
