"""Temperature: how it falls, and where it should start.

A codebook trained by soft k-means has a critical temperature T_c = 2·λ_max(Cov z) for the summed
squared distance: above it every code sits at the mean of the data, just below it they begin to
part (Rose 1998). So the start needs no hand-picking: measure λ_max, begin just under T_c.
"""

import math
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from softvq.checks import check_choice, check_counts, check_decay
from softvq.distributed.collectives import from_first_replica, mean_over_replicas
from softvq.kernels.products import without_autocast
from softvq.precise import KeepsFloat32, precise_dtype

Schedule = Literal["constant", "exponential", "cosine", "learned"]
Value = TypeVar("Value", float, Tensor)


def annealed(
    schedule: Schedule, progress: float | Tensor, start: Value, end: Value
) -> Value | Tensor:
    """A value that goes from `start` to `end` while `progress` goes from 0 to 1, then stays.

    "constant" and "learned" stay at `start`. A progress () on the device is not waited for.
    Raises ValueError for another schedule.
    """
    check_choice("schedule", schedule, get_args(Schedule))
    on_device = isinstance(progress, Tensor)
    progress = progress.clamp(0.0, 1.0) if on_device else min(max(progress, 0.0), 1.0)
    match schedule:
        case "exponential":
            return start * (end / start) ** progress
        case "cosine":
            cosine = (torch.cos if on_device else math.cos)(math.pi * progress)
            return end + (start - end) * 0.5 * (1 + cosine)
    return start


class CriticalTemperature(KeepsFloat32):
    """T_c = 2·λ_max(Cov z), followed while the encoder moves.

    The mean and the covariance of z are running averages over batches; while fewer than
    1/(1 − decay) batches were seen, they are plain averages. A batch is that of all replicas of a
    data-parallel run, each with the same number of rows; one without rows, or with numbers that are
    not finite, is left out. Raises TypeError or ValueError for a dim or decay that is not allowed.
    """

    in_float32 = ("mean", "covariance")

    def __init__(self, dim: int, decay: float = 0.98):
        super().__init__()
        check_counts(1, dim=dim)
        check_decay(decay)
        self.decay = decay
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(dim, dtype=precise_dtype()))
        self.register_buffer("covariance", torch.zeros(dim, dim, dtype=precise_dtype()))

    @torch.no_grad()
    def update(self, latents: Tensor) -> None:
        """Take in a batch of latents (..., D). Raises ValueError for another D."""
        if latents.shape[-1:] != self.mean.shape:
            raise ValueError(
                f"latents must be (..., D) with D = {len(self.mean)}, got {tuple(latents.shape)}"
            )
        rows = latents.detach().reshape(-1, latents.shape[-1]).to(self.mean.dtype)
        batch_mean = mean_over_replicas(rows.mean(0))
        shift, centred = batch_mean - self.mean, rows - batch_mean
        with without_autocast(rows.device.type):  # sums of squares leave float16's range
            products = centred.T @ centred
        batch_covariance = mean_over_replicas(products / len(rows))
        finite = batch_covariance.isfinite().all()
        self.batches += finite
        weight = (1 / self.batches).clamp(min=1 - self.decay)
        spread = batch_covariance + (1 - weight) * shift.outer(shift)
        self.mean.copy_(self.mean.lerp(batch_mean, weight).where(finite, self.mean))
        self.covariance.copy_(self.covariance.lerp(spread, weight).where(finite, self.covariance))

    def value(self) -> Tensor:
        """T_c, (), in float32 at least, the same bits on every replica; zero before an update."""
        return 2 * from_first_replica(torch.linalg.eigvalsh(self.covariance)[-1])
