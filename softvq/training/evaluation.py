"""Metrics of a model of images over a whole split."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from softvq import losses, metrics
from softvq.data import Images
from softvq.distributed.collectives import sum_over_replicas
from softvq.models import ImageModel, level_suffix
from softvq.training.ranks import from_all, share_of

BATCH, VALUES = 1000, 2**22  # the most images, and values of them, that are looked at together
# The histogram of the counts, cumulated: the suffix of a metric, and the share of even use it asks.
SHARES = {"": 0.0, "_quarter": 0.25, "_double": 2.0}


@dataclass(frozen=True)
class SplitMetrics:
    """What `evaluate` counted over a split."""

    values: dict[str, float]  # by the names of the run folder's metrics
    counts: dict[str, Tensor]  # (K,) int64 by level: how often each code was the nearest one


def batch_size(image_shape: tuple[int, int, int]) -> int:
    """How many images (C, H, W) are looked at together, whatever the number to train on."""
    return max(1, min(BATCH, VALUES // math.prod(image_shape)))


def in_batches(
    function: Callable[[Tensor], Tensor], items: Tensor, image_shape: tuple[int, int, int]
) -> Tensor:
    """What the function makes of the items (n, ...), some (n, C, H, W) images, of a few at once."""
    return torch.cat([function(part) for part in items.split(batch_size(image_shape))])


def to_pixels(images: Tensor, device: torch.device) -> Tensor:
    """uint8 (B, C, H, W) → float32 in [0, 1] on the device."""
    return images.to(device, non_blocking=True).float().div_(255)


def evaluate(model: ImageModel, data: Images, device: torch.device) -> SplitMetrics:
    """Every metric over the whole split, the same bits however many ranks share it.

    The model keeps the mode it was in.
    """
    was_training = model.training
    model.eval()
    counts = {
        level: torch.zeros(quantizer.codebook_size, dtype=torch.int64, device=device)
        for level, quantizer in model.quantizers.items()
    }
    batches = torch.arange(len(data)).split(batch_size(data.image_shape))
    results = []
    for batch in data.load(share_of(batches), device):
        images = to_pixels(batch.images, device)
        seen = model.evaluate(images, batch.labels)
        for level, indices in seen.indices.items():
            counts[level] += torch.bincount(indices.flatten(), minlength=len(counts[level]))
        values = seen.values | {
            name: losses.reconstruction_error(output, images)
            for name, output in seen.outputs.items()
        }
        hard = seen.outputs.get("reconstruction_hard_error")
        if hard is not None:
            values["l1_hard"] = 2 * losses.reconstruction_error(hard, images, "absolute")
        results.append(values)
    model.train(was_training)

    means = metrics.Mean()
    for values, batch in zip(from_all(results), batches, strict=True):
        means.add(values, len(batch))
    values = means.read()
    values["psnr"] = metrics.psnr(values["reconstruction_error"])
    if "reconstruction_hard_error" in values:
        values["psnr_hard"] = metrics.psnr(values["reconstruction_hard_error"])
    counts = {level: sum_over_replicas(count) for level, count in counts.items()}
    for level, count in counts.items():
        suffix = level_suffix(level)
        for name, share in SHARES.items():
            values[f"codebook_usage{name}{suffix}"] = metrics.codebook_usage(count, share)
        values[f"perplexity{suffix}"] = metrics.perplexity(count)
    return SplitMetrics(values, {level: count.cpu() for level, count in counts.items()})
