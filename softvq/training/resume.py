"""Going back to where a run stood: its settings, its state, its files."""

import dataclasses
from pathlib import Path
from typing import Any

from softvq.training.checkpoint import (
    DamagedError,
    Progress,
    Stateful,
    load_checkpoint,
    read_checkpoint,
    remove_checkpoints_after,
    sha256,
)
from softvq.training.config import TrainConfig, size_pair
from softvq.training.files import write_bytes
from softvq.training.history import read_metrics
from softvq.training.run_folder import RunError, RunFolder, model_bytes
from softvq.training.settings import ConfigError
from softvq.training.warn import warn

# settings that a resumed run may have otherwise
CHANGEABLE = ("device", "on_nan", "data_dir", "stream", "workers", "on_bad_image", "tokenizer")


def resumed_config(run: RunFolder, given: dict[str, Any]) -> TrainConfig:
    """The run's settings, if those given are the same. Raises ConfigError and RunError."""
    config = run.read_config()
    for name, value in given.items():
        found = getattr(config, name)
        if name not in CHANGEABLE and _meaning(name, value) != _meaning(name, found):
            raise ConfigError(
                f"{name}: {value} differs from the run's {found}; a resumed run keeps its settings "
                f"(only {', '.join(CHANGEABLE)} may change)"
            )
    changes = {name: given[name] for name in CHANGEABLE if name in given}
    return dataclasses.replace(config, **changes)


def _meaning(name: str, value: Any) -> Any:
    """What a setting's value stands for: the same for .5 and 0.5 as text, for 7 and 7x7."""
    try:
        match name:
            case "latent_grid" | "image_size":
                return size_pair(value)
            case "temperature" | "temperature_ratio":
                return float(value)
    except (AttributeError, TypeError, ValueError):  # left open, auto, or not allowed
        pass
    return value


def resume_run(
    run: RunFolder, parts: dict[str, Stateful], shape: dict[str, Any], steps: int
) -> Progress:
    """Restore the newest checkpoint that is whole, and the files of the run as they were then.

    A run that was killed before its first checkpoint begins anew. Raises RunError, also for one
    that trained for more than these steps.
    """
    progress, problems = load_checkpoint(run.checkpoints, parts)
    if progress is None:
        if read_metrics(run.metrics)[0]:
            raise RunError(f"{run.path}: no checkpoint to resume from; start with --overwrite")
        progress = Progress()
    if progress.step > steps:
        raise RunError(
            f"{run.path}: trained for {progress.step} steps, more than its config.toml has, {steps}"
        )
    for problem in problems:
        warn(f"{problem}; going on from step {progress.step}")
    remove_checkpoints_after(run.checkpoints, progress.step)
    run.drop_metrics_after(progress.step)
    if progress.best_step and _hash_of(run.model) != progress.best_sha256:
        _restore_model(run, progress, shape)
    return progress


def _restore_model(run: RunFolder, progress: Progress, shape: dict[str, Any]) -> None:
    """Write model.safetensors again from the checkpoint of the best step."""
    try:
        data = model_bytes(read_checkpoint(run.checkpoints, progress.best_step)["model"], shape)
    except DamagedError as error:
        warn(
            f"{run.model}: not the best weights, and the checkpoint of step {progress.best_step} "
            f"that had them is damaged ({error}); the next validation chooses anew"
        )
        progress.best_error, progress.best_step = float("inf"), 0
    else:
        write_bytes(run.model, data)


def _hash_of(path: Path) -> str | None:
    return sha256(path.read_bytes()) if path.is_file() else None
