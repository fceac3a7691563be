"""One dataclass holds every setting; the command line, config.toml and the model follow it."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from softvq.data import DATA_DIR, DATASETS, DOWNLOADED
from softvq.functional import Estimator
from softvq.models.networks import Architecture
from softvq.models.soft_vqvae import Codes, DecoderInput
from softvq.quantizers.soft import CodebookLoss
from softvq.schedules import Schedule
from softvq.training.allowed import check_combinations, check_values
from softvq.training.families import CONTINUOUS, EMA, GUMBEL, IMAGES, PRIOR, QUANTISED, SOFT, Model
from softvq.training.settings import (
    ConfigError,
    check_type,
    each,
    fill_defaults,
    read_toml,
    setting,
    text_of,
    value_types,
)

EPOCHS, MIN_STEPS = 15, 1500  # of a run that is not told how long to be
STREAM_ABOVE = 0.25  # of the memory of the device, or the machine: larger training sets
MOST_WORKERS = 8  # of a run that is not told how many
PIXEL_DEVIATION = 0.2  # of p(x|z) in a VAE that is not told its reconstruction weight


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run. Optional values left at None are chosen from model and data."""

    model: Model = setting("soft-vqvae", "model", "which model to train")
    architecture: Architecture | None = setting(
        each(IMAGES, "conv"), "model", "convolutional or dense networks"
    )
    latent_dim: int | None = setting(
        each(IMAGES, 16), "model", "features D of a latent vector and of a code"
    )
    latent_grid: str | None = setting(
        each(IMAGES, None),
        "model",
        "latent vectors per image, as 7 or 7x5; default: a quarter of the image, "
        "1 for dense networks and for models without codes",
    )
    codebook_size: int | None = setting(each(QUANTISED, 128), "model", "number of codes K")
    decoder_input: DecoderInput | None = setting(
        each(SOFT, "latent"), "model", "the decoder reads z, the quantizer beside it, or reads q"
    )
    width: int | None = setting(
        each(IMAGES, 32, pixelcnn=64),
        "model",
        "channels of the first conv layer, doubled at each halving; of every layer of a pixelcnn",
    )
    residual_blocks: int | None = setting(
        each(IMAGES, 1), "model", "residual blocks at the latent grid"
    )
    hidden: str | None = setting(
        each(IMAGES, "256,64"), "model", "sizes of the dense hidden layers"
    )
    layers: int | None = setting(each(PRIOR, 4), "model", "gated layers")
    dropout: float | None = setting(each(PRIOR, 0.0), "model", "dropout in the layers")

    data: Literal[DATASETS] | None = setting(each(IMAGES, "digits"), "data", "which images")
    data_dir: Path | None = setting(
        each(IMAGES, None), "data", "where they are, or go; default: ./data"
    )
    image_size: str | None = setting(
        each(IMAGES, None), "data", "resize and crop all images, as 64 or 64x48"
    )
    validation_fraction: float | None = setting(
        each(IMAGES, 0.1), "data", "share of the training images held out"
    )
    stream: Literal["auto", "on", "off"] | None = setting(
        each(IMAGES, "auto"),
        "data",
        "decode the pictures of a folder when they are needed, again and again, not all of them "
        f"into memory; auto: above {STREAM_ABOVE:.0%} of the memory",
    )
    workers: int | None = setting(
        each(IMAGES, None),
        "data",
        "processes that decode the pictures of a folder; 0: the training one; default: the cores "
        f"there are, up to {MOST_WORKERS}",
    )
    on_bad_image: Literal["stop", "skip"] | None = setting(
        each(IMAGES, "stop"),
        "data",
        "what to do at a picture of a folder that cannot be read: end, or leave it out",
    )
    tokenizer: Path | None = setting(
        each(PRIOR, None), "data", "run folder of the model whose codes to learn"
    )

    codebook_loss: CodebookLoss | None = setting(
        each(SOFT, "free_energy"), "losses", "what trains the codes"
    )
    estimator: Estimator | None = setting(
        each(SOFT, "soft", vqvae_gumbel="straight_through"),
        "losses",
        "value of q while training: soft, or one code",
    )
    reconstruction_loss: Literal["squared", "absolute"] | None = setting(
        each(IMAGES, "squared"),
        "losses",
        "difference that is trained; the metrics stay as they are",
    )
    reconstruction_weight: float | None = setting(
        each(QUANTISED, 10.0, soft_vqvae=1e4, ae=1.0, vae=None, cvae=None),
        "losses",
        "weight of ‖X−X̂‖² (a mean); default for vae and cvae: that of a Gaussian of deviation "
        f"{PIXEL_DEVIATION}",
    )
    quantizing_weight: float | None = setting(
        each(QUANTISED, 1.0), "losses", "weight of the codebook loss"
    )
    kl_weight: float | None = setting(
        each(SOFT, 1.0, vae=1.0, cvae=1.0),
        "losses",
        "weight of the KL; 0: a deterministic encoder",
    )
    reconstruction_quantizing_weight: float | None = setting(
        each(SOFT, 1.0), "losses", "weight of ‖X−Decoder(sg[codes])‖², times the reconstruction's"
    )
    quantized_codes: Codes | None = setting(
        each(SOFT, "nearest"), "losses", "the codes that the reconstruction-quantizing loss decodes"
    )
    commitment_weight: float | None = setting(
        each(SOFT, 0.0, vqvae=0.25, vqvae_ema=0.25, vqvae2=0.25),
        "losses",
        "weight of ‖z−sg[code]‖²; for a soft-vqvae whose decoder reads q the share of the codebook "
        "loss's gradient that reaches the latents",
    )
    entropy_weight: float | None = setting(
        each(QUANTISED, 0.0),
        "losses",
        "weight of the entropy of each assignment less that of their mean",
    )
    codebook_start: Literal["random", "kmeans"] | None = setting(
        each(("vqvae", *EMA), "kmeans"), "losses", "where the codes begin"
    )
    decay: float | None = setting(each(EMA, 0.95), "losses", "of the codes' running sums")
    dead_code_threshold: float | None = setting(
        each((*SOFT, *EMA), 0.2),
        "losses",
        "restart codes under this part of an even share of the latents; 0: never",
    )

    temperature: str | None = setting(
        each(SOFT, "auto", vqvae_gumbel="1"),
        "temperature",
        "where T starts: a number, or auto: just under the critical one",
    )
    temperature_schedule: Schedule | None = setting(
        each((*SOFT, *GUMBEL), "exponential"), "temperature", "how T falls"
    )
    temperature_ratio: str | None = setting(
        each(SOFT, "auto", vqvae_gumbel="0.1"),
        "temperature",
        "T at the end over T at the start, if it falls; auto: ends where T/2 is the codes' error",
    )

    steps: int | None = setting(
        None, "optimisation", f"optimizer steps; default: {EPOCHS} epochs, at least {MIN_STEPS}"
    )
    batch_size: int | None = setting(
        each(IMAGES, 256, pixelcnn=32), "optimisation", "images per step"
    )
    lr: float | None = setting(
        each(IMAGES, 2e-3, pixelcnn=4e-3),
        "optimisation",
        "peak learning rate of AdamW; cosine decay",
    )
    codebook_lr_factor: float | None = setting(
        each(SOFT, 30.0, vqvae=1.0, vqvae_gumbel=1.0),
        "optimisation",
        "learning rate of the codes over lr",
    )
    weight_decay: float = setting(0.0, "optimisation", "of the networks; codes have none")
    clip_gradient: float | None = setting(
        each(IMAGES, 0.0, pixelcnn=1.0), "optimisation", "longest gradient of a step; 0: any"
    )
    seed: int = setting(0, "optimisation", "of everything random, the validation split included")

    device: Literal["auto", "cpu", "cuda"] = setting("auto", "run", "where to compute")
    precision: Literal["auto", "float32", "bfloat16"] = setting(
        "auto",
        "run",
        "numbers that the networks multiply; codes, losses and sums are float32; auto: bfloat16 on "
        "cuda, float32 on cpu",
    )
    compile: Literal["auto", "on", "off"] = setting(
        "auto", "run", "torch.compile the step; auto: in long runs on cuda"
    )
    evaluate_every: int | None = setting(
        None, "run", "steps between validations; default: 20 in all"
    )
    checkpoint_every: int | None = setting(
        None,
        "run",
        "steps between checkpoints; the best step always has one; default: as --evaluate-every",
    )

    on_nan: Literal["stop", "skip"] = setting(
        "stop", "run", "at a loss or gradient that is not finite: end, or leave the step out"
    )

    def __post_init__(self) -> None:
        for name, kind in value_types(TrainConfig).items():
            value = getattr(self, name)
            if value is not None:
                check_type(name, value, kind)
        fill_defaults(self)
        check_values(self)
        check_combinations(self)

    @property
    def image_size_pair(self) -> tuple[int, int] | None:
        """(height, width), or None to leave the images as they are."""
        return None if self.image_size is None else size_pair(self.image_size)

    @property
    def hidden_sizes(self) -> tuple[int, ...]:
        """ "256,64" → (256, 64)."""
        return tuple(int(size) for size in self.hidden.split(","))

    def resolved(
        self, examples: int, image_shape: tuple[int, int, int] | None = None
    ) -> "TrainConfig":
        """Fill what was left to the data: grid, steps, cadences. Raises ConfigError for 1 image.

        examples: in the training split. image_shape: of them, where they are images.
        """
        if examples < 2:
            raise ConfigError("data: 1 image to train on is too few; there must be at least 2")
        batch_size = min(self.batch_size, examples)
        steps = self.steps or max(MIN_STEPS, EPOCHS * examples // batch_size)
        every = self.evaluate_every or max(1, steps // 20)
        grid, weight = self.latent_grid, self.reconstruction_weight
        data_dir = self.data_dir or (DATA_DIR if self.data in DOWNLOADED else None)
        if image_shape is not None:
            one = self.architecture == "dense" or self.model in CONTINUOUS
            _, height, width = image_shape
            grid = grid or ("1x1" if one else f"{max(height // 4, 1)}x{max(width // 4, 1)}")
            weight = weight or math.prod(image_shape) / (2 * PIXEL_DEVIATION**2)
        return dataclasses.replace(
            self,
            latent_grid=grid,
            reconstruction_weight=weight,
            data_dir=None if data_dir is None else data_dir.absolute(),
            tokenizer=None if self.tokenizer is None else self.tokenizer.absolute(),
            steps=steps,
            batch_size=batch_size,
            evaluate_every=every,
            checkpoint_every=self.checkpoint_every or every,
        )

    def to_toml(self) -> str:
        """The settings as `read_config` reads them, without those left open."""
        import tomli_w  # only here: tests and bench that train no run folder do without it

        values = dataclasses.asdict(self)
        return tomli_w.dumps(
            {
                name: text_of(value) if isinstance(value, Path) else value
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
    """Settings of a TOML file. Raises ConfigError for a bad file and for an unknown key."""
    return read_toml(path, TrainConfig)


def size_pair(text: str) -> tuple[int, int]:
    """ "7" → (7, 7), "7x5" → (7, 5)."""
    height, _, width = text.partition("x")
    return int(height), int(width or height)
