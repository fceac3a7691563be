"""Encoders and decoders of any image size."""

import pytest
import torch

from softvq.models import LossWeights
from softvq.models.networks import (
    ConvDecoder,
    ConvEncoder,
    DenseDecoder,
    DenseEncoder,
    Networks,
    ResidualBlock,
    grid_path,
    halved,
)

FEATURES = 3
SHAPES = [
    ((1, 8, 8), (2, 2)),
    ((1, 8, 8), (8, 8)),
    ((3, 32, 32), (8, 8)),
    ((1, 28, 28), (7, 7)),
    ((1, 28, 28), (4, 4)),
    ((1, 28, 28), (5, 3)),
    ((1, 28, 28), (1, 1)),
    ((1, 28, 28), (28, 28)),
    ((2, 17, 23), (5, 6)),
    ((2, 17, 23), (4, 23)),
    ((3, 1, 1), (1, 1)),
]


@pytest.mark.parametrize(
    ("image", "grid", "path"),
    [
        ((28, 28), (7, 7), [(28, 28), (14, 14), (7, 7)]),
        ((28, 28), (28, 28), [(28, 28), (28, 28)]),
        ((28, 28), (5, 3), [(28, 28), (14, 14), (7, 7), (5, 3)]),
        ((28, 28), (4, 4), [(28, 28), (14, 14), (7, 7), (4, 4)]),
        ((8, 8), (1, 1), [(8, 8), (4, 4), (2, 2), (1, 1)]),
        ((17, 23), (5, 6), [(17, 23), (9, 12), (5, 6)]),
        ((17, 23), (4, 23), [(17, 23), (4, 23)]),
        ((1, 1), (1, 1), [(1, 1), (1, 1)]),
    ],
)
def test_grid_path(image, grid, path):
    assert grid_path(image, grid) == path


@pytest.mark.parametrize("grid", [(9, 8), (8, 9), (0, 4), (4, -1)])
def test_grid_that_does_not_fit(grid):
    with pytest.raises(ValueError, match=f"{grid[0]}x{grid[1]} must lie between 1x1 and .* 8x8"):
        grid_path((8, 8), grid)


@pytest.mark.parametrize("size", [1, 2, 7, 8])
def test_halved_is_what_a_convolution_of_stride_2_leaves(size):
    convolution = torch.nn.Conv2d(1, 1, 3, stride=2, padding=1)
    assert convolution(torch.zeros(1, 1, size, 5)).shape[2:] == halved((size, 5))


def conv(shape, grid):
    return ConvEncoder(shape, grid, FEATURES, 2, 1), ConvDecoder(shape, grid, FEATURES, 2, 1)


def dense(shape, grid):
    return DenseEncoder(shape, grid, FEATURES, (6, 5)), DenseDecoder(shape, grid, FEATURES, (6, 5))


@pytest.mark.parametrize("networks", [conv, dense])
@pytest.mark.parametrize(("shape", "grid"), SHAPES, ids=str)
def test_images_to_grid_and_back(networks, shape, grid):
    encoder, decoder = networks(shape, grid)
    images = torch.rand(4, *shape, requires_grad=True)
    features = encoder(images)
    assert features.shape == (4, *grid, FEATURES)
    output = decoder(features)
    assert output.shape == images.shape
    output.square().sum().backward()
    for network in (encoder, decoder):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_a_latent_sees_its_own_part_of_the_image_first():
    encoder, decoder = conv((1, 32, 32), (8, 8))
    images = torch.zeros(1, 1, 32, 32, requires_grad=True)
    encoder.eval()(images)[0, 0, 0].sum().backward()
    assert images.grad[0, 0, :4, :4].abs().sum() > 0
    assert images.grad[0, 0, 20:, 20:].abs().sum() == 0
    latents = torch.zeros(1, 8, 8, FEATURES, requires_grad=True)
    decoder.eval()(latents)[0, 0, -1, -1].sum().backward()
    assert latents.grad[0, -1, -1].abs().sum() > 0
    assert latents.grad[0, 0, 0].abs().sum() == 0


def test_hidden_layers_and_residual_blocks_are_as_many_as_asked():
    def linear(network):
        return [
            (m.in_features, m.out_features)
            for m in network.modules()
            if isinstance(m, torch.nn.Linear)
        ]

    encoder, decoder = dense((1, 8, 8), (2, 1))
    assert linear(encoder) == [(64, 6), (6, 5), (5, 6)]
    assert linear(decoder) == [(6, 5), (5, 6), (6, 64)]
    sizes = [
        sum(p.numel() for p in ConvEncoder((1, 8, 8), (2, 2), FEATURES, 2, blocks).parameters())
        for blocks in (0, 1, 2)
    ]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] > 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"width": 0}, ValueError, "width must be at least 1, got 0"),
        ({"width": 8.0}, TypeError, "width must be a whole number, got 8.0"),
        ({"residual_blocks": -1}, ValueError, "residual_blocks must be at least 0, got -1"),
        ({"hidden": (8, 0)}, ValueError, r"hidden\[1\] must be at least 1, got 0"),
    ],
    ids=str,
)
def test_sizes_of_no_network_are_named(options, error, message):
    with pytest.raises(error, match=message):
        Networks(**options)


@pytest.mark.parametrize(
    "name", ["reconstruction", "quantizing", "kl", "reconstruction_quantizing"]
)
def test_a_weight_below_zero_is_named(name):
    with pytest.raises(ValueError, match=f"{name} must be a finite number from 0 up, got -1.0"):
        LossWeights(**{name: -1.0})


def test_a_residual_block_adds_to_what_it_reads():
    block, x = ResidualBlock(3), torch.randn(2, 3, 4, 4)
    for parameter in block.layers[-1].parameters():
        torch.nn.init.zeros_(parameter)
    assert torch.equal(block(x), x)
