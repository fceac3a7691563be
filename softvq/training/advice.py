"""One line of advice for what goes wrong in many runs: a collapsed codebook, too little memory."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from softvq.models import CodeLevel, level_suffix
from softvq.training.checkpoint import Progress
from softvq.training.config import TrainConfig
from softvq.training.guards import TrainingError
from softvq.training.warn import warn

COLLAPSED = 0.05  # of the codes: a perplexity under it is a collapse
ONE_CODE = 1.01  # and so is this one, however few codes there are
# Until then the codes may still lie together: a share of the run, and a number of steps.
PATIENCE, AT_LEAST = 1 / 3, 100

# model -> what to try against a collapse
REMEDIES = {
    "soft-vqvae": "--temperature auto, a larger --dead-code-threshold or --entropy-weight 0.1",
    "vqvae": "--codebook-start kmeans, --entropy-weight 0.1 or --model vqvae-ema",
    "vqvae-ema": "--codebook-start kmeans, a larger --dead-code-threshold or a smaller --decay",
    "vqvae-gumbel": "--entropy-weight 0.1 or a larger --temperature-ratio",
    "vqvae2": "--codebook-start kmeans, a larger --dead-code-threshold or a smaller --decay",
}


def warn_of_collapse(
    config: TrainConfig,
    progress: Progress,
    levels: Mapping[str, CodeLevel],
    values: Mapping[str, float],
) -> None:
    """Print advice, once in a run, when a codebook's perplexity, in `values`, is too low."""
    if progress.warnings or progress.step < max(PATIENCE * config.steps, AT_LEAST):
        return
    for name, level in levels.items():
        perplexity = values.get(f"perplexity{level_suffix(name)}")
        floor = max(COLLAPSED * level.codebook_size, ONE_CODE)
        if perplexity is not None and perplexity < floor and level.codebook_size > 1:
            progress.warnings.append(
                f"step {progress.step}: the codebook{level_suffix(name).replace('_', ' ')} has "
                f"collapsed: perplexity {perplexity:.1f} of {level.codebook_size} codes; try "
                f"{REMEDIES[config.model]}"
            )
            warn(progress.warnings[-1])
            return


@contextmanager
def memory_advice(config: TrainConfig, *, of_batch: bool = True) -> Iterator[None]:
    """Turn running out of memory into a TrainingError that says what to lower.

    of_batch: whether the batch size matters.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if str(error).startswith("DataLoader worker"):
            raise TrainingError(
                "a process that decodes pictures was lost, perhaps for want of memory or of room "
                f"in /dev/shm ({error}); the last checkpoint is good: lower --workers"
            ) from error
        if not is_out_of_memory(error):
            raise
        size = "hidden" if config.architecture == "dense" else "width"
        names = ["batch_size"] * of_batch + ["codebook_size", size, "image_size"]
        settings = {name: getattr(config, name) for name in names}
        advice = [
            f"--{name.replace('_', '-')} (now {value})"
            for name, value in settings.items()
            if value is not None
        ]
        stream = config.data == "folder" and config.stream != "on"
        text = f"out of memory; lower {' or '.join(advice)}{', or give --stream on' * stream}"
        raise TrainingError(text) from error


def is_out_of_memory(error: Exception) -> bool:
    """A GPU's, Python's, or the CPU allocator's, which has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        "DefaultCPUAllocator: can't allocate memory" in str(error)
    )
