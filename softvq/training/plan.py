"""What a run would do, without doing it."""

import torch

from softvq.training.config import TrainConfig, torch_device
from softvq.training.engine import compiles, uses_bfloat16
from softvq.training.families import PRIOR
from softvq.training.finish import device_name
from softvq.training.memory import activation_bytes, bytes_of
from softvq.training.task import Task

PROBES = (16, 32)  # examples of the forward passes that are measured; the rest is a straight line


def plan(config: TrainConfig, task: Task) -> str:
    """Data, model, steps, device and memory as comments, then the settings: a TOML file.

    config: resolved. task: on the CPU; its model is used up.
    """
    device = torch_device(config.device)
    bfloat16 = uses_bfloat16(config, device)
    epochs = config.steps * config.batch_size / task.examples
    what = "codes of images" if config.model in PRIOR else "images"
    lines = {
        "data": f"{task.examples:,} {what} to train on, from {config.data or config.tokenizer}; "
        f"{megabytes(task.decoded_bytes)} {'streamed' if task.streamed else 'in memory'}",
        "model": f"{config.model}, {parameters(task)}",
        "steps": f"{config.steps:,} of {config.batch_size:,}, {epochs:.1f} epochs; validation "
        f"every {config.evaluate_every:,}, checkpoint every {config.checkpoint_every:,}",
        "device": f"{device_name(device)}, {'bfloat16' if bfloat16 else 'float32'}"
        + (", compiled" if compiles(config, device) else ""),
        "memory": memory(config, task, torch.bfloat16 if bfloat16 else torch.float32),
    }
    comments = "".join(f"# {name:7} {text}\n" for name, text in lines.items())
    return f"{comments}\n{config.to_toml()}"


def parameters(task: Task) -> str:
    """ "1,234 parameters: encoder 1,000, decoder 200, …"."""
    counts = {
        name: sum(p.numel() for p in part.parameters())
        for name, part in task.model.named_children()
    }
    parts = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)
    return f"{sum(counts.values()):,} parameters: {parts}"


def memory(config: TrainConfig, task: Task, dtype: torch.dtype) -> str:
    """What a step holds at once, in parts and as a sum."""
    weights = bytes_of(list(task.model.parameters()))
    task.model.train()
    probes = task.load([torch.arange(size) % task.examples for size in PROBES])
    few, more = (activation_bytes(task, batch, dtype) for batch in probes)
    of_one = (more - few) / (PROBES[1] - PROBES[0])
    activations = more + of_one * (config.batch_size - PROBES[1])
    held = {
        "weights": weights,
        "gradients": weights,
        "optimizer": 2 * weights,  # AdamW's two averages
        "data": task.data_bytes,
        "activations": activations,
    }
    parts = ", ".join(f"{name} {megabytes(size)}" for name, size in held.items())
    return f"about {megabytes(sum(held.values()))}: {parts}"


def megabytes(size: float) -> str:
    """ "12.3 MB"."""
    return f"{size / 1e6:,.1f} MB"
