"""CIFAR-10, read and verified by torchvision."""

from pathlib import Path

import torch

from softvq.data.download import explained, torchvision_datasets
from softvq.data.types import ImageSet, Source


def load_cifar10(root: Path, *, download: bool) -> Source:
    """CIFAR-10 from root/cifar-10-batches-py, downloaded first if it is allowed and needed.

    Raises DataError when torchvision is missing, the download fails or a checksum is wrong.
    """
    datasets = torchvision_datasets("cifar10")
    with explained("cifar10", root, "an intact folder cifar-10-batches-py"):
        train = datasets.CIFAR10(root, train=True, download=download)
        test = datasets.CIFAR10(root, train=False)

    train_set, test_set = (
        ImageSet(
            torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(),
            torch.tensor(part.targets),
        )
        for part in (train, test)
    )
    return Source(train_set, test_set, tuple(train.classes))
