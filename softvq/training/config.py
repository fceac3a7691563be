"""One dataclass holds every setting; the command line, config.toml and the model follow it."""

import dataclasses
import difflib
import math
import re
import tomllib
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tomli_w
import torch

from softvq.data import DATASETS
from softvq.functional import Estimator
from softvq.models.soft_vqvae import Architecture, Codes, DecoderInput
from softvq.quantizers.soft import CodebookLoss
from softvq.schedules import Schedule

EPOCHS, MIN_STEPS = 15, 1500  # of a run that is not told how long to be


class ConfigError(ValueError):
    """A setting that is not allowed; its one line names it, its value and what is allowed."""


def setting(default: Any, group: str, help: str) -> Any:
    """A field of TrainConfig, with what the command line says about it."""
    return field(default=default, metadata={"group": group, "help": help})


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run. Optional values left at None are chosen from the data."""

    model: Literal["soft-vqvae"] = setting("soft-vqvae", "model", "which model to train")
    architecture: Architecture = setting("conv", "model", "convolutional or dense networks")
    latent_dim: int = setting(16, "model", "features D of a latent vector and of a code")
    latent_grid: str | None = setting(
        None,
        "model",
        "latent vectors per image, as 7 or 7x5; default: a quarter of the image, "
        "1 for dense networks",
    )
    codebook_size: int = setting(128, "model", "number of codes K")
    decoder_input: DecoderInput = setting(
        "latent", "model", "the decoder reads z, the quantizer beside it, or reads q"
    )
    width: int = setting(32, "model", "channels of the first conv layer; doubles at each halving")
    residual_blocks: int = setting(1, "model", "residual blocks at the latent grid")
    hidden: str = setting("256,64", "model", "sizes of the dense hidden layers")

    data: Literal[DATASETS] = setting("digits", "data", "which images")
    data_dir: Path | None = setting(None, "data", "where they are, or go; default: ./data")
    image_size: str | None = setting(None, "data", "resize and crop all images, as 64 or 64x48")
    validation_fraction: float = setting(0.1, "data", "share of the training images held out")

    codebook_loss: CodebookLoss = setting("free_energy", "losses", "what trains the codes")
    estimator: Estimator = setting("soft", "losses", "value of q: soft, or the nearest code")
    reconstruction_loss: Literal["squared", "absolute"] = setting(
        "squared", "losses", "difference that is trained; metrics are always squared"
    )
    reconstruction_weight: float = setting(1e4, "losses", "weight of ‖X−X̂‖² (a mean)")
    quantizing_weight: float = setting(1.0, "losses", "weight of the codebook loss")
    kl_weight: float = setting(1.0, "losses", "weight of the KL; 0: a deterministic encoder")
    reconstruction_quantizing_weight: float = setting(
        1.0, "losses", "weight of ‖X−Decoder(sg[codes])‖², times the reconstruction's"
    )
    quantized_codes: Codes = setting("nearest", "losses", "the codes that loss decodes")
    commitment_weight: float = setting(
        0.0, "losses", "share of the codebook loss's gradient that reaches the latents"
    )
    dead_code_threshold: float = setting(
        0.01, "losses", "restart codes under this part of an even share of the latents; 0: never"
    )

    temperature: str = setting(
        "auto", "temperature", "where T starts: a number, or auto: just under the critical one"
    )
    temperature_schedule: Schedule = setting("exponential", "temperature", "how T falls")
    temperature_ratio: str = setting(
        "auto",
        "temperature",
        "T at the end over T at the start, or auto: ends where T/2 is the codes' own error",
    )

    steps: int | None = setting(
        None, "optimisation", f"optimizer steps; default: {EPOCHS} epochs, at least {MIN_STEPS}"
    )
    batch_size: int = setting(256, "optimisation", "images per step")
    lr: float = setting(2e-3, "optimisation", "peak learning rate of AdamW; cosine decay")
    codebook_lr_factor: float = setting(30.0, "optimisation", "learning rate of the codes over lr")
    weight_decay: float = setting(0.0, "optimisation", "of the networks; codes have none")
    seed: int = setting(0, "optimisation", "of everything random, the validation split included")

    device: Literal["auto", "cpu", "cuda"] = setting("auto", "run", "where to compute")
    evaluate_every: int | None = setting(
        None, "run", "steps between validations; default: 20 in all"
    )
    checkpoint_every: int | None = setting(
        None, "run", "steps between checkpoints; default: as evaluate_every"
    )

    def __post_init__(self) -> None:
        for name, kind in value_types().items():
            value = getattr(self, name)
            if value is not None:
                _check_type(name, value, kind)
        for name in ("latent_dim", "codebook_size", "width", "steps"):
            _check(name, getattr(self, name), lambda v: v >= 1, "at least 1")
        for name in ("evaluate_every", "checkpoint_every"):
            _check(name, getattr(self, name), lambda v: v >= 1, "at least 1")
        _check("batch_size", self.batch_size, lambda v: v >= 2, "at least 2, for the batch norms")
        _check("seed", self.seed, lambda v: 0 <= v < 2**32, "from 0 to 2^32 − 1")
        _check("residual_blocks", self.residual_blocks, lambda v: v >= 0, "at least 0")
        for name in ("reconstruction_weight", "lr", "codebook_lr_factor"):
            _check(name, getattr(self, name), lambda v: 0 < v < math.inf, "a number above 0")
        for name in (
            *("quantizing_weight", "kl_weight", "reconstruction_quantizing_weight"),
            *("commitment_weight", "weight_decay", "dead_code_threshold"),
        ):
            _check(name, getattr(self, name), lambda v: 0 <= v < math.inf, "a number from 0 up")
        _check(
            "validation_fraction", self.validation_fraction, lambda v: 0 < v < 1, "between 0 and 1"
        )
        _check("temperature_ratio", self.temperature_ratio, _is_ratio, "auto or a number in (0, 1]")
        _check("temperature", self.temperature, _is_temperature, "auto or a number above 0")
        for name in ("latent_grid", "image_size"):
            _check(name, getattr(self, name), _is_size, "a size such as 7 or 7x5")
        _check(
            "hidden", self.hidden, re.compile(r"[1-9]\d*(,[1-9]\d*)*").fullmatch, "such as 256,64"
        )
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.temperature_schedule == "constant" and self.temperature == "auto":
            raise ConfigError(
                "temperature: auto starts just under the critical temperature and has to fall; "
                "give a number for temperature_schedule = constant"
            )
        if self.temperature_schedule == "learned" and self.codebook_loss != "likelihood":
            raise ConfigError(
                f"temperature_schedule: learned needs codebook_loss = likelihood, whose log T term "
                f"keeps T finite; under {self.codebook_loss} it would grow without end"
            )
        if self.decoder_input == "quantized" and self.codebook_loss == "detached_quantizing_error":
            raise ConfigError(
                "codebook_loss: detached_quantizing_error stops the gradient to the encoder, so it "
                "cannot go with decoder_input = quantized"
            )

    @property
    def image_size_pair(self) -> tuple[int, int] | None:
        """(height, width), or None to leave the images as they are."""
        return None if self.image_size is None else size_pair(self.image_size)

    @property
    def hidden_sizes(self) -> tuple[int, ...]:
        """ "256,64" → (256, 64)."""
        return tuple(int(size) for size in self.hidden.split(","))

    def resolved(self, image_shape: tuple[int, int, int], train_images: int) -> "TrainConfig":
        """Fill what was left to the data: grid, steps, cadences, device. Nothing stays open."""
        _, height, width = image_shape
        quarter = f"{max(height // 4, 1)}x{max(width // 4, 1)}"
        steps = self.steps or max(MIN_STEPS, EPOCHS * train_images // self.batch_size)
        every = self.evaluate_every or max(1, steps // 20)
        return dataclasses.replace(
            self,
            latent_grid=self.latent_grid or ("1x1" if self.architecture == "dense" else quarter),
            data_dir=None if self.data_dir is None else self.data_dir.absolute(),
            steps=steps,
            evaluate_every=every,
            checkpoint_every=self.checkpoint_every or every,
        )

    def to_toml(self) -> str:
        """The settings as `read_config` reads them, without those left open."""
        values = dataclasses.asdict(self)
        return tomli_w.dumps(
            {
                name: str(value) if isinstance(value, Path) else value
                for name, value in values.items()
                if value is not None
            }
        )


def torch_device(name: str = "auto") -> torch.device:
    """The device of a name; "auto" is a GPU when there is one. Raises ConfigError."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda is not available here; allowed: auto, cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def read_config(path: Path) -> dict[str, Any]:
    """Settings of a TOML file, checked against the known names.

    Raises ConfigError for a missing or malformed file and for an unknown key.
    """
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML ({error})") from error
    for name, value in values.items():
        kind = value_types().get(name)
        if kind is None:
            raise ConfigError(f"{path}: unknown setting {name!r}{nearest_hint(name)}")
        if kind is Path and isinstance(value, str):
            values[name] = Path(value)
        if kind is str and type(value) in (int, float):
            values[name] = str(value)  # latent_grid = 7, temperature = 0.5
    return values


def nearest_hint(name: str) -> str:
    """ ", did you mean …?" for a misspelt setting, or nothing."""
    close = difflib.get_close_matches(name, value_types(), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def value_types() -> dict[str, Any]:
    """The type of each setting without its None: a class or a Literal."""
    hints = get_type_hints(TrainConfig)
    return {
        name: next(a for a in get_args(hint) if a is not type(None))
        if get_origin(hint) is types.UnionType
        else hint
        for name, hint in hints.items()
    }


def size_pair(text: str) -> tuple[int, int]:
    """ "7" → (7, 7), "7x5" → (7, 5)."""
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def _check_type(name: str, value: Any, kind: Any) -> None:
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ConfigError(f"{name}: {value!r} is not one of {', '.join(get_args(kind))}")
    elif not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool):
        raise ConfigError(f"{name}: {value!r} is not a {kind.__name__}")


def _check(name: str, value: Any, allowed: Any, text: str) -> None:
    if value is not None and not allowed(value):
        raise ConfigError(f"{name}: {value} is not allowed; it must be {text}")


def _is_size(text: str) -> bool:
    return re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", text) is not None


def _is_temperature(text: str) -> bool:
    try:
        return text == "auto" or 0 < float(text) < math.inf
    except ValueError:
        return False


def _is_ratio(text: str) -> bool:
    return _is_temperature(text) and (text == "auto" or float(text) <= 1)
