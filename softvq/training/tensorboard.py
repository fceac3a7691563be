"""The same numbers as metrics.jsonl for TensorBoard, and pictures."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import interpolate

from softvq.training.settings import ConfigError
from softvq.training.showing import Rows

SMALLEST_SIDE = 56  # of an image, in pixels


def check_tensorboard() -> None:
    """Raise ConfigError where TensorBoard is not installed."""
    if find_spec("tensorboard") is None:
        raise ConfigError(
            "--tensorboard needs a package that is missing; install it with "
            "pip install 'softvq[tensorboard]'"
        )


class Board:
    """Event files in a folder, for a machine that has TensorBoard."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.writer = self._writer()

    def drop_after(self, step: int) -> None:
        """Have TensorBoard forget what a resumed run will write again."""
        self.writer.close()
        self.writer = self._writer(purge_step=step + 1)

    def _writer(self, **options: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter  # needs tensorboard

        return SummaryWriter(str(self.folder), **options)

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        """A line of metrics.jsonl: one curve for each name."""
        for name, value in values.items():
            self.writer.add_scalar(f"{name}/{split}", value, step)

    def show(self, step: int, rows: Rows) -> None:
        """Pictures, a row of images for each kind, and have everything on the disk."""
        if rows:
            self.writer.add_image("reconstructions", picture(rows), step)
        self.writer.flush()

    def close(self) -> None:
        """Nothing more comes."""
        self.writer.close()


def picture(rows: Rows) -> torch.Tensor:
    """Rows of images (n, C, H, W) in [0, 1] as one picture (C, height, width) uint8."""
    strips = [torch.cat(list(images.detach().float().cpu()), 2) for _, images in rows]
    joined = torch.cat(strips, 1)
    factor = max(1, SMALLEST_SIDE // min(rows[0][1].shape[2:]))
    large = interpolate(joined[None], scale_factor=factor)[0]
    return large.clamp(0, 1).mul(255).round().byte()
