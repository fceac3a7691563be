"""The 8x8 handwritten digits that come with scikit-learn."""

import numpy as np
import torch

from softvq.data.types import ImageSet, Source


def load_digits() -> Source:
    """1797 grey 8x8 images, their values 0..16 scaled to 0..255; a fixed 20 % are for testing."""
    from sklearn import datasets, model_selection

    digits = datasets.load_digits()
    images = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))[:, None]
    data = ImageSet(images, torch.from_numpy(digits.target).long())
    train, test = model_selection.train_test_split(
        torch.arange(len(data)), test_size=0.2, stratify=digits.target, random_state=0
    )
    return Source(data.select(train), data.select(test), tuple("0123456789"))
