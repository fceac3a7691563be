"""A run belongs to the images, or codes, that it began with."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from softvq.data import DataError, DataSplits
from softvq.models import CodePrior, ImageModel
from softvq.training.run_folder import RunError, RunFolder
from softvq.training.warn import warn

CHANGED = "some were added, removed, renamed or given another size or class"
# name of what a task's shape remembers -> what it means that it is another now
OTHERS = {
    "tokenizer": "the tokenizer is not the model whose codes it has learned; give that with "
    "--tokenizer",
    "data": f"the images are not those it began with, {CHANGED}; bring them back",
}


class Origin:
    """The part of a checkpoint that says what the run is trained on, `shape` of its task."""

    def __init__(self, run: Path, shape: dict[str, Any]):
        self.run = run
        self.state = {name: shape[name] for name in OTHERS if name in shape}

    def state_dict(self) -> dict[str, Any]:
        """Fingerprints by name."""
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raise RunError unless the state is that of the same data."""
        for name, text in OTHERS.items():
            if state.get(name) != self.state.get(name):
                raise RunError(f"{self.run}: {text}, or start anew with --overwrite")


@contextmanager
def images_of(run: RunFolder) -> Iterator[None]:
    """Have a DataError about the images of a finished run say where options for them go."""
    try:
        yield
    except DataError as error:
        raise DataError(
            f"{error} (options for the images of {run.path} go to softvq train --out {run.path} "
            "--resume)"
        ) from error


def check_data(run: RunFolder, model: ImageModel | CodePrior, images: DataSplits) -> None:
    """Warn when the images are not those that the run's model was trained on.

    Raises RunError when the model is told their classes, and these are others.
    """
    shape = run.read_shape()
    if images.fingerprint == shape["data"]:
        return
    if model.classes and list(images.class_names) != shape["class_names"]:
        raise RunError(
            f"{run.path}: it has learned the classes {', '.join(shape['class_names'])}, but the "
            f"images have {', '.join(images.class_names)}"
        )
    warn(
        f"{run.path}: the images are not those it was trained on, {CHANGED}; there may be training "
        "images among those of other splits"
    )
