"""What the training loop needs to know of what it trains."""

from typing import Any, Protocol

from torch import Tensor, nn

from softvq.models import TrainingStep
from softvq.training.run_folder import RunFolder
from softvq.training.showing import Rows
from softvq.training.steering import Steering


class Task(Protocol):
    """A model with its data: images to reconstruct, or codes to predict."""

    model: nn.Module
    shape: dict[str, Any]  # what the data make of the model: arguments of its builder, as JSON
    examples: int  # in the training split
    judged_by: str  # the metric whose lowest validation value is the best model
    steering: Steering
    data_bytes: int  # of the training split, on the device

    def start(self, batch: Tensor) -> None:
        """Look at the first batch, indices (B,) of training examples, before any step."""

    def step(self, batch: Tensor) -> TrainingStep:
        """The losses of a batch, indices (B,) of training examples."""

    def evaluate(self, split: str) -> dict[str, float]:
        """Every metric of the model over a whole split."""

    def rows(self) -> Rows:
        """A few validation images as the model sees them now; none where it has no images."""

    def finish(self, model: nn.Module, run: RunFolder) -> dict[str, float]:
        """Metrics of the best model over the test split; its pictures go to the run folder."""
