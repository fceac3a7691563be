"""The temperature of a run: schedule, automatic start, and the codebook that goes with it."""

import torch
from torch import Tensor, nn

from softvq.distributed.collectives import from_first_replica
from softvq.quantizers import SoftVQ
from softvq.schedules import CriticalTemperature, annealed
from softvq.training.config import TrainConfig

START = 0.95  # of the critical temperature: just under it
FALLING = 0.8  # of the run; then T stays, and codes and decoder settle
MEASURE_EVERY = 10  # steps between two eigenvalue problems
LOWEST = 1e-4  # of the start: codes that fit exactly would bring T to zero
DECAY = 0.98  # of the running quantizing error
SPREAD = 0.1  # of the codes around the mean at the start, in standard deviations of the data


class Temperature(nn.Module):
    """Sets the quantizer's temperature each step.

    It falls from just under the critical temperature of the latents, measured again as the encoder
    moves, to 2·E(z−q)² per element: the temperature at which the mixture of Gaussians that p
    belongs to, of variance T/2, is as wide as the error the codes leave. Either end can be given
    instead. The codes start close together at the mean and part as T falls.
    """

    def __init__(self, config: TrainConfig, quantizer: SoftVQ):
        super().__init__()
        self.schedule = config.temperature_schedule
        self.fixed_start = None if config.temperature == "auto" else float(config.temperature)
        ratio = config.temperature_ratio
        self.fixed_ratio = None if ratio == "auto" else float(ratio)
        self.critical = CriticalTemperature(quantizer.codebook_dim)
        self.register_buffer("critical_value", torch.zeros(()))
        self.register_buffer("quantizing_error", torch.zeros(()))

    @torch.no_grad()
    def start(self, quantizer: SoftVQ, latents: Tensor) -> None:
        """Measure first latents (..., D), place the codes among them, set T."""
        self.critical.update(latents)
        self.critical_value.copy_(self.critical.value())
        variance = 0.5 * self.critical_value
        self.quantizing_error.copy_(variance)
        noise = from_first_replica(torch.randn_like(quantizer.codebook))
        quantizer.codebook.copy_(self.critical.mean + SPREAD * variance.sqrt() * noise)
        quantizer.set_temperature(self._at(0.0))

    @torch.no_grad()
    def update(
        self,
        quantizer: SoftVQ,
        latents: Tensor,
        quantizing_error: Tensor,
        progress: float | Tensor,
    ) -> None:
        """Take in a step's latents (..., D) and mean (z−q)², and set T for the next one."""
        self.critical.update(latents)
        self.quantizing_error.lerp_(quantizing_error, 1 - DECAY)
        self._set(quantizer, progress)

    @torch.no_grad()
    def measure(self, quantizer: SoftVQ, step: int, progress: float) -> None:
        """After `update`: now and then find the critical temperature again, and T with it."""
        if step % MEASURE_EVERY == 0:
            self.critical_value.copy_(self.critical.value())
            self._set(quantizer, progress)

    def _set(self, quantizer: SoftVQ, progress: float | Tensor) -> None:
        if self.schedule != "learned":
            quantizer.set_temperature(self._at(progress))

    def _at(self, progress: float | Tensor) -> Tensor:
        start = START * self.critical_value
        if self.fixed_start is not None:
            start = torch.full_like(self.critical_value, self.fixed_start)
        end = torch.maximum(2 * self.quantizing_error, LOWEST * start)
        if self.fixed_ratio is not None:
            end = self.fixed_ratio * start
        return annealed(self.schedule, progress / FALLING, start, end)
