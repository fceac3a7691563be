"""The training loop."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from softvq import metrics
from softvq.data import DataSplits
from softvq.models import SoftVQVAE
from softvq.quantizers import DeadCodeRestart
from softvq.training.build import build_data, build_model
from softvq.training.checkpoint import Progress, Stateful, load_checkpoint, save_checkpoint
from softvq.training.config import TrainConfig, torch_device
from softvq.training.evaluation import evaluate, to_pixels
from softvq.training.finish import finish
from softvq.training.progress import Display
from softvq.training.run_folder import RunFolder
from softvq.training.temperature import Temperature

WARMUP = 100  # steps until the learning rate is at its peak
RESTART_EVERY = 25  # steps between two looks for dead codes
# Share of the run: before it the codes still lie together, after it they should settle.
RESTART_FROM, RESTART_UNTIL = 0.3, 0.9
CODEBOOK_LR_FLOOR = 0.01  # of its peak: the codes follow T to the end


class TrainingError(Exception):
    """Training that cannot go on; its one line says at which step and why."""


def train(
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> bool:
    """Train into the run folder `out`; True when finished, False when stopped by a signal.

    With `resume`, `config` must be the run's own. Raises DataError, ConfigError, RunError and
    TrainingError, each before anything is lost.
    """
    run = RunFolder(out)
    device = torch_device(config.device)
    if not resume:
        run.check(overwrite)
    data = build_data(config)
    config = config.resolved(data.image_shape, len(data.train))
    torch.manual_seed(config.seed)
    model = build_model(config, data.image_shape)
    if not resume:
        run.create(config)
    trainer = Trainer(config, run, model, data, device, quiet=quiet)
    if resume:
        trainer.resume()
    return trainer.run_to_the_end()


class Trainer:
    """One run: the model, what moves it, and where it leaves its traces."""

    def __init__(
        self,
        config: TrainConfig,
        run: RunFolder,
        model: SoftVQVAE,
        data: DataSplits,
        device: torch.device,
        *,
        quiet: bool = False,
    ):
        self.config, self.run, self.data = config, run, data
        self.device = device
        self.model = model.to(self.device)
        self.temperature = Temperature(config, model.quantizer).to(self.device)
        self.restart = DeadCodeRestart(config.codebook_size, config.dead_code_threshold)
        self.restart.to(self.device)
        self.optimizer = build_optimizer(config, model)
        self.progress = Progress()
        self.losses = metrics.Mean()
        self.images = data.train.images.to(self.device)
        self.display = Display(config, quiet=quiet)

    @property
    def parts(self) -> dict[str, Stateful]:
        """What a checkpoint holds besides the progress and the random state."""
        return {
            "model": self.model,
            "temperature": self.temperature,
            "restart": self.restart,
            "optimizer": self.optimizer,
            "losses": self.losses,
        }

    def resume(self) -> None:
        """Go back to the newest checkpoint. Raises RunError."""
        self.progress = load_checkpoint(self.run.checkpoints, self.parts)
        self.run.drop_metrics_after(self.progress.step)

    def run_to_the_end(self) -> bool:
        """Train, validate, save; then the test split, pictures and report. False if stopped."""
        if self.progress.step == 0:
            self._start()
        with self.display, stop_signals() as stopped:
            for batch in batches(
                len(self.images), self.config.batch_size, self.config.seed, self.progress.step
            ):
                if self.progress.step >= self.config.steps:
                    break
                try:
                    self._step(batch.to(self.device))
                except (ValueError, torch.linalg.LinAlgError):
                    self._check_weights()  # numbers that are not finite make both
                    raise
                if self._due(self.config.evaluate_every):
                    self._log()
                    self._validate()
                if self._due(self.config.checkpoint_every) or stopped:
                    self._save()
                if stopped and self.progress.step < self.config.steps:
                    self.display.stopped(self.progress.step, self.run.path)
                    return False
        test = finish(self.config, self.run, self.data, self.progress, self.device)
        self.display.finished(test.values, self.run.report)
        return True

    def _due(self, every: int) -> bool:
        return self.progress.step % every == 0 or self.progress.step == self.config.steps

    def _start(self) -> None:
        """Let the first batch say where codes and temperature begin."""
        first = next(batches(len(self.images), self.config.batch_size, self.config.seed, 0))
        with torch.no_grad():
            latents = self.model.encode(to_pixels(self.images[first.to(self.device)], self.device))
        self.temperature.start(self.model.quantizer, latents.mean)

    def _step(self, batch: torch.Tensor) -> None:
        started = time.perf_counter()
        self.model.train()
        set_learning_rates(self.optimizer, self.config, self.progress.step)
        images = to_pixels(self.images[batch], self.device)
        parts, latents, indices = self.model(images)
        self.optimizer.zero_grad(set_to_none=True)
        parts["loss"].backward()
        self.optimizer.step()
        self.progress.step += 1
        step = self.progress.step
        self.temperature.update(
            self.model.quantizer,
            latents,
            parts["quantizing_error"],
            step,
            step / self.config.steps,
        )
        self.restart.update(indices)
        if step % RESTART_EVERY == 0 and RESTART_FROM < step / self.config.steps < RESTART_UNTIL:
            self.restart.restart(self.model.quantizer.codebook, latents)
        self.losses.add(parts, len(batch))
        self.progress.images += len(batch)
        self.progress.seconds += time.perf_counter() - started
        self.display.step(step, self.progress, parts)

    def _log(self) -> None:
        """One line of training losses, averaged since the last one. Raises TrainingError."""
        values = self.losses.read()
        if not math.isfinite(values["loss"]):
            raise self._diverged(f"the loss became {values['loss']}")
        values["temperature"] = self.model.quantizer.temperature.item()
        values["critical_temperature"] = self.temperature.critical_value.item()
        values["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        values["images_per_second"] = self.progress.images_per_second
        self.run.append_metrics(self.progress.step, "train", values)

    def _validate(self) -> None:
        """Metrics of the validation split; the best hard error so far becomes the model."""
        values = evaluate(self.model, self.data.validation, self.device).values
        self.run.append_metrics(self.progress.step, "validation", values)
        if values["reconstruction_hard_error"] < self.progress.best_error:
            self.progress.best_error = values["reconstruction_hard_error"]
            self.progress.best_step = self.progress.step
            self.run.save_model(self.model)
        self.display.validated(self.progress.step, values)

    def _save(self) -> None:
        """Write a checkpoint, unless the model is broken. Raises TrainingError."""
        self._check_weights()
        save_checkpoint(self.run.checkpoints, self.progress, self.parts)

    def _check_weights(self) -> None:
        if not all(tensor.isfinite().all() for tensor in self.model.state_dict().values()):
            raise self._diverged("the weights became infinite or not a number")

    def _diverged(self, what: str) -> TrainingError:
        return TrainingError(
            f"{what} before step {self.progress.step}; the last checkpoint is good: lower --lr, or "
            "look for broken images"
        )


def build_optimizer(config: TrainConfig, model: SoftVQVAE) -> torch.optim.Optimizer:
    """AdamW; the codes have a learning rate of their own and no weight decay."""
    codes = [model.quantizer.codebook_parameter]
    rest = [p for p in model.parameters() if p is not codes[0]]
    return torch.optim.AdamW(
        [{"params": rest, "weight_decay": config.weight_decay}, {"params": codes}],
        lr=config.lr,
        weight_decay=0.0,
        fused=True,
    )


def set_learning_rates(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int) -> None:
    """Linear warm-up, then half a cosine to zero; the codes keep a floor."""
    warm = min(1.0, (step + 1) / min(WARMUP, max(config.steps // 10, 1)))
    cosine = 0.5 * (1 + math.cos(math.pi * step / config.steps))
    networks, codes = optimizer.param_groups
    networks["lr"] = config.lr * warm * cosine
    codes["lr"] = config.lr * config.codebook_lr_factor * max(cosine, CODEBOOK_LR_FLOOR)


def batches(images: int, batch_size: int, seed: int, start: int) -> Iterator[torch.Tensor]:
    """Indices of each step's images, without end, beginning at step `start`.

    Every epoch is a permutation made from the seed and its number alone, so a resumed run sees
    what it would have seen. The last, smaller batch of an epoch is left out.
    """
    size = min(batch_size, images)
    per_epoch = images // size
    step = start
    while True:
        epoch = step // per_epoch
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(images, generator=generator)
        for position in range(step % per_epoch, per_epoch):
            yield order[position * size : (position + 1) * size]
            step += 1


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that is empty until SIGINT or SIGTERM arrives; a second one acts as usual."""
    received: list[int] = []
    previous = {}

    def note(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
