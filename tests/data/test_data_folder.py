"""Folders of pictures, and single pictures."""

import errno
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from softvq.data import DataError, Reading, find_images, load_data, load_images


def save(path: Path, value: int = 0, *, size=(6, 4), mode: str = "L") -> Path:
    """A picture of one value; size is (width, height), as Pillow has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 10, 20)).save(path)
    return path


def values(part) -> list[int]:
    return part.images[:, 0, 0, 0].tolist()


@pytest.fixture
def zoo(tmp_path) -> Path:
    """30 pictures of value i: 0..9 ants, 10..19 bees (one folder deeper), 20..29 at the top."""
    for number in range(10):
        save(tmp_path / "ant" / f"{number}.png", number)
        save(tmp_path / "bee" / "deeper" / f"{number}.png", number + 10)
        save(tmp_path / f"{number}.png", number + 20)
    return tmp_path


def test_one_folder_is_split_and_labelled(zoo):
    splits = load_data("folder", zoo, validation_fraction=0.25)
    assert splits.image_shape == (1, 4, 6)
    assert splits.class_names == ("ant", "bee")
    assert [len(part) for part in splits[:3]] == [18, 6, 6]
    assert sorted(value for part in splits[:3] for value in values(part)) == list(range(30))
    for part in splits[:3]:
        assert part.labels.tolist() == [[0, 1, -1][value // 10] for value in values(part)]


def test_seed_picks_validation_only(zoo):
    first, again, other = (load_data("folder", zoo, seed=seed) for seed in (0, 0, 1))
    assert values(first.validation) == values(again.validation)
    assert values(first.train) == values(again.train)
    assert values(first.validation) != values(other.validation)
    assert values(first.test) == values(again.test) == values(other.test)


def test_own_train_and_test_folders(tmp_path):
    for number in range(10):
        save(tmp_path / "train" / "b" / f"{number}.png", number)
    save(tmp_path / "test" / "a" / "x.png", 100)
    save(tmp_path / "test" / "b" / "x.png", 101)
    splits = load_data("folder", tmp_path)
    assert splits.class_names == ("a", "b")
    assert values(splits.test) == [100, 101]
    assert splits.test.labels.tolist() == [0, 1]
    assert sorted(values(splits.train) + values(splits.validation)) == list(range(10))
    assert len(splits.validation) == 1


@pytest.mark.parametrize("name", ["validation", "val"])
def test_own_validation_folder(tmp_path, name):
    for value, folder in enumerate(["train", "test", name]):
        save(tmp_path / folder / "x.png", value)
    splits = load_data("folder", tmp_path)
    assert [values(part) for part in splits[:3]] == [[0], [2], [1]]
    assert splits.class_names == ()
    assert splits.validation.labels.tolist() == [-1]


def test_train_without_test(tmp_path):
    save(tmp_path / "train" / "x.png")
    with pytest.raises(DataError, match=f"{tmp_path}: has a folder 'train' but no folder 'test'"):
        load_data("folder", tmp_path)


def test_empty_test_folder(tmp_path):
    save(tmp_path / "train" / "x.png")
    (tmp_path / "test").mkdir()
    with pytest.raises(DataError, match=f"{tmp_path / 'test'}: no images there"):
        load_data("folder", tmp_path)


def test_too_few_images_to_split(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    with pytest.raises(DataError, match=r"test split .* from 2 images"):
        load_data("folder", tmp_path)


def test_one_colour_image_makes_all_rgb(zoo):
    save(zoo / "ant" / "0.png", 77, mode="RGB")
    splits = load_data("folder", zoo)
    assert splits.image_shape == (3, 4, 6)
    images = torch.cat([part.images for part in splits[:3]])
    colour = images[:, 0, 0, 0] == 77
    assert images[colour][0, :, 0, 0].tolist() == [77, 10, 20]
    grey = images[~colour]
    assert len(grey) == 29
    assert (grey == grey[:, :1]).all()


def test_another_size_names_file_sizes_and_option(zoo):
    path = save(zoo / "bee" / "z.png", size=(5, 4))
    with pytest.raises(DataError, match=r"4x5 pixels, but .* has 4x6 .*--image-size") as caught:
        load_data("folder", zoo)
    assert str(caught.value).startswith(f"{path}: ")


def test_image_size_brings_all_to_one_size(zoo):
    save(zoo / "bee" / "z.png", size=(50, 40))
    splits = load_data("folder", zoo, image_size=(8, 8))
    assert splits.image_shape == (1, 8, 8)
    assert sum(map(len, splits[:3])) == 31


def test_no_data_dir():
    with pytest.raises(DataError, match=r"folder: needs .*--data-dir"):
        load_data("folder")


def test_no_such_folder(tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path / 'x'}: no such folder"):
        load_data("folder", tmp_path / "x")


def test_no_images(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=f"{tmp_path}: no images there"):
        load_data("folder", tmp_path)


@pytest.mark.parametrize("content", [b"", b"nonsense", "half"])
def test_unreadable_image_is_named(zoo, content):
    path = zoo / "ant" / "0.png"
    content = path.read_bytes()[:-20] if content == "half" else content
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path}: cannot read this image"):
        load_data("folder", zoo)


def test_deep_image_is_refused(zoo):
    path = zoo / "ant" / "0.png"
    Image.fromarray(np.full((4, 6), 4000, np.uint16)).save(path)
    with pytest.raises(DataError, match=f"{path}: more than 8 bits"):
        load_data("folder", zoo)


def test_find_images_knows_formats_and_skips_the_rest(tmp_path):
    names = ["a.PNG", "b.jpg", "c.jpeg", "d.bmp", "e.webp", "f.tif", "sub/g.tiff"]
    wanted = [save(tmp_path / name) for name in names]
    for name in ["notes.txt", "._a.png", ".hidden/h.png"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert find_images(tmp_path) == wanted
    assert load_images(wanted, (1, 4, 6)).shape == (7, 1, 4, 6)


@pytest.mark.parametrize("reading", [Reading(), Reading(stream_above=-1, workers=2)])
def test_links_to_folders_are_followed(zoo, tmp_path_factory, reading):
    linked = tmp_path_factory.mktemp("linked")
    (linked / "bee").symlink_to(zoo / "bee")
    (linked / "wasp").symlink_to(zoo / "ant")
    splits = load_data("folder", linked, reading=reading)
    assert splits.class_names == ("bee", "wasp")
    found = [list(part.load([torch.arange(len(part))], torch.device("cpu"))) for part in splits[:3]]
    found = {
        (int(image[0, 0, 0]), splits.class_names[label])
        for ((images, labels),) in found
        for image, label in zip(images, labels, strict=True)
    }
    assert found == {(n, "wasp" if n < 10 else "bee") for n in range(20)}


def test_links_that_lead_back_are_not_followed(zoo, monkeypatch):
    wanted = find_images(zoo)
    (zoo / "ant" / "all").symlink_to(zoo)
    (zoo / "bee" / "deeper" / "up").symlink_to("..")
    (zoo / "above").symlink_to(zoo.parent)
    assert find_images(zoo) == wanted
    monkeypatch.chdir(zoo)
    assert len(find_images(Path("bee"))) == 10
    (zoo / "ant" / "all").unlink()
    (zoo / "ant" / "bees").symlink_to(zoo / "bee")
    (zoo / "bee" / "ants").symlink_to(zoo / "ant")
    assert len(find_images(zoo)) == len(wanted) + 20  # each once more, and not again


def test_a_folder_that_may_not_be_read_is_not_passed_over(zoo, monkeypatch):
    look = os.scandir

    def scandir(path):
        if Path(path) == zoo / "bee":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return look(path)

    monkeypatch.setattr(os, "scandir", scandir)
    message = rf"^{zoo / 'bee'}: cannot be looked through \(Permission denied\)"
    with pytest.raises(DataError, match=message):
        load_data("folder", zoo)


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (2, "test split of 0.2 from 2 images .* add some to {}, or make folders 'train' and"),
        (4, "validation split of 0.1 from 3 images .* another --validation-fraction"),
    ],
)
def test_too_few_images_for_a_split(tmp_path, count, message):
    for number in range(count):
        save(tmp_path / f"{number}.png")
    with pytest.raises(DataError, match=message.format(tmp_path)):
        load_data("folder", tmp_path)


def test_one_picture_is_not_advised_another_fraction(tmp_path):
    for split in ("train", "test"):
        save(tmp_path / split / "only.png")
    with pytest.raises(DataError, match=r"from 1 image.*give more$"):
        load_data("folder", tmp_path)


def test_a_large_picture_is_read_without_a_warning(tmp_path, monkeypatch):
    path = save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6 * 4 - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_images([path], (1, 4, 6))


def test_load_images_converts_channels_and_keeps_order(tmp_path):
    grey = save(tmp_path / "grey.png", 50)
    colour = save(tmp_path / "colour.png", 200, mode="RGB")
    rgb = load_images([colour, grey], (3, 4, 6))
    assert rgb.dtype == torch.uint8
    assert rgb[:, :, 3, 5].tolist() == [[200, 10, 20], [50, 50, 50]]
    luma = round(0.299 * 200 + 0.587 * 10 + 0.114 * 20)
    assert load_images([colour, grey], (1, 4, 6))[:, 0, 0, 0].tolist() == [luma, 50]


def test_load_images_names_the_wrong_size(tmp_path):
    good, bad = save(tmp_path / "a.png"), save(tmp_path / "b.png", size=(4, 6))
    message = re.escape(f"{bad}: 6x4 pixels, expected 4x6")
    with pytest.raises(DataError, match=message):
        load_images([good, bad], (1, 4, 6))


def test_load_images_names_a_missing_file(tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path / 'x.png'}: cannot read this image"):
        load_images([tmp_path / "x.png"], (1, 4, 6))


def test_pictures_are_turned_upright(tmp_path):
    image = Image.new("L", (8, 16))
    image.paste(255, (0, 8, 8, 16))  # Black above white.
    exif = image.getexif()
    exif[0x0112] = 6  # Orientation: to be shown turned a quarter clockwise.
    image.save(tmp_path / "x.png", exif=exif)
    upright = load_images([tmp_path / "x.png"], (1, 8, 16))
    assert upright[0, 0].tolist() == [[255] * 8 + [0] * 8] * 8
