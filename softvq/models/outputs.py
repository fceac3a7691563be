"""What models take and give, whichever model it is."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from softvq.checks import check_weights


@dataclass(frozen=True)
class LossWeights:
    """Weights of the losses. A weight of zero also leaves the term's work out."""

    reconstruction: float = 1e4  # ‖X−X̂‖², scaled up: the KL sums over dimensions, this is a mean
    quantizing: float = 1.0  # the quantizer's loss
    kl: float = 1.0  # zero also makes the encoder deterministic: z = μ
    reconstruction_quantizing: float = 0.0  # ‖X−Decoder(sg[codes])‖², of the reconstruction's scale

    def __post_init__(self) -> None:
        check_weights(**vars(self))


class Latents(NamedTuple):
    """What the encoder says of a batch, all (B, h, w, D); z is sampled while training."""

    z: Tensor
    mean: Tensor
    logvar: Tensor | None  # None for a deterministic encoder


class TrainingStep(NamedTuple):
    """What one batch says to the optimizer and to whoever steers the codebooks."""

    losses: dict[str, Tensor]  # 0-d, named as the metrics are; "loss" is the weighted sum
    latents: dict[str, Tensor]  # (B, h, w, D) by level: what its quantizer read, detached
    indices: dict[str, Tensor]  # (B, h, w) int64 by level


class Evaluation(NamedTuple):
    """A batch seen in every way the metrics and pictures need."""

    outputs: dict[str, Tensor]  # (B, C, H, W) in [0, 1], by the name of the error they make
    values: dict[str, Tensor]  #  0-d means over the batch, by the name of the metric
    indices: dict[str, Tensor]  # (B, h, w) int64 by level
