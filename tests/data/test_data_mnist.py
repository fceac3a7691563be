"""The MNIST family: idx files, where they are looked for, and their download."""

import gzip
import struct
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchvision.datasets import mnist as torchvision_mnist

from softvq.data import DataError, load_data
from softvq.data.mnist import FILES

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = FILES
REAL = Path("/usr/share/datasets/fashion-mnist")


def idx_bytes(array: np.ndarray) -> bytes:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def contents() -> dict[str, bytes]:
    """40 training and 10 test images of 3x4 pixels; image i is filled with i and has label i % 10.

    Test images go on from 100.
    """
    files = {}
    for prefix, first, count in (("train", 0, 40), ("t10k", 100, 10)):
        numbers = np.arange(first, first + count)
        images = np.broadcast_to(numbers[:, None, None], (count, 3, 4))
        files[f"{prefix}-images-idx3-ubyte"] = idx_bytes(images)
        files[f"{prefix}-labels-idx1-ubyte"] = idx_bytes(numbers % 10)
    return files


def write(folder: Path, *, compressed: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in contents().items():
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(data))
        else:
            (folder / name).write_bytes(data)
    return folder


def check(splits) -> None:
    assert splits.image_shape == (1, 3, 4)
    assert splits.test.images[:, 0, 0, 0].tolist() == list(range(100, 110))
    seen = torch.cat([splits.train.images, splits.validation.images])[:, 0, 0, 0]
    assert sorted(seen.tolist()) == list(range(40))
    for part in splits[:3]:
        assert part.labels.tolist() == (part.images[:, 0, 0, 0] % 10).tolist()
        assert (part.images == part.images[:, :, :1, :1]).all()


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("name", "below"),
    [
        ("mnist", "."),
        ("fashion-mnist", "."),
        ("mnist", "MNIST/raw"),
        ("fashion-mnist", "FashionMNIST/raw"),
    ],
)
def test_reads_both_layouts_plain_and_compressed(tmp_path, name, below, compressed):
    write(tmp_path / below, compressed=compressed)
    check(load_data(name, tmp_path, download=False))


def test_class_names(tmp_path):
    write(tmp_path)
    assert load_data("mnist", tmp_path).class_names == tuple("0123456789")
    names = load_data("fashion-mnist", tmp_path).class_names
    assert list(names) == torchvision_mnist.FashionMNIST.classes


def test_default_folder_is_data(tmp_path, monkeypatch):
    write(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    check(load_data("mnist", download=False))


def test_local_files_need_no_torchvision(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    check(load_data("mnist", write(tmp_path)))


@pytest.mark.parametrize("missing", FILES)
def test_missing_file_is_named(tmp_path, missing):
    (write(tmp_path) / missing).unlink()
    with pytest.raises(DataError, match=f"{tmp_path}: {missing} .* missing"):
        load_data("mnist", tmp_path)


def test_nothing_there_and_no_download(tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path}: no mnist there.*{TRAIN_IMAGES}.*--data-dir"):
        load_data("mnist", tmp_path, download=False)


GOOD_IMAGES = contents()[TRAIN_IMAGES]


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        (TRAIN_IMAGES, GOOD_IMAGES[:-1], "announces 40x3x4 = 480 bytes but has 479"),
        (TRAIN_IMAGES, GOOD_IMAGES + b"\0", "announces 40x3x4 = 480 bytes but has 481"),
        (TRAIN_IMAGES, GOOD_IMAGES[:9], "is not an idx file"),
        (TRAIN_IMAGES, b"", "is not an idx file"),
        (TRAIN_IMAGES, b"<html>" + GOOD_IMAGES, "is not an idx file"),
        (TRAIN_IMAGES, b"\0\0\x0d\x03" + GOOD_IMAGES[4:], "has value type 0x0d"),
        (TRAIN_IMAGES, contents()[TEST_LABELS] * 2, "has 1 dimensions instead of 3"),
        (TRAIN_IMAGES, idx_bytes(np.zeros((0, 3, 4))), "holds no values"),
        (TRAIN_LABELS, idx_bytes(np.zeros(39)), "39 labels for the 40 images"),
        (TEST_LABELS, idx_bytes(np.arange(1, 11)), "label 10 is not in 0..9"),
        (TEST_IMAGES, idx_bytes(np.zeros((10, 4, 4))), "its images have another size"),
    ],
)
def test_bad_contents(tmp_path, name, data, problem):
    path = write(tmp_path) / name
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        load_data("mnist", tmp_path)
    assert str(caught.value).startswith(f"{path}: {problem}")


def damage_checksum(data: bytes) -> bytes:
    return data[:-8] + bytes([data[-8] ^ 1]) + data[-7:]


def damage_stream(data: bytes) -> bytes:
    return data[:10] + b"\xff" * 10 + data[20:]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[: len(data) // 2], "ended before"),
        (damage_checksum, "CRC"),
        (damage_stream, "invalid"),
        (lambda data: b"not gzip" + data, "Not a gzipped file"),
    ],
    ids=["truncated", "checksum", "stream", "not-gzip"],
)
def test_bad_gzip(tmp_path, damage, reason):
    path = write(tmp_path, compressed=True) / f"{TRAIN_IMAGES}.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError) as caught:
        load_data("mnist", tmp_path)
    assert str(caught.value).startswith(f"{path}: cannot be read")
    assert reason in str(caught.value)


@pytest.fixture
def network(monkeypatch):
    """Replaces what torchvision fetches a file with; returns the set of files "on the network"."""
    online = {f"{name}.gz" for name in FILES}

    def fetch(url, download_root, filename, md5):
        if filename not in online:
            Path(download_root, filename).write_bytes(b"half a fi")
            raise URLError("no route to host")
        data = contents()[filename.removesuffix(".gz")]
        Path(download_root, filename).write_bytes(gzip.compress(data))
        Path(download_root, filename.removesuffix(".gz")).write_bytes(data)

    monkeypatch.setattr(torchvision_mnist, "download_and_extract_archive", fetch)
    return online


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")]
)
def test_download_goes_to_torchvisions_layout(tmp_path, network, name, folder):
    check(load_data(name, tmp_path / "new"))
    files = (tmp_path / "new").rglob("*idx*")
    assert {path.parent for path in files} == {tmp_path / "new" / folder / "raw"}

    network.clear()  # What was downloaded is read from now on.
    check(load_data(name, tmp_path / "new"))


def test_failed_download_is_one_line_and_leaves_nothing(tmp_path, network):
    network.discard(f"{TEST_IMAGES}.gz")
    with pytest.raises(DataError) as caught:
        load_data("mnist", tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: cannot get mnist")
    assert "no route to host" in message
    assert TRAIN_IMAGES in message
    assert "--data-dir" in message
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == []

    network.add(f"{TEST_IMAGES}.gz")
    check(load_data("mnist", tmp_path))


def test_data_dir_that_cannot_be_made(tmp_path, network):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=f"{tmp_path / 'file'}: cannot get mnist"):
        load_data("mnist", tmp_path / "file")


def test_download_without_torchvision(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(DataError, match=r"fashion-mnist: needs torchvision.*install"):
        load_data("fashion-mnist", tmp_path)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real Fashion-MNIST in {REAL}")
def test_real_fashion_mnist():
    splits = load_data("fashion-mnist", REAL, download=False)
    assert splits.image_shape == (1, 28, 28)
    assert [len(part) for part in splits[:3]] == [54000, 6000, 10000]
    labels = torch.cat([splits.train.labels, splits.validation.labels])
    assert labels.bincount().tolist() == [6000] * 10
    assert splits.test.labels.bincount().tolist() == [1000] * 10
    # The mean and deviation commonly published for its training images.
    pixels = torch.cat([splits.train.images, splits.validation.images]).float() / 255
    assert pixels.mean().item() == pytest.approx(0.2860, abs=1e-3)
    assert pixels.std().item() == pytest.approx(0.3530, abs=1e-3)
