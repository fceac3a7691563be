"""Bringing images to one size."""

import torch
from torch import Tensor
from torch.nn import functional as F


def fit(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize the shorter side (antialiased) and centre-crop.

    images: (N, C, h, w) uint8; size: (H, W); returns (N, C, H, W) uint8.
    """
    height, width = images.shape[-2:]
    if (height, width) == size:
        return images
    # Cropping to the wanted aspect ratio first never enlarges what is thrown away afterwards.
    crop_height = min(height, max(1, round(width * size[0] / size[1])))
    crop_width = min(width, max(1, round(height * size[1] / size[0])))
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    cropped = images[..., top : top + crop_height, left : left + crop_width]
    # In batches, because the float copy takes four times the memory of the images.
    resized = [
        F.interpolate(batch.float(), size, mode="bilinear", antialias=True).round().byte()
        for batch in cropped.split(1024)
    ]
    return torch.cat(resized)
