"""Quantizers with a temperature."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from softvq.checks import check_temperatures
from softvq.functional import temperature_tensor
from softvq.precise import precise_dtype
from softvq.quantizers.base import Quantizer


class TemperedQuantizer(Quantizer):
    """A quantizer with a temperature > 0, kept as its logarithm: a 0-d buffer or parameter."""

    in_float32 = ("log_temperature",)

    def __init__(self, *sizes: Any, temperature: float, learn: bool = False, **options: Any):
        super().__init__(*sizes, **options)
        check_temperatures(temperature=temperature)
        log_temperature = torch.tensor(math.log(temperature), dtype=precise_dtype())
        if learn:
            self.log_temperature = nn.Parameter(log_temperature)
        else:
            self.register_buffer("log_temperature", log_temperature)

    @property
    def temperature(self) -> Tensor:
        """T, a 0-d tensor, computed when it is read: `set_temperature` changes it."""
        return self.log_temperature.exp()

    @torch.no_grad()
    def set_temperature(self, temperature: float | Tensor) -> None:
        """Set T in place, without a host synchronisation when it is a tensor.

        Raises:
            TypeError, ValueError: neither a number nor a 0-d tensor, or one below 1e-20 or above
                1e20; a tensor on a GPU is not read.
        """
        log = self.log_temperature
        log.copy_(temperature_tensor(temperature, log.device, log.dtype).log())
