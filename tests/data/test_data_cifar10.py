"""CIFAR-10 through torchvision's own reader, on tiny batches with their true checksums."""

import hashlib
import pickle
import sys
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchvision import datasets
from torchvision.datasets import cifar

from softvq.data import DataError, load_data

NAMES = [f"class {number}" for number in range(10)]


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A cifar-10-batches-py of 20 training and 10 test images.

    Red is the image's number, green the row, blue the column.
    """
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    def dump(name: str, content: dict) -> str:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    def batch(first: int) -> dict:
        numbers = np.arange(first, first + 10, dtype=np.uint8)
        images = np.empty((10, 3, 32, 32), np.uint8)
        images[:, 0] = numbers[:, None, None]
        images[:, 1], images[:, 2] = np.indices((32, 32))
        return {"data": images.reshape(10, -1), "labels": (numbers % 10).tolist()}

    train = [[name, dump(name, batch(i * 10))] for i, name in enumerate(["one", "two"])]
    test = [["test", dump("test", batch(100))]]
    meta = {"filename": "meta", "key": "label_names", "md5": dump("meta", {"label_names": NAMES})}
    monkeypatch.setattr(datasets.CIFAR10, "train_list", train)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", test)
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)

    def fetch(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr(cifar, "download_and_extract_archive", fetch)
    return tmp_path


@pytest.mark.parametrize("download", [False, True])
def test_reads_what_is_there(root, download):
    splits = load_data("cifar10", root, download=download)
    assert splits.image_shape == (3, 32, 32)
    assert splits.class_names == tuple(NAMES)
    assert [len(part) for part in splits[:3]] == [18, 2, 10]
    seen = torch.cat([splits.train.images, splits.validation.images])[:, 0, 0, 0]
    assert sorted(seen.tolist()) == list(range(20))
    for part in splits[:3]:
        assert part.images.dtype == torch.uint8
        assert part.labels.dtype == torch.int64
        assert part.labels.tolist() == (part.images[:, 0, 5, 7] % 10).tolist()
        assert part.images[0, 1:, 5, 7].tolist() == [5, 7]


@pytest.mark.parametrize("name", ["two", "test", "meta"])
@pytest.mark.parametrize("download", [False, True])
def test_damaged_or_missing_file(root, name, download):
    path = root / "cifar-10-batches-py" / name
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(DataError, match=f"{root}: cannot get cifar10.*cifar-10-batches-py"):
        load_data("cifar10", root, download=download)
    path.unlink()
    with pytest.raises(DataError, match=f"{root}: cannot get cifar10.*--data-dir"):
        load_data("cifar10", root, download=download)


def test_no_network(root):
    with pytest.raises(DataError, match="no route to host") as caught:
        load_data("cifar10", root / "empty")
    assert str(caught.value).startswith(f"{root / 'empty'}: cannot get cifar10")
    assert "\n" not in str(caught.value)


def test_without_torchvision(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(DataError, match=r"cifar10: needs torchvision.*install"):
        load_data("cifar10", tmp_path)
