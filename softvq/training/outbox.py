"""What a run writes while it trains: a full disk delays it, and is no reason to stop."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from softvq.training.checkpoint import Progress, Stateful, save_checkpoint
from softvq.training.files import write_bytes
from softvq.training.run_folder import RunError, RunFolder
from softvq.training.warn import warn

FULL = (errno.ENOSPC, errno.EDQUOT)


class Outbox:
    """Keeps lines and weights that found the disk full, and tries again with the next ones.

    A checkpoint is written only after them: it never knows of more than the other files do. Of
    several ranks one writes.
    """

    def __init__(self, run: RunFolder, *, writes: bool = True):
        self.run, self.writes = run, writes
        self._lines: list[tuple[int, str, dict[str, float]]] = []
        self._model: bytes | None = None
        self._reported = False

    def metrics(self, step: int, split: str, values: dict[str, float]) -> None:
        """Add one line to metrics.jsonl."""
        if not self.writes:
            return
        self._lines.append((step, split, values))
        with self._patient():
            self._flush()

    def model(self, data: bytes) -> None:
        """Replace model.safetensors."""
        if not self.writes:
            return
        self._model = data
        with self._patient():
            self._flush()

    def checkpoint(self, progress: Progress, parts: dict[str, Stateful]) -> bool:
        """Save a checkpoint; False when the disk is full."""
        if not self.writes:
            return True
        with self._patient():
            self._flush()
            save_checkpoint(self.run.checkpoints, progress, parts)
            self._reported = False
            return True
        return False

    def close(self) -> None:
        """Write what is left. Raises RunError when the disk is still full."""
        with self._patient():
            self._flush()
        if self._lines or self._model is not None:
            raise RunError(
                f"{self.run.path}: the disk is full; make room and finish the run with --resume"
            )

    def _flush(self) -> None:
        while self._lines:
            self.run.append_metrics(*self._lines[0])
            del self._lines[0]
        if self._model is not None:
            write_bytes(self.run.model, self._model)
            self._model = None

    @contextmanager
    def _patient(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in FULL:
                raise
            if not self._reported:
                warn(
                    f"{self.run.path}: cannot be written ({error.strerror}); what is there is kept "
                    "and the run goes on, trying again at every validation and checkpoint"
                )
            self._reported = True
