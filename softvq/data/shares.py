"""What lies in a folder: files of pictures, and tar shards of them as WebDataset writes them."""

import re
import tarfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from softvq.data.pictures import SUFFIXES, Header, UnreadableError, find_images, read_header
from softvq.data.types import DataError

SHARD = ".tar"
FILES = 256  # that are looked at together


class Share(NamedTuple):
    """What is looked at in one go: a shard, or some files."""

    folder: Path  # that the classes are named in
    files: list[Path]
    shard: Path | None = None


class Looked(NamedTuple):
    """What was found in a share."""

    entries: list["Entry"]
    others: list[str]  # names in the shard of pictures that belong to a sample, such as masks


class Entry(NamedTuple):
    """A picture that was found."""

    name: str  # the path of its file below the folder, or its name in the shard
    offset: int  # in the shard, of its `size` bytes
    size: int
    label: str | None  # the name of its class
    header: Header | None  # None for one that cannot be read,
    problem: str  # for this reason


def shares_of(folder: Path) -> Iterator[Share]:
    """The pictures and shards of a folder, in the order of their paths. Raises DataError."""
    paths = find_images(folder, (*SUFFIXES, SHARD))
    for are_shards, group in groupby(paths, lambda path: path.suffix.lower() == SHARD):
        found = list(group)
        if are_shards:
            yield from (Share(folder, [], shard) for shard in found)
        else:
            yield from (Share(folder, found[i : i + FILES]) for i in range(0, len(found), FILES))


def look_at(share: Share) -> Looked:
    """The pictures of a share, their headers read. Raises DataError for a damaged shard."""
    if share.shard is not None:
        return _members(share.shard)
    entries = []
    for path in share.files:
        name = path.relative_to(share.folder)
        entries.append(Entry(str(name), 0, 0, _first_folder(name.parts), *_header(path)))
    return Looked(entries, [])


def _members(path: Path) -> Looked:
    """The pictures of a shard, in its order.

    The class of a sample KEY.jpg is the text of KEY.cls, else the first folder of its name.
    """
    entries: list[Entry] = []
    keys: list[str] = []
    others: list[str] = []
    labels: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                key, suffix = _sample(member.name)
                if not member.isfile():
                    continue
                if suffix in SUFFIXES:
                    label = _first_folder(PurePosixPath(member.name).parts)
                    header = _header(shard.extractfile(member))
                    place = (member.name, member.offset_data, member.size)
                    entries.append(Entry(*place, label, *header))
                    keys.append(key)
                elif suffix.endswith(SUFFIXES):
                    others.append(member.name)
                elif suffix == ".cls":
                    labels[key] = shard.extractfile(member).read().decode().strip()
            # It stops without a word at whatever is no header.
            shard.fileobj.seek(shard.offset)
            if shard.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("it ends in the middle")
            while rest := shard.fileobj.read(tarfile.RECORDSIZE):
                if any(rest):
                    raise tarfile.ReadError("more follows its end, as where tars were joined")
    except (OSError, tarfile.TarError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot read this tar shard ({error}); replace it with a whole one that is "
            "not compressed"
        ) from error
    if not entries:
        dots = f", without the other dot in {others[0]}" if others else ""
        raise DataError(f"{path}: no images in it; a sample is KEY{' or KEY'.join(SUFFIXES)}{dots}")
    labelled = [
        entry._replace(label=labels.get(key, entry.label))
        for key, entry in zip(keys, entries, strict=True)
    ]
    return Looked(labelled, others)


def _sample(name: str) -> tuple[str, str]:
    """The key of a member's name, all up to the first dot of its last part, and the suffix.

    No suffix for hidden files: macOS leaves "._name.jpg" behind.
    """
    found = re.fullmatch(r"((?:.*/)?[^./]+)(\.[^/]*)", name)
    return (found[1], found[2].lower()) if found else (name, "")


def _first_folder(parts: Sequence[str]) -> str | None:
    return parts[0] if len(parts) > 1 else None


def _header(file: Path | BinaryIO) -> tuple[Header | None, str]:
    """The header of a picture, or None and what is wrong with it."""
    try:
        return read_header(file), ""
    except UnreadableError as error:
        return None, str(error)
