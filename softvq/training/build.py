"""From a configuration to a model and its data."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from softvq.data import DataSplits, Reading, load_data
from softvq.data.watch import Watch, unwatched
from softvq.models import (
    VQVAE,
    VQVAE2,
    Autoencoder,
    CodeLevel,
    CodePrior,
    ImageModel,
    LossWeights,
    Networks,
    SoftVQVAE,
)
from softvq.models.networks import halved
from softvq.quantizers import EMAVQ, VQ, GumbelVQ, Quantizer, SoftVQ
from softvq.training import machine
from softvq.training.config import MOST_WORKERS, STREAM_ABOVE, TrainConfig, size_pair
from softvq.training.families import CONTINUOUS, PRIOR
from softvq.training.ranks import is_first
from softvq.training.settings import ConfigError
from softvq.training.warn import warn


def build_data(config: TrainConfig, watch: Watch = unwatched) -> DataSplits:
    """The splits of images the configuration names. Raises DataError."""
    cuda = config.device != "cpu" and torch.cuda.is_available()
    memory = machine.memory(torch.device("cuda" if cuda else "cpu"))
    limits = {"on": -1, "auto": STREAM_ABOVE * memory, "off": math.inf}
    skip, workers = config.on_bad_image == "skip", worker_count(config)
    return load_data(
        config.data,
        config.data_dir,
        seed=config.seed,
        validation_fraction=config.validation_fraction,
        image_size=config.image_size_pair,
        reading=Reading(limits[config.stream], workers, skip, warn, leads=is_first(), watch=watch),
    )


def worker_count(config: TrainConfig) -> int:
    """How many processes decode pictures."""
    return min(MOST_WORKERS, machine.cores()) if config.workers is None else config.workers


def build_model(config: TrainConfig, shape: Mapping[str, Any]) -> nn.Module:
    """An untrained model, on the CPU. `config` must be resolved. Raises ConfigError.

    Its convolutions have their channels last, which both CPUs and GPUs multiply faster.
    shape: what the data make of it, as the two builders below need it.
    """
    build = build_prior if config.model in PRIOR else build_image_model
    return build(config, shape).to(memory_format=torch.channels_last)


def build_prior(config: TrainConfig, shape: Mapping[str, Any]) -> CodePrior:
    """An untrained prior. shape: levels, name → ((h, w), K), and classes."""
    return CodePrior(
        {name: CodeLevel(tuple(grid), size) for name, (grid, size) in shape["levels"].items()},
        classes=shape["classes"],
        width=config.width,
        layers=config.layers,
        dropout=config.dropout,
    )


def build_image_model(config: TrainConfig, shape: Mapping[str, Any]) -> ImageModel:
    """An untrained model of images. shape: image_shape (C, H, W), and classes."""
    image_shape = tuple(shape["image_shape"])
    grid = size_pair(config.latent_grid)
    common = {
        "networks": Networks(
            config.architecture, config.hidden_sizes, config.width, config.residual_blocks
        ),
        "weights": LossWeights(
            reconstruction=config.reconstruction_weight,
            quantizing=config.quantizing_weight or 0.0,
            kl=config.kl_weight or 0.0,
            reconstruction_quantizing=config.reconstruction_quantizing_weight or 0.0,
        ),
        "reconstruction_loss": config.reconstruction_loss,
    }
    try:
        if config.model in CONTINUOUS:
            labels = shape["classes"] if config.model == "cvae" else 0
            return Autoencoder(image_shape, grid, config.latent_dim, classes=labels, **common)
        quantizer = build_quantizer(config, grid)
        if isinstance(quantizer, SoftVQ):
            return SoftVQVAE(
                image_shape,
                grid,
                quantizer,
                decoder_input=config.decoder_input,
                quantized_codes=config.quantized_codes,
                **common,
            )
        if config.model == "vqvae2":
            top = build_quantizer(config, halved(grid))
            return VQVAE2(image_shape, grid, top, quantizer, **common)
        return VQVAE(image_shape, grid, quantizer, **common)
    except ValueError as error:
        raise ConfigError(f"latent_grid: {error}") from error


def build_quantizer(config: TrainConfig, grid: tuple[int, int]) -> Quantizer:
    """The quantizer of one grid (h, w) of codes."""
    sizes = {"dim": config.latent_dim, "codebook_size": config.codebook_size}
    entropy = {"entropy_weight": config.entropy_weight}
    match config.model:
        case "soft-vqvae":
            return SoftVQ(
                **sizes,
                **entropy,
                temperature=1.0 if config.temperature == "auto" else float(config.temperature),
                learn_temperature=config.temperature_schedule == "learned",
                estimator=config.estimator,
                codebook_loss=config.codebook_loss,
                commitment_weight=config.commitment_weight,
            )
        case "vqvae-gumbel":
            return GumbelVQ(
                **sizes,
                **entropy,
                temperature=float(config.temperature),
                straight_through=config.estimator == "straight_through",
            )
        case "vqvae":
            return VQ(
                **sizes,
                **entropy,
                commitment_weight=config.commitment_weight,
                kmeans_init=config.codebook_start == "kmeans",
            )
    latents = config.batch_size * grid[0] * grid[1]
    return EMAVQ(
        **sizes,
        **entropy,
        commitment_weight=config.commitment_weight,
        decay=config.decay,
        threshold_ema_dead_code=config.dead_code_threshold * latents / config.codebook_size,
        kmeans_init=config.codebook_start == "kmeans",
    )
