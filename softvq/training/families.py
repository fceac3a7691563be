"""The models there are, and which of them share settings."""

from typing import Literal, get_args

Model = Literal[
    "soft-vqvae",
    "vqvae",
    "vqvae-ema",
    "vqvae-gumbel",
    "vqvae2",
    "ae",
    "vae",
    "cvae",
    "pixelcnn",
]
SOFT, GUMBEL, EMA = ("soft-vqvae",), ("vqvae-gumbel",), ("vqvae-ema", "vqvae2")
QUANTISED = (*SOFT, "vqvae", "vqvae-ema", *GUMBEL, "vqvae2")
CONTINUOUS = ("ae", "vae", "cvae")
IMAGES = (*QUANTISED, *CONTINUOUS)
PRIOR = ("pixelcnn",)
MODELS: tuple[str, ...] = get_args(Model)
