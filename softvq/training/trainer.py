"""The training loop."""

import dataclasses
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from itertools import islice
from pathlib import Path

import torch

from softvq import metrics
from softvq.training import ranks
from softvq.training.advice import memory_advice, warn_of_collapse
from softvq.training.checkpoint import Progress, Stateful, load_checkpoint, newest_step, sha256
from softvq.training.config import TrainConfig
from softvq.training.display import Display
from softvq.training.engine import Engine
from softvq.training.finish import finish
from softvq.training.guards import TrainingError
from softvq.training.load import check_apart, load_task
from softvq.training.lock import locked
from softvq.training.memory import peak_memory
from softvq.training.optimizer import build_optimizer, set_learning_rates
from softvq.training.origin import Origin
from softvq.training.outbox import Outbox
from softvq.training.resume import resume_run
from softvq.training.run_folder import RunFolder, model_bytes
from softvq.training.task import Examples, Task
from softvq.training.tensorboard import Board, check_tensorboard
from softvq.training.trace import check_trace, traced


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

    With `resume`, `config` must be the run's own, but for where things lie and how they are done;
    it is kept. profile: steps to write a trace of, trace.json.
    tensorboard: also write event files. Under torchrun all ranks train together, and the first one
    writes. Raises DataError, ConfigError, RunError and TrainingError, each before anything is lost.
    """
    run = RunFolder(out)
    writes = ranks.is_first()
    if tensorboard:
        check_tensorboard()
    check_apart(config, out)
    with locked(out) if writes else nullcontext(), memory_advice(config):
        with ranks.joined(config.device) as device:
            if writes:
                if not resume:
                    run.check(overwrite)
                run.sweep()
            asked = config.batch_size
            config, task = load_task(config, device, quiet=quiet or not writes)
            # As given, however few images there are: the same command then resumes the run.
            kept = dataclasses.replace(config, batch_size=asked)
            done = newest_step(run.checkpoints) if resume else 0
            check_trace(profile, config.steps - done)
            if not resume and writes:
                run.create(kept)
            board = Board(run.events) if tensorboard and writes else None
            trainer = Trainer(config, run, task, device, quiet=quiet, profile=profile, board=board)
            if resume:
                trainer.resume()
                if writes:
                    run.write_config(kept)
            finished = trainer.run_to_the_end()
        if finished and writes:
            trainer.finish()
        return finished


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
        ranks.start_alike(self.model)
        self.optimizer = build_optimizer(config, self.model)
        self.progress = Progress()
        self.losses = metrics.Mean()
        self.writes, self.ranks = ranks.is_first(), ranks.count()
        self.outbox = Outbox(run, writes=self.writes)
        self.display = Display(config, quiet=quiet or not self.writes)
        self.engine = Engine(config, task, self.optimizer, device, self.display.note)
        self.guard = self.engine.guard

    @property
    def parts(self) -> dict[str, Stateful]:
        """What a checkpoint holds besides the progress and the random state."""
        return {
            "origin": Origin(self.run.path, self.task.shape),  # before what may not fit it
            "model": self.model,
            "steering": self.task.steering,
            "optimizer": self.optimizer,
            "losses": self.losses,
        }

    def resume(self) -> None:
        """Go back to the newest checkpoint. Raises RunError."""
        with ranks.first_rank_first():
            if self.writes:
                self.progress = resume_run(self.run, self.parts, self.task.shape, self.config.steps)
            else:
                self.progress = load_checkpoint(self.run.checkpoints, self.parts)[0] or Progress()
        if self.board:
            self.board.drop_after(self.progress.step)

    def run_to_the_end(self) -> bool:
        """Train, validate, save. False if stopped by a signal to any rank."""
        if self.progress.step == 0:
            self._save()
            self.task.start(next(self._batches()))
        trace = traced(self.run.trace, self.profile if self.writes else 0)
        loaded = closing(self._batches())
        with self.display, stop_signals() as received, trace as taken, loaded as to_come:
            for batch in to_come:
                try:
                    self._step(batch)
                    taken()
                except (ValueError, torch.linalg.LinAlgError):
                    self.guard.raise_if_bad()  # numbers that are not finite make both
                    raise
                stopped = ranks.any_rank(bool(received))
                if self._due(self.config.evaluate_every):
                    self._log()
                    self._validate()
                best = self.progress.best_step == self.progress.step
                due = best or self._due(self.config.checkpoint_every)
                saved = (due or stopped) and self._save()
                if stopped and self.progress.step < self.config.steps:
                    self.display.stopped(self.progress.step, self.run.path, saved=saved)
                    return False
        self.outbox.close()
        return True

    def finish(self) -> None:
        """The test split, pictures and report of the best weights."""
        with memory_advice(self.config, of_batch=False), self._completable():
            test = finish(self.config, self.run, self.task, self.progress, self.device, self.ranks)
        if self.board:
            self.board.write(self.progress.step, "test", test)
            self.board.close()
        self.display.finished(test, self.run.report)

    @contextmanager
    def _completable(self) -> Iterator[None]:
        """Say, when Ctrl-C ends the block, that all steps are done."""
        try:
            yield
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                " before the end of the test split; complete the run: softvq train --out "
                f"{self.run.path} --resume"
            ) from None

    def _batches(self) -> Iterator[Examples]:
        """This rank's parts of the batches that are still to come."""
        whole = batches(
            *(self.task.examples, self.config.batch_size, self.config.seed, self.progress.step),
            self.task.indexed_on,
        )
        left = islice(whole, self.config.steps - self.progress.step)
        loaded = self.task.load(map(ranks.part_of, left))
        while True:
            started = time.perf_counter()
            batch = next(loaded, None)
            self.progress.seconds += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def _due(self, every: int) -> bool:
        return self.progress.step % every == 0 or self.progress.step == self.config.steps

    def _step(self, batch: Examples) -> None:
        started = time.perf_counter()
        self.model.train()
        set_learning_rates(self.optimizer, self.config, self.progress.step)
        ranks.seed_step(self.config.seed, self.progress.step, self.device)
        seen = self.engine.step(batch, self.progress.step + 1)
        self.progress.step += 1
        step = self.progress.step
        images = len(batch[0]) * self.ranks
        self.losses.add(seen.losses, images)
        self.progress.images += images
        self.progress.seconds += time.perf_counter() - started
        self.display.step(step, self.progress, seen.losses)

    def _log(self) -> None:
        """One line of training losses, averaged since the last one. Raises TrainingError."""
        started = time.perf_counter()
        values = self.guard.read(self.losses)  # what the device has still to do counts as training
        self.progress.seconds += time.perf_counter() - started
        values |= self.task.steering.gauges()
        values["learning_rate"] = float(self.optimizer.param_groups[0]["lr"])
        values["images_per_second"] = self.progress.images_per_second
        values["peak_memory"] = peak_memory(self.device)
        self._write("train", values)

    def _validate(self) -> None:
        """Metrics of the validation split; the best weights so far become the run's model."""
        with memory_advice(self.config, of_batch=False):
            values = self.task.evaluate("validation")
        self._write("validation", values)
        if self.board:
            self.board.show(self.progress.step, self.task.rows())
        if values[self.task.judged_by] < self.progress.best_error:
            self.progress.best_error = values[self.task.judged_by]
            self.progress.best_step = self.progress.step
            weights = model_bytes(self.model.state_dict(), self.task.shape)
            self.progress.best_sha256 = sha256(weights)
            self.outbox.model(weights)
        warn_of_collapse(self.config, self.progress, self.model.levels, values)
        self.display.validated(self.progress.step, values)

    def _write(self, split: str, values: dict[str, float]) -> None:
        self.outbox.metrics(self.progress.step, split, values)
        if self.board:
            self.board.write(self.progress.step, split, values)

    def _save(self) -> bool:
        """Write a checkpoint; False if the disk is full. Raises TrainingError."""
        self.guard.raise_if_bad()
        self._check_weights()
        return self.outbox.checkpoint(self.progress, self.parts)

    def _check_weights(self) -> None:
        if not all(tensor.isfinite().all() for tensor in self.model.state_dict().values()):
            raise TrainingError(
                f"the weights became infinite or not a number before step {self.progress.step}; "
                "the last checkpoint is good: lower --lr, or look for broken images"
            )


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
    per_epoch = images // batch_size
    step = start
    while True:
        epoch = step // per_epoch
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(images, generator=generator).to(device)
        for position in range(step % per_epoch, per_epoch):
            yield order[position * batch_size : (position + 1) * batch_size]
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
