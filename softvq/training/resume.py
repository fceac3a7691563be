"""Going back to where a run stood."""

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
from softvq.training.files import write_bytes
from softvq.training.history import read_metrics
from softvq.training.run_folder import RunError, RunFolder, model_bytes
from softvq.training.warn import warn


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
