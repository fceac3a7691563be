"""Encoders and decoders for images of any size and channel count.

An encoder maps images (B, C, H, W) to features (B, h, w, features), a decoder maps latents
(B, h, w, D) to maps (B, C, H, W) of any value. Latents keep their channels last: a row is a vector.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from torch import Tensor, nn

from softvq.checks import check_choice, check_counts

Shape = tuple[int, int, int]  # channels, height, width
Grid = tuple[int, int]  # height, width
Architecture = Literal["conv", "dense"]


@dataclass(frozen=True)
class Networks:
    """Which encoders and decoders a model has, and how large they are."""

    architecture: Architecture = "conv"
    hidden: tuple[int, ...] = (256, 64)  # layer sizes of the dense networks
    width: int = 32  # channels of the first conv layer
    residual_blocks: int = 1  # of the conv networks, at the latent grid

    def __post_init__(self) -> None:
        check_choice("architecture", self.architecture, get_args(Architecture))
        check_counts(1, width=self.width, **{f"hidden[{i}]": n for i, n in enumerate(self.hidden)})
        check_counts(0, residual_blocks=self.residual_blocks)

    def encoder(self, image_shape: Shape, latent_grid: Grid, features: int) -> nn.Module:
        """From images (B, C, H, W) to features (B, h, w, features)."""
        if self.architecture == "dense":
            return DenseEncoder(image_shape, latent_grid, features, self.hidden)
        return ConvEncoder(image_shape, latent_grid, features, self.width, self.residual_blocks)

    def decoder(self, image_shape: Shape, latent_grid: Grid, latent_dim: int) -> nn.Module:
        """From latents (B, h, w, latent_dim) to maps (B, C, H, W)."""
        if self.architecture == "dense":
            return DenseDecoder(image_shape, latent_grid, latent_dim, self.hidden)
        return ConvDecoder(image_shape, latent_grid, latent_dim, self.width, self.residual_blocks)


class DenseEncoder(nn.Module):
    """Flattened pixels → hidden layers → features."""

    def __init__(
        self, image_shape: Shape, latent_grid: Grid, features: int, hidden: tuple[int, ...]
    ):
        super().__init__()
        sizes = (math.prod(image_shape), *hidden)
        self.layers = nn.Sequential(
            nn.Flatten(),
            *dense_layers(sizes),
            nn.Linear(sizes[-1], math.prod(latent_grid) * features),
        )
        self.shape = (*latent_grid, features)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).unflatten(1, self.shape)


class DenseDecoder(nn.Module):
    """Flattened latents → hidden layers, in reverse → pixels."""

    def __init__(
        self, image_shape: Shape, latent_grid: Grid, latent_dim: int, hidden: tuple[int, ...]
    ):
        super().__init__()
        sizes = (math.prod(latent_grid) * latent_dim, *reversed(hidden))
        self.layers = nn.Sequential(
            nn.Flatten(), *dense_layers(sizes), nn.Linear(sizes[-1], math.prod(image_shape))
        )
        self.shape = image_shape

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(latents).unflatten(1, self.shape)


def dense_layers(sizes: tuple[int, ...]) -> list[nn.Module]:
    """Linear, batch norm and GELU for each step from one size to the next."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.GELU()]
    return layers


class ResidualBlock(nn.Module):
    """x + conv1×1(conv3×3(x)): the block of VQ-VAE (van den Oord et al. 2017, section 4.1)."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.GELU(),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class ConvEncoder(nn.Module):
    """3×3 convolutions down to the grid, residual blocks, one linear layer per position."""

    def __init__(
        self,
        image_shape: Shape,
        latent_grid: Grid,
        features: int,
        width: int,
        residual_blocks: int,
    ):
        super().__init__()
        sizes = grid_path(image_shape[1:], latent_grid)
        channels = [image_shape[0], *(width * 2**i for i in range(len(sizes) - 1))]
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise(sizes)):
            halves = after == halved(before)
            layers.append(nn.Conv2d(*channels[i : i + 2], 3, stride=2 if halves else 1, padding=1))
            if not halves and after != before:
                layers.append(nn.AdaptiveAvgPool2d(after))
            layers += [nn.BatchNorm2d(channels[i + 1]), nn.GELU()]
        layers += [ResidualBlock(channels[-1]) for _ in range(residual_blocks)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels[-1], features, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).permute(0, 2, 3, 1)


class ConvDecoder(nn.Module):
    """The encoder's path backwards: nearest-neighbour upsampling and 3×3 convolutions."""

    def __init__(
        self,
        image_shape: Shape,
        latent_grid: Grid,
        latent_dim: int,
        width: int,
        residual_blocks: int,
    ):
        super().__init__()
        sizes = grid_path(image_shape[1:], latent_grid)[::-1]
        channels = [*(width * 2**i for i in reversed(range(len(sizes) - 1))), image_shape[0]]
        layers: list[nn.Module] = [nn.Conv2d(latent_dim, channels[0], 1)]
        layers += [ResidualBlock(channels[0]) for _ in range(residual_blocks)]
        for i, size in enumerate(sizes[1:]):
            layers += [
                nn.BatchNorm2d(channels[i]),
                nn.GELU(),
                nn.Upsample(size=size),
                nn.Conv2d(*channels[i : i + 2], 3, padding=1),
            ]
        self.layers = nn.Sequential(*layers)

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(latents.permute(0, 3, 1, 2))


def halved(size: Grid) -> Grid:
    """Size of a map after a 3×3 convolution of stride 2."""
    return (size[0] + 1) // 2, (size[1] + 1) // 2


def grid_path(image: Grid, grid: Grid) -> list[Grid]:
    """Map sizes from the image to the grid: halve while that stays on or above it, then pool.

    Raises ValueError when the grid is larger than the image.
    """
    if not all(1 <= g <= i for g, i in zip(grid, image, strict=True)):
        raise ValueError(
            f"latent grid {grid[0]}x{grid[1]} must lie between 1x1 and the image's "
            f"{image[0]}x{image[1]}"
        )
    sizes = [image]
    while sizes[-1] != grid and all(h >= g for h, g in zip(halved(sizes[-1]), grid, strict=True)):
        sizes.append(halved(sizes[-1]))
    if sizes[-1] != grid or len(sizes) == 1:
        sizes.append(grid)
    return sizes
