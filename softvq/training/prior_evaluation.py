"""Metrics of a prior over the codes of a trained model."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from softvq import metrics
from softvq.data import DataSplits
from softvq.models import CodePrior, ImageModel, level_suffix
from softvq.training.codes import CodeSet, CodeSplits
from softvq.training.evaluation import batch_size
from softvq.training.likelihood import (
    bits_per_dimension,
    discretised_logistic_log_likelihood,
    fit_scales,
    order0_bits_per_latent,
)
from softvq.training.ranks import from_all, share_of


@torch.no_grad()
def code_metrics(
    model: CodePrior, data: CodeSet, size: int, device: torch.device
) -> dict[str, float]:
    """Bits per latent over a whole split of codes, the same bits however many ranks share it.

    size: of the batches. The model keeps the mode it was in.
    """
    was_training = model.training
    model.eval()
    batches = torch.arange(len(data)).split(size)
    results = []
    for batch in share_of(batches):
        codes, labels = data.batch(batch)
        codes = {name: grid.to(device) for name, grid in codes.items()}
        results.append(model(codes, labels.to(device)))
    model.train(was_training)
    means = metrics.Mean()
    for result, batch in zip(from_all(results), batches, strict=True):
        means.add(result, len(batch))
    values = means.read()
    del values["loss"]
    return values


def prior_metrics(
    model: CodePrior,
    tokenizer: ImageModel,
    images: DataSplits,
    data: CodeSplits,
    split: str,
    device: torch.device,
) -> dict[str, float]:
    """Bits per latent of a split, what simpler models of it take, and bits per dimension.

    bits_per_dim is −log₂ p(class) p(codes | class) p(image | codes) per pixel and channel, a bound
    of −log₂ p(image): classes are even, the image is a discretised logistic around its decoded
    codes, of the scales that fit the validation images best.
    """
    codes: CodeSet = getattr(data, split)
    values = code_metrics(model, codes, batch_size(images.image_shape), device)
    for name, level in data.levels.items():
        size = level.codebook_size
        order0 = order0_bits_per_latent(data.train.codes[name], codes.codes[name], size)
        values[f"order0_bits_per_latent{level_suffix(name)}"] = order0
        values[f"uniform_bits_per_latent{level_suffix(name)}"] = math.log2(size)

    pixels = math.prod(images.image_shape)
    scales = fit_scales(_decoded(tokenizer, images, data, "validation", device))
    nats = torch.cat(
        [
            discretised_logistic_log_likelihood(output, batch, scales)
            for output, batch in _decoded(tokenizer, images, data, split, device)
        ]
    )
    image_bits = bits_per_dimension(nats, pixels).mean().item()
    code_bits = values["bits_per_latent"] * model.latents + math.log2(max(1, model.classes))
    values["bits_per_dim"] = image_bits + code_bits / pixels
    values["bits_per_dim_of_codes"] = code_bits / pixels
    return values


@torch.no_grad()
def _decoded(
    tokenizer: ImageModel, images: DataSplits, data: CodeSplits, split: str, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """(decoded codes (B, C, H, W), images (B, C, H, W) uint8) of a split, batch by batch."""
    codes: CodeSet = getattr(data, split)
    batches = torch.arange(len(codes)).split(batch_size(images.image_shape))
    pictures = getattr(images, split).load(batches, device)
    for chosen, (batch, _) in zip(batches, pictures, strict=True):
        grids = {name: grid.to(device) for name, grid in codes.batch(chosen)[0].items()}
        yield tokenizer.decode_indices(grids), batch
