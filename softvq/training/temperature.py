"""The temperature of a run: schedule, automatic start, and the codebook that goes with it."""

import torch
from torch import Tensor, nn

from softvq.quantizers import SoftVQ
from softvq.schedules import CriticalTemperature, annealed
from softvq.training.config import TrainConfig

START = 0.95  # of the critical temperature: just under it
FALLING = 0.8  # of the run; then T stays, and codes and decoder settle
MEASURE_EVERY = 10  # steps between two eigenvalue problems
SPREAD = 0.1  # of the codes around the mean at the start, in standard deviations of the data


class Temperature(nn.Module):
    """Sets the quantizer's temperature each step.

    With temperature "auto" the unit is the critical temperature of the latents, measured again as
    the encoder moves, and the codes start close together at the mean: they part as T falls.
    """

    def __init__(self, config: TrainConfig, quantizer: SoftVQ):
        super().__init__()
        self.schedule = config.temperature_schedule
        self.ratio = config.temperature_ratio
        self.fixed_start = None if config.temperature == "auto" else float(config.temperature)
        self.critical = CriticalTemperature(quantizer.codebook_dim)
        self.register_buffer("critical_value", torch.zeros(()))

    @torch.no_grad()
    def start(self, quantizer: SoftVQ, latents: Tensor) -> None:
        """Measure first latents (..., D), place the codes among them, set T."""
        self.critical.update(latents)
        self.critical_value.copy_(self.critical.value())
        spread = SPREAD * (0.5 * self.critical_value).sqrt()
        noise = torch.randn_like(quantizer.codebook)
        quantizer.codebook.copy_(self.critical.mean + spread * noise)
        quantizer.set_temperature(self._at(0.0))

    @torch.no_grad()
    def update(self, quantizer: SoftVQ, latents: Tensor, step: int, progress: float) -> None:
        """Take in the latents of a step and set T for the next one."""
        self.critical.update(latents)
        if step % MEASURE_EVERY == 0:
            self.critical_value.copy_(self.critical.value())
        if self.schedule != "learned":
            quantizer.set_temperature(self._at(progress))

    def _at(self, progress: float) -> float | Tensor:
        factor = annealed(self.schedule, progress / FALLING, 1.0, self.ratio)
        if self.fixed_start is not None:
            return factor * self.fixed_start
        return factor * START * self.critical_value
