"""What moves a quantizer from outside its loss: temperatures, and codes that died."""

import torch
from torch import Tensor, nn

from softvq.models import LEVEL, ImageModel, SoftVQVAE, TrainingStep
from softvq.quantizers import Annealing, DeadCodeRestart, GumbelVQ, SoftVQ
from softvq.quantizers.annealing import FALLING
from softvq.schedules import annealed
from softvq.training.config import TrainConfig

MEASURE_EVERY = 10  # steps between two eigenvalue problems
RESTART_EVERY = 25  # steps between two looks for dead codes
# Share of the run: before it the codes still lie together, after it they should settle.
RESTART_FROM, RESTART_UNTIL = 0.3, 0.9


class Steering(nn.Module):
    """Steers nothing: the quantizers that need no help, and models without one."""

    def start(self, model: ImageModel, images: Tensor) -> None:
        """Look at a first batch of images (B, C, H, W) in [0, 1] before any step."""

    def follow(self, seen: TrainingStep, progress: float | Tensor) -> None:
        """After a step: what is the same every time, and no device is waited for.

        progress: the step's share of the run.
        """

    def correct(self, seen: TrainingStep, step: int, progress: float) -> None:
        """After `follow` of step number `step`: what is only now and then to be done."""

    def gauges(self) -> dict[str, float]:
        """What to log beside the losses."""
        return {}


class SoftSteering(Steering):
    """The temperature of a SoftVQ by its data, and the restart of its dead codes."""

    def __init__(self, config: TrainConfig, quantizer: SoftVQ):
        super().__init__()
        temperature, ratio = (
            None if end == "auto" else float(end)
            for end in (config.temperature, config.temperature_ratio)
        )
        self.annealing = Annealing(
            quantizer, config.temperature_schedule, temperature=temperature, ratio=ratio
        )
        self.restart = DeadCodeRestart(config.codebook_size, config.dead_code_threshold)

    @torch.no_grad()
    def start(self, model: SoftVQVAE, images: Tensor) -> None:
        """Place the codes among the first latents, and set T."""
        self.annealing.start(model.encode(images).mean)

    def follow(self, seen: TrainingStep, progress: float | Tensor) -> None:
        """Set T for the next step, and count the codes."""
        self.annealing.update(seen.latents[LEVEL], seen.losses["quantizing_error"], progress)
        self.restart.update(seen.indices[LEVEL])

    def correct(self, seen: TrainingStep, step: int, progress: float) -> None:
        """Measure where T is critical; move dead codes to latents."""
        (quantizer,) = self.annealing.quantizer
        if step % MEASURE_EVERY == 0:
            self.annealing.measure(progress)
        if step % RESTART_EVERY == 0 and RESTART_FROM < progress < RESTART_UNTIL:
            self.restart.restart(quantizer.codebook, seen.latents[LEVEL])

    def gauges(self) -> dict[str, float]:
        """T, and where it would be critical."""
        (quantizer,) = self.annealing.quantizer
        return {
            "temperature": quantizer.temperature.item(),
            "critical_temperature": self.annealing.critical_value.item(),
        }


class GumbelSteering(Steering):
    """The temperature of a GumbelVQ, between two given numbers."""

    def __init__(self, config: TrainConfig, quantizer: GumbelVQ):
        super().__init__()
        self.steered = (quantizer,)  # in a tuple: its weights are not part of this state
        self.schedule = config.temperature_schedule
        self.first = float(config.temperature)
        self.last = float(config.temperature_ratio) * self.first

    def follow(self, seen: TrainingStep, progress: float | Tensor) -> None:
        """Set T for the next step."""
        value = annealed(self.schedule, progress / FALLING, self.first, self.last)
        self.steered[0].set_temperature(value)

    def gauges(self) -> dict[str, float]:
        """T."""
        return {"temperature": self.steered[0].temperature.item()}


def build_steering(config: TrainConfig, model: ImageModel) -> Steering:
    """What the model's quantizer needs."""
    quantizer = model.quantizers.get(LEVEL)
    if isinstance(quantizer, SoftVQ):
        return SoftSteering(config, quantizer)
    if isinstance(quantizer, GumbelVQ):
        return GumbelSteering(config, quantizer)
    return Steering()
