"""What a person sees while a run trains: a live bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterable
from pathlib import Path
from shlex import quote
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
    track,
)
from rich.progress import (
    Progress as Bar,
)
from rich.table import Column
from torch import Tensor

from softvq.training.checkpoint import Progress
from softvq.training.config import TrainConfig
from softvq.training.outbox import FULL

REFRESH_SECONDS = 0.5  # between two readings of the losses: each one waits for the device


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Called where it is handled; the command line ends as others do then."""
        raise


class Display:
    """Progress bar with the time to the end, steps/s, images/s and the live losses."""

    def __init__(self, config: TrainConfig, *, quiet: bool):
        self.config = config
        # Paths are no markup.
        self.console = _Console(quiet=quiet, highlight=False, markup=False, emoji=False)
        self.bar = Bar(
            SpinnerColumn(),
            BarColumn(bar_width=15),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            # What is left of the line is theirs, so that they push nothing else off it.
            TextColumn("{task.fields[numbers]}", table_column=Column(ratio=1, no_wrap=True)),
            expand=True,
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self.task = self.bar.add_task("training", total=config.steps, numbers="")
        self._shown = 0.0

    def __enter__(self) -> "Display":
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def step(self, step: int, progress: Progress, parts: dict[str, Tensor]) -> None:
        """Move the bar, now and then with fresh losses (0-d tensors)."""
        now = time.monotonic()
        if self.bar.disable or now - self._shown < REFRESH_SECONDS:
            return
        self._shown = now
        rate = step / progress.seconds
        losses = "  ".join(
            f"{name.removesuffix('_error')} {value.item():.4g}" for name, value in parts.items()
        )
        self.bar.update(
            self.task,
            completed=step,
            numbers=f"{rate:.1f} steps/s  {progress.images_per_second:,.0f} images/s  {losses}",
        )

    def validated(self, step: int, values: dict[str, float]) -> None:
        """Print the metrics of a validation."""
        self.bar.update(self.task, completed=step)
        self.note(f"step {step:>6}/{self.config.steps}  validation: {summary(values)}")

    def stopped(self, step: int, run: Path, *, saved: bool) -> None:
        """Say how to go on after a signal."""
        where = "saved" if saved else "not saved, the disk is full; an older checkpoint is there"
        self.note(
            f"stopped at step {step}, {where}; go on: softvq train --out {quote(str(run))} --resume"
        )

    def finished(self, values: dict[str, float], report: Path) -> None:
        """Print the metrics of the test split."""
        self.note(f"test: {summary(values)}\nreport: {report}")

    def note(self, text: str) -> None:
        """Print text as it is; on a full disk, nothing."""
        try:
            self.console.print(text, soft_wrap=True)
        except OSError as error:
            if error.errno not in FULL:  # a log on the disk whose being full is no reason to stop
                raise


def with_bar(items: Iterable[Any], number: int, what: str) -> Iterable[Any]:
    """The same items; on a terminal with a bar that is gone at the end."""
    console = Console(stderr=True)
    return track(
        items, what, number, console=console, transient=True, disable=not console.is_terminal
    )


# name -> (how a line says it, how its value is written), of the metrics that matter most
SHOWN = {
    "bits_per_latent": ("bits per latent", ".3f"),
    "bits_per_dim": ("bits/dim", ".3f"),
    "reconstruction_hard_error": ("hard error", ".4f"),
    "reconstruction_quantizing_error": ("soft", ".4f"),
    "reconstruction_error": ("reconstruction", ".4f"),
    "kl": ("kl", ".1f"),
    "perplexity": ("perplexity", ".1f"),
    "perplexity_top": ("perplexity top", ".1f"),
    "perplexity_bottom": ("bottom", ".1f"),
    "codebook_usage": ("usage", ".0%"),
    "codebook_usage_top": ("usage top", ".0%"),
    "codebook_usage_bottom": ("bottom", ".0%"),
}


def summary(values: dict[str, float]) -> str:
    """The metrics that matter most, in one line."""
    return "  ".join(
        f"{words} {values[name]:{form}}" for name, (words, form) in SHOWN.items() if name in values
    )
