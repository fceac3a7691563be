"""What a model with a prior over its codes says an image costs, in bits per dimension.

An image x is sent as its nearest codes z_q and then itself given them, so its cost is
−log₂ p(x, z_q) = −log₂ p(x | z_q) − log₂ p(z_q): an upper bound of −log₂ p(x), which sums over all
codes. p(z_q) is a prior's; p(x | z_q) is a discretised logistic around the decoder's output.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

# In pixels of [0, 1], 15 % apart. The smallest leaves a pixel that sits on its value 0.999 of the
# probability; the largest sends nearly half of it to black and half to white.
SCALES = tuple(2 ** (i / 5 - 12) for i in range(72))


def fit_scales(batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The scale of each pixel position and channel with the largest likelihood, (C, H, W).

    batches: one or more pairs of the decoder's output (B, C, H, W) in [0, 1] and the images
    (B, C, H, W) uint8; all of one shape but for B. Read once, one batch at a time. A few thousand
    images are enough for scales that hold on others.
    """
    total = 0  # (S, C, H, W)
    for output, pixels in batches:
        scales = torch.tensor(SCALES, dtype=output.dtype, device=output.device)
        total = total + torch.stack(
            [logistic_log_probability(output, pixels, s).double().sum(0) for s in scales]
        )
    return scales[total.argmax(0)]


def discretised_logistic_log_likelihood(output: Tensor, pixels: Tensor, scales: Tensor) -> Tensor:
    """log p(pixels | output) in nats per image, (B,), summed in float64.

    Args:
        output: (B, C, H, W) in [0, 1], the decoder's. pixels: (B, C, H, W) uint8.
        scales: (C, H, W), of `fit_scales`.
    """
    return logistic_log_probability(output, pixels, scales).double().flatten(1).sum(1)


def logistic_log_probability(output: Tensor, pixels: Tensor, scale: Tensor) -> Tensor:
    """log of a logistic's mass in the bin [v − ½, v + ½]/255 of each 8-bit pixel v, (B, C, H, W).

    Salimans et al. 2017, "PixelCNN++", equation 2; the bins of 0 and 255 are open to the outside.
    With a and b the bin's standardised ends, σ(a) − σ(b) = σ(a) σ(−b) (1 − exp(b − a)), three
    factors that keep their precision where the difference would lose it. scale: 0-d or (C, H, W).
    """
    value = pixels.to(output.dtype)
    upper = ((value + 0.5) / 255 - output) / scale
    lower = ((value - 0.5) / 255 - output) / scale
    below = F.logsigmoid(upper)  # log σ(a)
    above = F.logsigmoid(-lower)  # log σ(−b)
    inside = below + above + torch.log(-torch.expm1(-1 / (255 * scale)))
    return torch.where(pixels == 0, below, torch.where(pixels == 255, above, inside))


def bits_per_dimension(log_likelihood: Tensor, dimensions: int) -> Tensor:
    """−log₂ p / dimensions of log p in nats, any shape: bits/dim with C·H·W dimensions."""
    return -log_likelihood / (dimensions * math.log(2))


def order0_bits_per_latent(train_codes: Tensor, test_codes: Tensor, codebook_size: int) -> float:
    """Mean bits per code of the model that counts codes and knows neither place nor neighbour.

    Args:
        train_codes: (N, ...) int64, counted, each code once more than it occurred.
        test_codes: (M, ...) int64, sent.
    """
    counts = 1 + train_codes.flatten().bincount(minlength=codebook_size).double()
    bits = -(counts / counts.sum()).log2()
    return bits[test_codes].mean().item()
