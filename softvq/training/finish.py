"""The end of a run: the test split, the pictures, the summary, the report."""

import json
import platform

import torch

import softvq
from softvq.training.checkpoint import Progress
from softvq.training.config import TrainConfig
from softvq.training.files import write_text
from softvq.training.report import write_report
from softvq.training.run_folder import RunFolder
from softvq.training.task import Task


def finish(
    config: TrainConfig,
    run: RunFolder,
    task: Task,
    progress: Progress,
    device: torch.device,
    processes: int,
) -> dict[str, float]:
    """Judge the best weights on the test split and leave everything the run folder promises.

    processes: how many have trained.
    """
    model = run.load_model(device)
    test = task.finish(model, run)
    run.append_metrics(progress.step, "test", test)
    summary = {
        "test": test,
        "images_per_second": progress.images_per_second,
        "seconds": progress.seconds,
        "device": device_name(device),
        "processes": processes,
        "seed": config.seed,
        "steps": progress.step,
        "best_step": progress.best_step,
        "warnings": progress.warnings,
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": {
            "softvq": softvq.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    write_text(run.summary, json.dumps(summary, indent=2) + "\n")
    write_report(run)
    return test


def device_name(device: torch.device) -> str:
    """What the device is, for the summary."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
