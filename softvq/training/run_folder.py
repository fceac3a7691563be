"""The run folder: where a training run leaves what it did, and how it is read again."""

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from softvq.training.build import build_model
from softvq.training.config import TrainConfig, read_config
from softvq.training.files import half_done, remove, write_text
from softvq.training.history import read_metrics
from softvq.training.settings import read_from
from softvq.training.warn import warn

# What a run leaves in its folder, as patterns below it. Nothing else there is ever removed.
OWN = (
    *("config.toml", "metrics.jsonl", "model.safetensors", "summary.json", "report.html"),
    *("trace.json", "eval-train.json", "eval-validation.json", "eval-test.json"),
    *("reconstructions.png", "samples.png", "codebook_usage.png"),
    *("codebook_usage_top.png", "codebook_usage_bottom.png"),
    *("checkpoints/step-*", "tensorboard/events.*"),
)


class RunError(Exception):
    """A run folder that cannot be used; its one line names it and says what to do."""


class RunFolder:
    """Paths and files of one run. Nothing in it is ever half-written under its own name."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.toml"
        self.metrics = path / "metrics.jsonl"
        self.model = path / "model.safetensors"
        self.summary = path / "summary.json"
        self.reconstructions = path / "reconstructions.png"
        self.samples = path / "samples.png"
        self.report = path / "report.html"
        self.checkpoints = path / "checkpoints"
        self.trace = path / "trace.json"
        self.events = path / "tensorboard"

    def usage(self, suffix: str) -> Path:
        """The histogram of the codebook whose names end in `suffix`."""
        return self.path / f"codebook_usage{suffix}.png"

    def check(self, overwrite: bool) -> None:
        """Raise RunError unless a new run can be written here; what is there stays untouched."""
        if self.config.exists():
            if not overwrite:
                raise RunError(
                    f"{self.path}: already holds a run; continue it with --resume, replace it with "
                    "--overwrite, or choose another folder with --out"
                )
        elif (foreign := self._foreign()) is not None:
            raise RunError(
                f"{self.path}: holds no run but other files, such as {foreign.name}; choose an "
                "empty or a new folder with --out"
            )

    def sweep(self) -> None:
        """Remove what a killed process left half-done."""
        for path in self._half_done():
            remove(path)

    def create(self, config: TrainConfig) -> None:
        """Begin a new run: remove an old one's files and write the configuration."""
        for path in self._own():
            remove(path)
        self.checkpoints.mkdir(exist_ok=True)
        self.write_config(config)

    def write_config(self, config: TrainConfig) -> None:
        """Keep the settings that the run goes on with."""
        write_text(self.config, config.to_toml())

    def _own(self) -> list[Path]:
        return [path for pattern in OWN for path in self.path.glob(pattern)]

    def _half_done(self) -> list[Path]:
        patterns = [Path(pattern) for pattern in OWN]
        return [path for p in patterns for path in half_done(self.path / p.parent, p.name)]

    def _foreign(self) -> Path | None:
        """Something here that no run leaves, or None."""
        folders = (self.path, self.checkpoints, self.events)
        known = {*self._own(), *self._half_done(), *folders, self.path / ".lock"}
        here = (path for folder in folders if folder.is_dir() for path in folder.iterdir())
        return next((path for path in here if path not in known), None)

    def has_checkpoint(self) -> bool:
        """Whether there is something to resume from."""
        return any(self.checkpoints.glob("step-*"))

    def read_config(self) -> TrainConfig:
        """Raises RunError when there is no run, and ConfigError."""
        if not self.config.is_file():
            raise RunError(f"{self.path}: no run there (no config.toml)")
        values = read_config(self.config)
        with read_from(self.config, values):
            return TrainConfig(**values)

    def append_metrics(self, step: int, split: str, values: dict[str, float]) -> None:
        """Add one line to metrics.jsonl; on the disk, or OSError and nothing has changed."""
        line = json.dumps({"step": step, "split": split, **values}).encode() + b"\n"
        with self.metrics.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.metrics))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(before)
                raise

    def drop_metrics_after(self, step: int) -> None:
        """Forget the lines a resumed run will write again, and lines that cannot be read."""
        lines, unreadable = read_metrics(self.metrics)
        if unreadable:
            warn(f"{self.metrics}: {unreadable} torn lines left out")
        kept = [line for line in lines if line["step"] <= step and line["split"] != "test"]
        write_text(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))

    def read_shape(self) -> dict[str, Any]:
        """What `model_bytes` was told of the data: a task's shape. Raises RunError."""
        return self._weights()[1]

    def fingerprint(self) -> str:
        """Which model this is: a digest of its weights. Raises RunError."""
        self.read_config()
        return hashlib.sha256(self._weights()[0]).hexdigest()[:16]

    def load_model(self, device: torch.device) -> nn.Module:
        """The best weights of the run, in eval mode. Raises RunError."""
        config = self.read_config()
        _, shape, tensors = self._weights()
        # A config.toml that was cut short leaves open what followed from the images.
        config = config.resolved(config.batch_size, shape.get("image_shape"))
        try:
            model = build_model(config, shape)
            model.load_state_dict(tensors)
        except (RuntimeError, KeyError) as error:
            raise RunError(f"{self.model}: does not fit the run's config.toml") from error
        return model.to(device).eval()

    def _weights(self) -> tuple[bytes, dict[str, Any], dict[str, Tensor]]:
        """The bytes of model.safetensors, the shape of the data, the weights. Raises RunError."""
        try:
            data = self.model.read_bytes()  # safetensors opens no path that is not UTF-8
            return data, _shape_in(data), load(data)
        except FileNotFoundError:
            raise RunError(f"{self.path}: no model.safetensors; the run has not finished") from None
        except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
            raise RunError(f"{self.model}: damaged ({error})") from error


def model_bytes(state: dict[str, Tensor], shape: dict[str, Any]) -> bytes:
    """model.safetensors: the weights, with the shape of the data they are for."""
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    return save(tensors, {"shape": json.dumps(shape)})


def _shape_in(data: bytes) -> dict[str, Any]:
    """The shape of the data in a model.safetensors. Raises TypeError, KeyError, ValueError."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["shape"])
