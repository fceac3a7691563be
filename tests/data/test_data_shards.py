"""Tar shards of pictures, as WebDataset writes them."""

import gzip
import re

import pytest
import torch

from softvq.data import DataError, Reading, load_data
from tests.pictures import pack, packed, paint, picture

STREAM = Reading(stream_above=-1)


def load(folder, reading=STREAM, **options):
    """The splits, each as (images, labels), and the names of the classes."""
    splits = load_data("folder", folder, reading=reading, **options)
    cpu = torch.device("cpu")
    batches = [next(s.load([torch.arange(len(s))], cpu)) for s in splits[:3]]
    return batches, splits.class_names


def classes(folder) -> dict[int, str | None]:
    """Name of the class of each picture by its number."""
    batches, names = load(folder)
    return {
        int(image[0, 0, 0]): names[label] if label >= 0 else None
        for images, labels in batches
        for image, label in zip(images, labels, strict=True)
    }


@pytest.mark.parametrize("reading", [STREAM, Reading()], ids=["streamed", "in memory"])
@pytest.mark.parametrize("per_shard", [4, 100])
def test_shards_hold_what_their_folder_held(tmp_path, reading, per_shard):
    folder = paint(tmp_path / "folder", 30)
    shards = packed(folder, tmp_path / "shards", per_shard)
    one, other = load(folder, Reading()), load(shards, reading)
    assert one[1] == other[1] == ("ant", "bee")
    for a, b in zip(one[0], other[0], strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def test_shards_beside_pictures(tmp_path):
    paint(tmp_path, 10)
    pack(tmp_path / "a" / "x.tar", {f"{n}.png": picture(n) for n in range(10, 20)})
    found = classes(tmp_path)
    assert found == {n: "ant" if n < 5 else "bee" for n in range(10)} | dict.fromkeys(range(10, 20))


def test_shards_in_the_folders_of_splits(tmp_path):
    for start, split in ((0, "train"), (10, "test"), (20, "val")):
        members = {f"{split}{n}.png": picture(n) for n in range(start, start + 10)}
        pack(tmp_path / split / "x.tar", members)
    batches, _ = load(tmp_path)
    found = [sorted(batch.images[:, 0, 0, 0].tolist()) for batch in batches]
    assert found == [list(range(10)), list(range(20, 30)), list(range(10, 20))]


def test_the_class_of_a_sample(tmp_path):
    members = {
        "0.cls": b"10\n",
        "0.png": picture(0),
        "deep/1.png": picture(1),
        "deep/1.cls": b"9",
        "deep/2.png": picture(2),
        "./deep/er/3.png": picture(3),
        "4.png": picture(4),
        "4.json": b"{}",
        "4.mask.png": b"not the picture",
        "._4.png": b"what macOS leaves",
        "v1.0/5.PNG": picture(5),
        "v1.0/5.cls": "Äpfel".encode(),
        "6.png": picture(6),
    }
    pack(tmp_path / "x.tar", members)
    assert load(tmp_path)[1] == ("9", "10", "deep", "Äpfel")
    assert classes(tmp_path) == {0: "10", 1: "9", 2: "deep", 3: "deep", 4: None, 5: "Äpfel",
                                 6: None}  # fmt: skip


@pytest.mark.parametrize("leads", [True, False])
def test_pictures_that_are_no_samples_are_told_of(tmp_path, leads):
    members = {f"{n}.png": picture(n) for n in range(10)}
    masks = {f"img_{n}.7.PNG": picture(n) for n in range(12)}
    path, notes = pack(tmp_path / "x.tar", members | masks), []
    batches, _ = load(tmp_path, Reading(stream_above=-1, note=notes.append, leads=leads))
    assert sum(len(labels) for _, labels in batches) == 10
    if not leads:
        assert notes == []
        return
    (line,) = notes
    assert line.startswith("12 of the pictures in shards left out, with another dot in their name")
    assert line.endswith(f"{path}: img_9.7.PNG and 2 more")


def damage(path, how) -> None:
    whole = path.read_bytes()
    ends = whole.rindex(b"IEND")
    match how:
        case "in a picture":
            path.write_bytes(whole[: ends - 20])
        case "in a header":
            path.write_bytes(whole[: whole.rindex(b"9.png") + 300])
        case "after a picture":
            path.write_bytes(whole[: -(-ends // 512) * 512])
        case "a header":
            at = whole.rindex(b"9.png")
            path.write_bytes(whole[:at] + b"\1" * 512 + whole[at + 512 :])
        case "joined":
            path.write_bytes(whole + whole)
        case "empty":
            path.write_bytes(b"")
        case "no tar":
            path.write_bytes(b"nonsense" * 1000)
        case "compressed":
            path.write_bytes(gzip.compress(whole))
        case "bad class":
            pack(path, {"0.png": picture(0), "0.cls": b"\xff"})


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    "how",
    ["in a picture", "in a header", "after a picture", "a header", "joined", "empty", "no tar",
     "compressed", "bad class"],
)  # fmt: skip
def test_a_damaged_shard_is_named(tmp_path, how, skip):
    for name in "abc":
        path = pack(tmp_path / f"{name}.tar", {f"{n}.png": picture(n) for n in range(10)})
    damage(path, how)
    message = f"^{re.escape(str(path))}: cannot read this tar shard .*replace it"
    with pytest.raises(DataError, match=message):
        load(tmp_path, Reading(workers=2, skip_bad=skip))


def test_a_shard_without_pictures_is_named(tmp_path):
    paint(tmp_path, 10)
    path = pack(tmp_path / "x.tar", {"1.cls": b"1", "1.txt": b"a cat"})
    with pytest.raises(DataError, match=f"^{path}: no images in it; .* or KEY.tiff$"):
        load(tmp_path)
    pack(path, {"img.0.png": picture(0)})
    with pytest.raises(DataError, match=r"no images in it; .*, without the other dot in img\.0"):
        load(tmp_path)
