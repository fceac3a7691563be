"""Metrics of a model over a whole split."""

from dataclasses import dataclass

import torch
from torch import Tensor

from softvq import losses, metrics
from softvq.data import ImageSet
from softvq.models import SoftVQVAE

BATCH = 1000


@dataclass(frozen=True)
class SplitMetrics:
    """What `evaluate` counted over a split."""

    values: dict[str, float]  # by the names of the run folder's metrics
    counts: Tensor  # (K,) int64: how often each code was the nearest one


def to_pixels(images: Tensor, device: torch.device) -> Tensor:
    """uint8 (B, C, H, W) → float32 in [0, 1] on the device."""
    return images.to(device, non_blocking=True).float().div_(255)


def evaluate(model: SoftVQVAE, data: ImageSet, device: torch.device) -> SplitMetrics:
    """Every metric over the whole split. The model keeps the mode it was in."""
    was_training = model.training
    model.eval()
    codes = model.quantizer.codebook_size
    counts = torch.zeros(codes, dtype=torch.int64, device=device)
    means = metrics.Mean()
    for batch in data.images.split(BATCH):
        images = to_pixels(batch, device)
        seen = model.evaluate(images)
        counts += torch.bincount(seen.indices.flatten(), minlength=codes)
        errors = {
            "reconstruction_error": seen.reconstruction,
            "reconstruction_quantizing_error": seen.soft_reconstruction,
            "reconstruction_hard_error": seen.nearest_reconstruction,
        }
        values = {
            name: losses.reconstruction_error(output, images) for name, output in errors.items()
        }
        values["l1_hard"] = 2 * losses.reconstruction_error(
            seen.nearest_reconstruction, images, "absolute"
        )
        values["quantizing_error"] = seen.quantizing_error
        values["max_probability"] = seen.max_probability
        values["kl"] = seen.kl
        means.add(values, len(images))
    model.train(was_training)

    values = means.read()
    return SplitMetrics(
        values
        | {
            "codebook_usage": metrics.codebook_usage(counts),
            "perplexity": metrics.perplexity(counts),
            "psnr": metrics.psnr(values["reconstruction_error"]),
            "psnr_hard": metrics.psnr(values["reconstruction_hard_error"]),
        },
        counts.cpu(),
    )
