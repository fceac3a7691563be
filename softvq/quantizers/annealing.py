"""The temperature of a SoftVQ by its data: where it starts, how it falls, where it ends."""

from typing import get_args

import torch
from torch import Tensor

from softvq.checks import check_choice, check_temperatures
from softvq.distributed.collectives import from_first_replica, mean_over_replicas
from softvq.precise import KeepsFloat32, precise_dtype
from softvq.quantizers.soft import SoftVQ
from softvq.schedules import CriticalTemperature, Schedule, annealed

START = 0.95  # of the critical temperature: just under it
FALLING = 0.8  # of the run; then T stays, and codes and decoder settle
LOWEST = 1e-4  # of the start: codes that fit exactly would bring T to zero
DECAY = 0.98  # of the running quantizing error
SPREAD = 0.1  # of the codes around the mean at the start, in standard deviations of the data


class Annealing(KeepsFloat32):
    """Sets the temperature of a SoftVQ each step, so that nobody has to pick it.

    It falls from just under the critical temperature of the latents, measured again as the encoder
    moves, to 2·E(z−q)² per element: the temperature at which the mixture of Gaussians that p
    belongs to, of variance T/2, is as wide as the error the codes leave. Either end can be given
    instead. The codes start close together at the mean and part as T falls.

    Call `start` with the first latents, then after each step `update`, and now and then `measure`.
    Latents are what meets the codes, (..., D), as `SoftVQ.latents` has it. Its state belongs in a
    checkpoint; the quantizer's is not part of it.

    Args:
        quantizer: whose codes and temperature are set.
        schedule: how T falls; "constant": not at all; "learned": nobody but `start` sets it.
        temperature: at the start, a number; None: 0.95 of the critical one.
        ratio: of the end to the start, a number; None: it ends as said above.

    Raises:
        TypeError, ValueError: a schedule, temperature or ratio that is not allowed.
    """

    in_float32 = ("critical_value", "quantizing_error")

    def __init__(
        self,
        quantizer: SoftVQ,
        schedule: Schedule = "exponential",
        *,
        temperature: float | None = None,
        ratio: float | None = None,
    ):
        super().__init__()
        check_choice("schedule", schedule, get_args(Schedule))
        if temperature is not None:
            check_temperatures(temperature=temperature)
        if ratio is not None and not 0 < ratio <= 1:
            raise ValueError(f"ratio must be a number above 0, up to 1, got {ratio}")
        self.quantizer = (quantizer,)  # in a tuple: its weights are not part of this state
        self.schedule = schedule
        self.fixed_start, self.fixed_ratio = temperature, ratio
        self.critical = CriticalTemperature(quantizer.codebook_dim)
        for name in self.in_float32:
            self.register_buffer(name, torch.zeros((), dtype=precise_dtype()))

    @torch.no_grad()
    def start(self, latents: Tensor) -> None:
        """Measure first latents, place the codes among them, set T. Waits for the device.

        Raises ValueError, and moves nothing, where latents are of another D, all alike, or not
        finite.
        """
        (quantizer,) = self.quantizer
        self.critical.update(latents)
        critical_value = self.critical.value()
        if not critical_value > 0:
            raise ValueError(
                "latents must be finite and differ from each other, or they have no temperature"
            )
        self.critical_value.copy_(critical_value)
        variance = 0.5 * self.critical_value
        self.quantizing_error.copy_(variance)
        noise = from_first_replica(torch.randn_like(quantizer.codebook))
        quantizer.codebook = self.critical.mean + SPREAD * variance.sqrt() * noise
        quantizer.set_temperature(self._at(0.0))

    @torch.no_grad()
    def update(self, latents: Tensor, quantizing_error: Tensor, progress: float | Tensor) -> None:
        """Take in a step's latents and mean (z−q)², and set T for the next one.

        A step is that of all replicas of a data-parallel run; numbers that are not finite are left
        out. No device is waited for. progress: the share of the run that is over, a number or ().
        """
        self.critical.update(latents)
        error = mean_over_replicas(quantizing_error.to(self.quantizing_error))
        error = error.where(error.isfinite(), self.quantizing_error)
        self.quantizing_error.lerp_(error, 1 - DECAY)
        self._set(progress)

    @torch.no_grad()
    def measure(self, progress: float | Tensor) -> None:
        """Find the critical temperature again, an eigenvalue problem, and T with it."""
        self.critical_value.copy_(self.critical.value())
        self._set(progress)

    def _set(self, progress: float | Tensor) -> None:
        if self.schedule != "learned":
            self.quantizer[0].set_temperature(self._at(progress))

    def _at(self, progress: float | Tensor) -> Tensor:
        start = START * self.critical_value
        if self.fixed_start is not None:
            start = torch.full_like(self.critical_value, self.fixed_start)
        end = torch.maximum(2 * self.quantizing_error, LOWEST * start)
        if self.fixed_ratio is not None:
            end = self.fixed_ratio * start
        return annealed(self.schedule, progress / FALLING, start, end)
