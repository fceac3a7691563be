"""The end of a run: the test split, the pictures, the summary, the report."""

import json
import platform

import torch

import softvq
from softvq.data import DataSplits
from softvq.training.checkpoint import Progress
from softvq.training.commands import PER_PAGE, reconstruction_rows
from softvq.training.config import TrainConfig
from softvq.training.evaluation import SplitMetrics, evaluate, to_pixels
from softvq.training.files import write_text
from softvq.training.pictures import save_codebook_usage, save_reconstructions
from softvq.training.report import write_report
from softvq.training.run_folder import RunFolder


def finish(
    config: TrainConfig,
    run: RunFolder,
    data: DataSplits,
    progress: Progress,
    device: torch.device,
) -> SplitMetrics:
    """Judge the best weights on the test split and leave everything the run folder promises."""
    model = run.load_model(device)
    test = evaluate(model, data.test, device)
    run.append_metrics(progress.step, "test", test.values)
    save_codebook_usage(run.usage, test.counts)
    images = to_pixels(data.test.images[:PER_PAGE], device)
    save_reconstructions(run.reconstructions, reconstruction_rows(model, images))
    summary = {
        "test": test.values,
        "images_per_second": progress.images_per_second,
        "seconds": progress.seconds,
        "device": device_name(device),
        "seed": config.seed,
        "steps": progress.step,
        "best_step": progress.best_step,
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": {
            "softvq": softvq.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    write_text(run.summary, json.dumps(summary, indent=2) + "\n")
    write_report(run.path)
    return test


def device_name(device: torch.device) -> str:
    """What the device is, for the summary."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
