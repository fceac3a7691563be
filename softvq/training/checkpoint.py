"""Checkpoints: everything a run needs to go on exactly where it was.

folder/step-N holds state.json (where the run stands, and every number that is no tensor),
tensors.safetensors, and manifest.json, which is written last and says what the other two must be.
"""

import hashlib
import json
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError

from softvq.training.files import remove_folder, sync
from softvq.training.run_folder import RunError
from softvq.training.state_file import from_bytes, to_bytes

STATE, TENSORS, MANIFEST = "state.json", "tensors.safetensors", "manifest.json"


class DamagedError(Exception):
    """A checkpoint that is not what was written; its one line says what is wrong."""


class Stateful(Protocol):
    """Anything with a state to save: modules, optimizers, running means."""

    def state_dict(self) -> dict[str, Any]:
        """The state, made of what `state_file` may hold: tensors, numbers, containers."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> object:
        """Take on such a state."""


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    best_error: float = float("inf")
    best_step: int = 0  # zero before the first validation
    best_sha256: str = ""  # of the model.safetensors that step made
    images: int = 0  # seen
    seconds: float = 0.0  # spent training, without validation and saving
    warnings: list[str] = field(default_factory=list)  # for the summary

    @property
    def images_per_second(self) -> float:
        """Training speed so far, after the first step."""
        return self.images / self.seconds


def save_checkpoint(folder: Path, progress: Progress, parts: dict[str, Stateful]) -> None:
    """Write folder/step-N, whole or not at all; then remove those that are no longer needed.

    Kept are the newest two, and of each of them the best one. Raises OSError, with nothing changed.
    """
    state = {name: part.state_dict() for name, part in parts.items()}
    state["progress"] = asdict(progress)
    state["random"] = _random_state()
    skeleton, tensors = to_bytes(state)
    files = {STATE: skeleton, TENSORS: tensors}
    manifest = {name: {"size": len(data), "sha256": sha256(data)} for name, data in files.items()}
    files[MANIFEST] = json.dumps(manifest, indent=1).encode()

    temporary = folder / f".step-{progress.step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name, data in files.items():
            (temporary / name).write_bytes(data)
            sync(temporary / name)
        sync(temporary)
        remove_folder(_path(folder, progress.step))
        temporary.rename(_path(folder, progress.step))
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(folder)
    _retire(folder)


def load_checkpoint(folder: Path, parts: dict[str, Stateful]) -> tuple[Progress | None, list[str]]:
    """Restore the newest checkpoint that is whole into `parts`; None where there is not any.

    Also returns a line about each newer one, what is wrong with it. Raises RunError when there are
    checkpoints and none can be used; parts may have changed by then.
    """
    problems: list[str] = []
    for step in reversed(_steps(folder)):
        try:
            return _restore(read_checkpoint(folder, step), parts), problems
        except DamagedError as error:
            problems.append(f"{_path(folder, step)}: damaged checkpoint ({error})")
    if problems:
        older = f", and so are {len(problems) - 1} older ones" if len(problems) > 1 else ""
        raise RunError(f"{problems[0]}{older}; start with --overwrite")
    return None, []


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint, whole or not; 0 where there is not any."""
    return max(_steps(folder), default=0)


def remove_checkpoints_after(folder: Path, step: int) -> None:
    """Remove the later ones, so that they do not count among the newest two."""
    for later in _steps(folder):
        if later > step:
            remove_folder(_path(folder, later))


def read_checkpoint(folder: Path, step: int) -> dict[str, Any]:
    """The state in folder/step-N, by part. Raises DamagedError unless it is what was written."""
    path = _path(folder, step)
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        contents = {}
        for name in (STATE, TENSORS):
            contents[name] = (path / name).read_bytes()
            size, promised = len(contents[name]), manifest[name]["size"]
            if size != promised:
                raise DamagedError(f"{name} has {size} bytes, not {promised}")
            if sha256(contents[name]) != manifest[name]["sha256"]:
                raise DamagedError(f"{name} has changed: its sha256 is another")
        return from_bytes(contents[STATE], contents[TENSORS])
    except OSError as error:
        raise DamagedError(f"{Path(error.filename or path).name}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DamagedError(f"{MANIFEST} cannot be read") from error


def sha256(data: bytes) -> str:
    """The hash, as hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def _restore(state: dict[str, Any], parts: dict[str, Stateful]) -> Progress:
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        _restore_random_state(state["random"])
        return Progress(**state["progress"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DamagedError(
            "it does not fit the run's config.toml; if that was edited, undo it"
        ) from error


def _retire(folder: Path) -> None:
    newest = _steps(folder)[-2:]
    kept = {*newest, *filter(None, (_best_step(folder, step) for step in newest))}
    for step in _steps(folder):
        if step not in kept:
            remove_folder(_path(folder, step))


def _best_step(folder: Path, step: int) -> int | None:
    try:
        return json.loads((_path(folder, step) / STATE).read_bytes())["progress"]["best_step"]
    except (OSError, ValueError, KeyError, TypeError):  # damaged since it was written
        return None


def _steps(folder: Path) -> list[int]:
    names = (re.fullmatch(r"step-(\d+)", path.name) for path in folder.glob("step-*"))
    return sorted(int(name[1]) for name in names if name)


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step}"


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    for device, saved in zip(range(torch.cuda.device_count()), state.get("cuda", ()), strict=False):
        torch.cuda.set_rng_state(saved, device)
