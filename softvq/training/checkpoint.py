"""Checkpoints: everything a run needs to go on exactly where it was."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from softvq.training.files import sync
from softvq.training.run_folder import RunError

FILE = "state.pt"


class Stateful(Protocol):
    """Anything with a state to save: modules, optimizers, running means."""

    def state_dict(self) -> dict[str, Any]:
        """The state, made of what `torch.load` may read: tensors, numbers, containers."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> object:
        """Take on such a state."""


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    best_error: float = float("inf")
    best_step: int = 0
    images: int = 0  # seen
    seconds: float = 0.0  # spent training, without validation and saving

    @property
    def images_per_second(self) -> float:
        """Training speed so far; zero before the first step."""
        return self.images / self.seconds if self.seconds else 0.0


def save_checkpoint(folder: Path, progress: Progress, parts: dict[str, Stateful]) -> None:
    """Write folder/step-N, whole or not at all, and keep only it and the best one beside it."""
    state = {name: part.state_dict() for name, part in parts.items()}
    state["progress"] = asdict(progress)
    state["random"] = _random_state()
    temporary = folder / f".step-{progress.step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    torch.save(state, temporary / FILE)
    sync(temporary / FILE)
    final = folder / f"step-{progress.step}"
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    sync(folder)
    for path in folder.glob("step-*"):
        if path.name not in (f"step-{progress.step}", f"step-{progress.best_step}"):
            shutil.rmtree(path)


def load_checkpoint(folder: Path, parts: dict[str, Stateful]) -> Progress:
    """Restore the newest checkpoint into `parts`.

    Raises RunError when there is none or it cannot be used; some parts may have changed by then.
    """
    steps = sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))
    if not steps:
        raise RunError(f"{folder.parent}: no checkpoint to resume from; start with --overwrite")
    path = folder / f"step-{steps[-1]}" / FILE
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        _restore_random_state(state["random"])
        return Progress(**state["progress"])
    except Exception as error:  # whatever a damaged archive makes of itself
        raise RunError(
            f"{path}: damaged checkpoint ({type(error).__name__}); remove {path.parent.name} to go "
            "on from an older one, or start with --overwrite"
        ) from error


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
