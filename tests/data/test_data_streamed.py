"""Pictures that are decoded when they are needed; and those that cannot be."""

import itertools
import multiprocessing
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from softvq.data import DataError, ImageSet, Reading, StreamedSet, load_data, streamed
from softvq.data.bad import NAMED
from softvq.data.workers import in_workers
from tests.launch import environment
from tests.pictures import BAD, pack, packed, paint, picture

CPU = torch.device("cpu")
COUNT = 40


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(streamed, "CHUNK", 3)


@pytest.fixture
def zoo(tmp_path):
    return paint(tmp_path / "zoo", COUNT)


def load(folder, *, stream=True, workers=0, skip=False, note=print, reading=None, **options):
    reading = Reading(-1 if stream else float("inf"), workers, skip, note, **reading or {})
    return load_data("folder", folder, reading=reading, **options)


def numbers(batch) -> list[int]:
    return batch.images[:, 0, 0, 0].tolist()


def whole(split):
    """All images of a split in one batch."""
    return next(split.load([torch.arange(len(split))], CPU))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("size", [None, (5, 4)])
def test_the_same_images_as_in_memory(zoo, workers, size):
    there = load(zoo, stream=False, workers=workers, image_size=size)
    streaming = load(zoo, workers=workers, image_size=size)
    assert there.image_shape == streaming.image_shape
    for one, other in zip(there[:3], streaming[:3], strict=True):
        assert isinstance(one, ImageSet) and isinstance(other, StreamedSet)
        assert torch.equal(one.labels, other.labels) and len(one) == len(other)
        assert one.images.nbytes == one.decoded_bytes == other.decoded_bytes
        batches = [torch.randint(len(one), (n,)) for n in (1, 7, 3, 20)]
        for a, b in zip(one.load(batches, CPU), other.load(batches, CPU), strict=True):
            assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
            assert b.images.is_contiguous() and b.images.dtype == torch.uint8


def test_a_selection_is_not_read(zoo, monkeypatch):
    train = load(zoo).train
    with monkeypatch.context() as patch:
        patch.setattr(StreamedSet, "_image", lambda *_: pytest.fail("read"))
        some = train.select(torch.tensor([5, 2, 9]))
    assert len(some) == 3 and isinstance(some, StreamedSet)
    assert numbers(whole(some)) == [numbers(whole(train))[i] for i in (5, 2, 9)]


def test_what_is_streamed_is_a_matter_of_bytes(zoo):
    size = load(zoo).train.decoded_bytes
    assert size == len(load(zoo).train) * 3 * 6 * 8
    assert not load_data("folder", zoo, reading=Reading(stream_above=size)).train.streamed
    assert load_data("folder", zoo, reading=Reading(stream_above=size - 1)).train.streamed


@pytest.mark.parametrize("workers", [0, 2])
def test_no_random_number_is_drawn(zoo, workers):
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())

    before = states()
    whole(load(zoo, workers=workers).train)
    assert states() == before


def test_a_signal_to_all_processes_is_for_the_first_one(zoo):
    train = load(zoo, workers=2).train
    others = multiprocessing.active_children()
    source = train.load(torch.arange(len(train)).split(4), CPU)
    found = numbers(next(source))
    processes = set(multiprocessing.active_children()).difference(others)
    assert len(processes) == 2
    for process, name in itertools.product(processes, ("INT", "TERM")):
        # Not from the parent.
        subprocess.run(["sh", "-c", f"kill -{name} {process.pid}"], check=True)
    for batch in source:
        found += numbers(batch)
    assert found == numbers(whole(train))


def test_a_program_may_end_before_its_data(zoo):
    code = (
        "import pathlib, torch; from softvq.data import Reading, load_data;"
        f"data = load_data('folder', pathlib.Path({str(zoo)!r}), reading=Reading(-1, 2));"
        "source = data.train.load(torch.arange(20).split(2), torch.device('cpu')); next(source)"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(), timeout=60, check=True)


def test_an_error_in_a_process_is_raised_as_it_is():
    def read(item):
        if item == 3:
            raise DataError("number 3 is bad")
        return item

    others = multiprocessing.active_children()
    source = in_workers(read, range(9), 2)
    assert [next(source) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match=r"^number 3 is bad$") as held:
        next(source)
    assert set(multiprocessing.active_children()) <= set(others), held  # all have ended


# Pictures that cannot be read.

FILES = ["a file", "in a shard"]


@pytest.fixture(params=FILES)
def place(request, zoo, tmp_path):
    """Puts a bad picture in the place of picture 7; returns the data and its name."""

    def put(kind):
        path = zoo / "ant" / "007.png"
        path.write_bytes(BAD[kind])
        if request.param == "a file":
            return zoo, str(path)
        shards = packed(zoo, tmp_path / "shards", 16)
        return shards, f"{shards / '00000.tar'}: ant/007.png"

    return put


def read_all(splits):
    return sorted(n for split in splits[:3] for n in numbers(whole(split)))


@pytest.mark.parametrize(("kind", "workers"), [*((kind, 0) for kind in BAD), ("torn", 2)])
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_picture_stops(place, kind, stream, workers):
    folder, name = place(kind)
    why = "more than 8 bits" if kind == "deep" else "cannot read this image"
    message = rf"^{re.escape(name)}: {why}.*repair or remove it; .*--on-bad-image skip$"
    if stream and kind == "torn":  # its header is good
        splits = load(folder, workers=workers)
        with pytest.raises(DataError, match=message):
            read_all(splits)
    else:
        with pytest.raises(DataError, match=message):
            load(folder, stream=stream, workers=workers)


@pytest.mark.parametrize(("kind", "workers"), [*((kind, 0) for kind in BAD), ("torn", 2)])
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_picture_is_left_out_with_one_line(place, kind, stream, workers):
    folder, name = place(kind)
    lines = []
    splits = load(folder, stream=stream, workers=workers, skip=True, note=lines.append)
    expected = [n for n in range(COUNT) if n != 7]
    found = read_all(splits)
    if stream and kind == "torn":
        assert set(found) == set(expected) and len(found) == COUNT
    else:
        assert found == expected
    read_all(splits)  # it is told once
    assert lines == [f"1 picture that cannot be read left out: {name}"]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_one_takes_its_place(zoo, workers):
    order = numbers(whole(load(zoo).train))
    for number in (order[4], order[5], order[-1]):
        label = "ant" if number < COUNT // 2 else "bee"
        (zoo / label / f"{number:03}.png").write_bytes(BAD["torn"])
    lines = []
    train = load(zoo, workers=workers, skip=True, note=lines.append).train
    everything = whole(train)
    order[4] = order[5] = order[6]
    order[-1] = order[0]
    assert numbers(everything) == order
    assert everything.labels.tolist() == [int(n >= COUNT // 2) for n in order]
    assert len(lines) == 1 and lines[0].startswith("3 pictures that cannot be read left out: ")


def test_one_line_in_each_epoch_with_news(zoo):
    lines = []
    order = numbers(whole(load(zoo).train))
    train = load(zoo, skip=True, note=lines.append).train
    batches = torch.arange(len(train)).split(4)
    source = train.load((batch for _ in range(3) for batch in batches), CPU)
    for bad in (order[:2], order[8:11], []):
        for number in bad:
            label = "ant" if number < COUNT // 2 else "bee"
            (zoo / label / f"{number:03}.png").write_bytes(BAD["torn"])
        for _ in batches:
            next(source)
    assert list(source) == []
    assert [line.split()[0] for line in lines] == ["2", "3"]


@pytest.mark.parametrize("stream", [False, True])
def test_what_all_processes_find_is_told_by_one(zoo, stream):
    order = numbers(whole(load(zoo).train))
    bad = {kind: f"{order[n]:03}.png" for n, kind in enumerate(("empty", "torn"))}
    for kind, name in bad.items():
        (path,) = zoo.glob(f"*/{name}")
        path.write_bytes(BAD[kind])
    told = {}
    for leads in (True, False):
        lines = told[leads] = []
        read_all(load(zoo, stream=stream, skip=True, note=lines.append, reading={"leads": leads}))
    if stream:  # each process decodes a part of its own
        assert [len(lines) for lines in told.values()] == [2, 1]
        assert told[False] == told[True][1:] and bad["torn"] in told[False][0]
    else:
        assert [len(lines) for lines in told.values()] == [1, 0]


def test_long_work_is_watched(zoo, monkeypatch):
    monkeypatch.setattr("softvq.data.shares.FILES", 4)
    monkeypatch.setattr("softvq.data.streamed.CHUNK", 8)
    seen = []

    def watch(items, number, what):
        found = list(items)
        seen.append((what, number, len(found)))
        return found

    load(zoo, stream=False, reading={"watch": watch})
    looking, *decoding = seen
    assert looking == ("looking at pictures", COUNT // 4, COUNT // 4)
    assert len(decoding) == 3
    for what, number, found in decoding:
        assert what == "decoding pictures" and number == found


def test_all_are_named_in_one_go(zoo):
    paths = sorted(zoo.rglob("*.png"))
    for path in paths[:2]:
        path.write_bytes(b"")
    with pytest.raises(DataError) as caught:
        load(zoo)
    assert all(str(path) in str(caught.value) for path in paths[:2])
    assert "\n" not in str(caught.value)
    for path in paths[: NAMED + 3]:
        path.write_bytes(b"")
    with pytest.raises(
        DataError, match="and 3 more; repair or remove them; softvq train leaves them out"
    ):
        load(zoo)


@pytest.mark.parametrize("stream", [False, True])
def test_nothing_but_bad_pictures(tmp_path, stream):
    folder = paint(tmp_path, 20)
    for path in folder.rglob("*.png"):
        path.write_bytes(BAD["empty"])
    with pytest.raises(DataError, match=f"^{folder}: none of the images there can be read"):
        load(folder, stream=stream, skip=True)
    for path in folder.rglob("*.png"):
        path.write_bytes(BAD["torn"])
    with pytest.raises(DataError, match="neither this image nor any other of its split"):
        read_all(load(folder, stream=stream, skip=True, note=str))


def test_a_second_folder_of_nothing_but_bad_pictures(tmp_path):
    paint(tmp_path / "train", 20)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "x.png").write_bytes(BAD["empty"])
    message = f"^{tmp_path / 'test'}: none of the images there can be read"
    with pytest.raises(DataError, match=message):
        load(tmp_path, skip=True)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize(
    ("orientation", "corner"), [(5, (0, -1)), (6, (0, 0)), (7, (-1, 0)), (8, (-1, -1))]
)
def test_pictures_are_turned_upright(tmp_path, suffix, orientation, corner):
    """corner: where the one at the bottom left comes to be."""
    for number in range(20):
        image = Image.new("RGB", (8, 16))
        image.paste((255, 255, 255), (0, 12, 4, 16))
        exif = image.getexif()
        exif[0x0112] = orientation
        image.save(tmp_path / f"{number}.{suffix}", exif=exif)
    there, streaming = load(tmp_path, stream=False), load(tmp_path)
    assert there.image_shape == streaming.image_shape == (3, 8, 16)
    assert torch.equal(whole(streaming.train).images, there.train.images)
    corners = [(0, 0), (0, -1), (-1, 0), (-1, -1)]
    seen = [place for place in corners if there.train.images[(0, 0, *place)] > 200]
    assert seen == [corner]


@pytest.mark.parametrize("skip", [False, True])
def test_another_size_is_refused_at_the_start(zoo, skip):
    path = zoo / "bee" / "z.png"
    path.write_bytes(picture(1, (6, 7)))
    with pytest.raises(DataError, match=f"^{path}: 6x7 pixels, but .* has 6x8 .*--image-size"):
        load(zoo, skip=skip)
    assert load(zoo, image_size=(6, 8)).image_shape == (3, 6, 8)


def test_a_picture_that_changed_since(zoo):
    splits = load(zoo)
    number = numbers(whole(splits.train))[0]
    path = zoo / ("ant" if number < COUNT // 2 else "bee") / f"{number:03}.png"
    path.write_bytes(picture(1, (3, 3)))
    with pytest.raises(
        DataError, match=f"^{path}: 3 channels of 3x3, but its header says 3 of 6x8"
    ):
        whole(splits.train)
    path.unlink()
    with pytest.raises(DataError, match=f"^{path}: cannot read this image"):
        whole(splits.train)


def test_a_shard_that_is_gone(tmp_path):
    path = pack(tmp_path / "x.tar", {f"{n}.png": picture(n) for n in range(20)})
    splits = load(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=rf"^{path}: \d+.png: cannot read this image"):
        whole(splits.train)
