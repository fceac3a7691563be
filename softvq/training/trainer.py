"""The training loop."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from softvq import metrics
from softvq.training.build import build_data
from softvq.training.checkpoint import Progress, Stateful, load_checkpoint, save_checkpoint
from softvq.training.codes import check_prior, load_tokenizer
from softvq.training.config import PRIOR, TrainConfig, torch_device
from softvq.training.engine import Engine
from softvq.training.finish import finish
from softvq.training.images import ImageTask
from softvq.training.memory import peak_memory
from softvq.training.prior import PriorTask
from softvq.training.progress import Display
from softvq.training.run_folder import RunFolder
from softvq.training.task import Task
from softvq.training.tensorboard import Board, check_tensorboard
from softvq.training.trace import traced

WARMUP = 100  # steps until the learning rate is at its peak
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
    profile: int = 0,
    tensorboard: bool = False,
) -> bool:
    """Train into the run folder `out`; True when finished, False when stopped by a signal.

    With `resume`, `config` must be the run's own. profile: steps to write a trace of, trace.json.
    tensorboard: also write event files. Raises DataError, ConfigError, RunError and
    TrainingError, each before anything is lost.
    """
    run = RunFolder(out)
    device = torch_device(config.device)
    if tensorboard:
        check_tensorboard()
    if not resume:
        run.check(overwrite)
    elif config.model in PRIOR and run.model.exists():
        check_prior(run, RunFolder(config.tokenizer))
    config, task = load_task(config, device)
    if not resume:
        run.create(config)
    board = Board(run.events) if tensorboard else None
    trainer = Trainer(config, run, task, device, quiet=quiet, profile=profile, board=board)
    if resume:
        trainer.resume()
    return trainer.run_to_the_end()


def load_task(config: TrainConfig, device: torch.device) -> tuple[TrainConfig, Task]:
    """The resolved settings, and the untrained model they describe with its data."""
    if config.model in PRIOR:
        run = RunFolder(config.tokenizer)
        tokenizer, images = load_tokenizer(run, device), build_data(run.read_config())
        config = config.resolved(len(images.train))
        torch.manual_seed(config.seed)
        return config, PriorTask(config, tokenizer, images, device, run.fingerprint())
    images = build_data(config)
    config = config.resolved(len(images.train), images.image_shape)
    torch.manual_seed(config.seed)
    return config, ImageTask(config, images, device)


class Trainer:
    """One run: the model, what moves it, and where it leaves its traces."""

    def __init__(
        self,
        config: TrainConfig,
        run: RunFolder,
        task: Task,
        device: torch.device,
        *,
        quiet: bool = False,
        profile: int = 0,
        board: Board | None = None,
    ):
        self.profile, self.board = profile, board
        self.config, self.run, self.task, self.device = config, run, task, device
        self.model = task.model
        self.optimizer = build_optimizer(config, self.model)
        self.progress = Progress()
        self.losses = metrics.Mean()
        self.display = Display(config, quiet=quiet)
        self.engine = Engine(config, task, self.optimizer, device, self.display.note)

    @property
    def parts(self) -> dict[str, Stateful]:
        """What a checkpoint holds besides the progress and the random state."""
        return {
            "model": self.model,
            "steering": self.task.steering,
            "optimizer": self.optimizer,
            "losses": self.losses,
        }

    def resume(self) -> None:
        """Go back to the newest checkpoint. Raises RunError."""
        self.progress = load_checkpoint(self.run.checkpoints, self.parts)
        self.run.drop_metrics_after(self.progress.step)
        if self.board:
            self.board.drop_after(self.progress.step)

    def run_to_the_end(self) -> bool:
        """Train, validate, save; then the test split, pictures and report. False if stopped."""
        if self.progress.step == 0:
            self.task.start(next(self._batches()))
        trace = traced(self.run.trace, self.profile)
        with self.display, stop_signals() as stopped, trace as taken:
            for batch in self._batches():
                if self.progress.step >= self.config.steps:
                    break
                try:
                    self._step(batch)
                    taken()
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
        test = finish(self.config, self.run, self.task, self.progress, self.device)
        if self.board:
            self.board.write(self.progress.step, "test", test)
            self.board.close()
        self.display.finished(test, self.run.report)
        return True

    def _batches(self) -> Iterator[torch.Tensor]:
        """The batches that are still to come."""
        return batches(
            *(self.task.examples, self.config.batch_size, self.config.seed, self.progress.step),
            self.device,
        )

    def _due(self, every: int) -> bool:
        return self.progress.step % every == 0 or self.progress.step == self.config.steps

    def _step(self, batch: torch.Tensor) -> None:
        started = time.perf_counter()
        self.model.train()
        set_learning_rates(self.optimizer, self.config, self.progress.step)
        seen = self.engine.step(batch, self.progress.step + 1)
        self.progress.step += 1
        step = self.progress.step
        self.losses.add(seen.losses, len(batch))
        self.progress.images += len(batch)
        self.progress.seconds += time.perf_counter() - started
        self.display.step(step, self.progress, seen.losses)

    def _log(self) -> None:
        """One line of training losses, averaged since the last one. Raises TrainingError."""
        started = time.perf_counter()
        values = self.losses.read()  # what the device has still to do counts as training
        self.progress.seconds += time.perf_counter() - started
        if not math.isfinite(values["loss"]):
            raise self._diverged(f"the loss became {values['loss']}")
        values |= self.task.steering.gauges()
        values["learning_rate"] = float(self.optimizer.param_groups[0]["lr"])
        values["images_per_second"] = self.progress.images_per_second
        values["peak_memory"] = peak_memory(self.device)
        self._write("train", values)

    def _validate(self) -> None:
        """Metrics of the validation split; the best weights so far become the run's model."""
        values = self.task.evaluate("validation")
        self._write("validation", values)
        if self.board:
            self.board.show(self.progress.step, self.task.rows())
        if values[self.task.judged_by] < self.progress.best_error:
            self.progress.best_error = values[self.task.judged_by]
            self.progress.best_step = self.progress.step
            self.run.save_model(self.model, self.task.shape)
        self.display.validated(self.progress.step, values)

    def _write(self, split: str, values: dict[str, float]) -> None:
        self.run.append_metrics(self.progress.step, split, values)
        if self.board:
            self.board.write(self.progress.step, split, values)

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


def build_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW; codes that are parameters have a learning rate of their own and no weight decay."""
    codes, rest = [], []
    for name, parameter in model.named_parameters():
        (codes if name.endswith("codebook_parameter") else rest).append(parameter)
    groups = [{"params": rest, "weight_decay": config.weight_decay}]
    if codes:
        groups.append({"params": codes, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def set_learning_rates(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int) -> None:
    """Linear warm-up, then half a cosine to zero; the codes keep a floor."""
    warm = min(1.0, (step + 1) / min(WARMUP, max(config.steps // 10, 1)))
    cosine = 0.5 * (1 + math.cos(math.pi * step / config.steps))
    networks, *codes = optimizer.param_groups
    _set_rate(networks, config.lr * warm * cosine)
    for group in codes:
        floored = max(cosine, CODEBOOK_LR_FLOOR)
        _set_rate(group, config.lr * config.codebook_lr_factor * floored)


def _set_rate(group: dict[str, Any], rate: float) -> None:
    """In place where it is a tensor, which a recorded step reads."""
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def batches(
    images: int,
    batch_size: int,
    seed: int,
    start: int,
    device: torch.device = torch.device("cpu"),  # noqa: B008, it is a constant
) -> Iterator[torch.Tensor]:
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
        order = torch.randperm(images, generator=generator).to(device)
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
