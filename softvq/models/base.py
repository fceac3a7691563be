"""What every model of images offers the trainer, the metrics and the commands."""

from abc import ABC, abstractmethod
from typing import NamedTuple, get_args

from torch import Tensor, nn

from softvq import losses
from softvq.checks import check_choice
from softvq.models.networks import Grid, Shape
from softvq.models.outputs import Evaluation, LossWeights, TrainingStep
from softvq.quantizers import Quantizer

LEVEL = "codes"  # the one level of a model with one codebook


class CodeLevel(NamedTuple):
    """One grid of codes of a quantised autoencoder."""

    grid: Grid  # (h, w)
    codebook_size: int


def level_suffix(level: str) -> str:
    """What tells apart the names of metrics and files of several levels: "", or "_top"."""
    return "" if level == LEVEL else f"_{level}"


class ImageModel(nn.Module, ABC):
    """A model of images (B, C, H, W) in [0, 1], with codes on no, one or two levels.

    Args:
        image_shape: (C, H, W).
        weights: of the losses; zero for those that the model has not.
        reconstruction_loss: "squared" or "absolute" differences, for training only.

    Raises:
        ValueError: a loss that the model has not, or an unknown name.
    """

    classes = 0  # of the labels the model looks at
    absent_losses: tuple[str, ...] = ("kl", "reconstruction_quantizing")  # of LossWeights

    def __init__(
        self,
        image_shape: Shape,
        weights: LossWeights,
        reconstruction_loss: losses.Difference = "squared",
    ):
        super().__init__()
        check_choice("reconstruction_loss", reconstruction_loss, get_args(losses.Difference))
        for name in self.absent_losses:
            if getattr(weights, name):
                raise ValueError(
                    f"weights.{name} must be 0: {type(self).__name__} has no such loss"
                )
        self.image_shape = tuple(image_shape)
        self.weights = weights
        self.reconstruction_loss = reconstruction_loss

    @property
    def quantizers(self) -> dict[str, Quantizer]:
        """The quantizers by level, coarsest first; none for a model without codes."""
        return {}

    @property
    def grids(self) -> dict[str, Grid]:
        """(h, w) of each level's codes."""
        return {}

    @property
    def levels(self) -> dict[str, CodeLevel]:
        """Grid and codebook size of each level's codes."""
        return {
            name: CodeLevel(self.grids[name], quantizer.codebook_size)
            for name, quantizer in self.quantizers.items()
        }

    @abstractmethod
    def forward(self, images: Tensor, labels: Tensor | None = None) -> TrainingStep:
        """The losses of a batch (B, C, H, W) in [0, 1] with labels (B,) int64."""

    @abstractmethod
    def evaluate(self, images: Tensor, labels: Tensor | None = None) -> Evaluation:
        """Reconstructions and statistics of a batch (B, C, H, W) in [0, 1], in eval mode."""

    def encode_indices(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, C, H, W) in [0, 1] → nearest codes (B, h, w) int64 by level, in eval mode."""
        raise NotImplementedError

    def decode_indices(self, indices: dict[str, Tensor]) -> Tensor:
        """Codes (B, h, w) int64 by level → images (B, C, H, W) in [0, 1]."""
        raise NotImplementedError

    def reconstruction_losses(
        self, output: Tensor, images: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The squared error, by its name, and the weighted loss that is trained."""
        squared = losses.reconstruction_error(output, images)
        trained = squared
        if self.reconstruction_loss != "squared":
            trained = losses.reconstruction_error(output, images, self.reconstruction_loss)
        return {"reconstruction_error": squared}, self.weights.reconstruction * trained
