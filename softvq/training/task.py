"""What the training loop needs to know of what it trains."""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from softvq.models import TrainingStep
from softvq.training.run_folder import RunFolder
from softvq.training.showing import Rows
from softvq.training.steering import Steering

Examples = tuple[Tensor, ...]  # (B, ...) each, on the device: some training examples


class Task(Protocol):
    """A model with its data: images to reconstruct, or codes to predict."""

    model: nn.Module
    # What the data make of the model, as JSON: arguments of its builder, class_names, and
    # fingerprints: data, and for codes tokenizer.
    shape: dict[str, Any]
    examples: int  # in the training split
    judged_by: str  # the metric whose lowest validation value is the best model
    steering: Steering
    data_bytes: int  # that the training split takes in memory,
    decoded_bytes: int  # and that it would take if it were all there
    streamed: bool  # whether it is not
    indexed_on: torch.device  # where `load` wants its indices

    def load(self, batches: Iterable[Tensor]) -> Iterator[Examples]:
        """The training examples of each batch of indices, (B,) int64."""

    def start(self, batch: Examples) -> None:
        """Look at the first batch before any step."""

    def step(self, batch: Examples) -> TrainingStep:
        """The losses of a batch."""

    def evaluate(self, split: str) -> dict[str, float]:
        """Every metric of the model over a whole split."""

    def rows(self) -> Rows:
        """A few validation images as the model sees them now; none where it has no images."""

    def finish(self, model: nn.Module, run: RunFolder) -> dict[str, float]:
        """Metrics of the best model over the test split; its pictures go to the run folder."""
