"""Which values and combinations of settings are allowed."""

import math
import re
from pathlib import Path
from typing import Any

from softvq.training.families import CONTINUOUS, GUMBEL, PRIOR
from softvq.training.settings import ConfigError, check, check_idle, text_of

OF_FOLDERS = ("stream", "workers", "on_bad_image")  # settings of the data set "folder"


def check_values(settings: Any) -> None:
    """Raise ConfigError for a value that no model allows. settings: a TrainConfig."""
    counts = "latent_dim codebook_size width layers steps evaluate_every checkpoint_every"
    check(settings, counts, lambda v: 1 <= v <= 2**48, "from 1 to 2^48")
    check(settings, "batch_size", lambda v: v >= 2, "at least 2, for the batch norms")
    check(settings, "seed", lambda v: 0 <= v < 2**32, "from 0 to 2^32 − 1")
    check(settings, "residual_blocks workers", lambda v: v >= 0, "at least 0")
    positive = "reconstruction_weight lr codebook_lr_factor"
    check(settings, positive, lambda v: 0 < v < math.inf, "a number above 0")
    from_zero = (
        "quantizing_weight kl_weight reconstruction_quantizing_weight commitment_weight "
        "entropy_weight weight_decay dead_code_threshold clip_gradient"
    )
    check(settings, from_zero, lambda v: 0 <= v < math.inf, "a number from 0 up")
    check(settings, "validation_fraction", lambda v: 0 < v < 1, "between 0 and 1")
    check(settings, "decay dropout", lambda v: 0 <= v < 1, "a number in [0, 1)")
    # The last temperature is the product of the two, and has to be one that a quantizer takes.
    check(settings, "temperature_ratio", _is_ratio, "auto or a number from 1e-10 to 1")
    check(settings, "temperature", _is_start, "auto or a number from 1e-10 to 1e10")
    check(settings, "latent_grid image_size", _is_size, "a size such as 7 or 7x5")
    hidden = re.compile(r"[1-9]\d{0,13}(,[1-9]\d{0,13})*").fullmatch
    check(settings, "hidden", hidden, "sizes below 10^14, such as 256,64")
    check(settings, "data_dir tokenizer", _is_text, "a path in UTF-8, for config.toml to hold")


def check_combinations(settings: Any) -> None:
    """Raise ConfigError for settings that do not go together. settings: a TrainConfig."""
    if settings.model in PRIOR and settings.tokenizer is None:
        raise ConfigError(
            "tokenizer: a pixelcnn learns the codes of a trained model; give its run folder"
        )
    if settings.data == "digits" and settings.data_dir is not None:
        raise ConfigError(
            f"data_dir: {settings.data_dir} does not apply to data digits, which have no folder; "
            "for one of pictures the data are folder"
        )
    check_idle(settings, "data", ("folder",), *OF_FOLDERS)
    check_idle(settings, "architecture", ("dense",), "hidden")
    check_idle(settings, "architecture", ("conv",), "residual_blocks")
    if settings.model != "vqvae2":  # between its levels lie maps of that width
        check_idle(settings, "architecture", ("conv",), "width")
    check_idle(settings, "decoder_input", ("quantized",), "commitment_weight")
    check_idle(settings, "temperature_schedule", ("exponential", "cosine"), "temperature_ratio")
    if settings.quantized_codes == "soft" and settings.reconstruction_quantizing_weight == 0:
        raise ConfigError(
            "quantized_codes: soft does not apply to reconstruction_quantizing_weight 0, which "
            "decodes no codes"
        )
    if settings.model in CONTINUOUS and settings.model != "ae" and settings.kl_weight == 0:
        raise ConfigError(f"kl_weight: 0 makes the {settings.model} an autoencoder; use model ae")
    if settings.model in GUMBEL and settings.temperature_schedule == "learned":
        raise ConfigError(
            f"temperature_schedule: learned does not apply to model {settings.model}, whose loss "
            "would only fall as T does"
        )
    if settings.temperature_schedule == "constant" and settings.temperature == "auto":
        raise ConfigError(
            "temperature: auto starts just under the critical temperature and has to fall; "
            "give a number for temperature_schedule = constant"
        )
    if settings.temperature_schedule == "learned" and settings.codebook_loss != "likelihood":
        raise ConfigError(
            f"temperature_schedule: learned needs codebook_loss = likelihood, whose log T term "
            f"keeps T finite; under {settings.codebook_loss} it would grow without end"
        )
    if settings.model in GUMBEL and "auto" in (settings.temperature, settings.temperature_ratio):
        raise ConfigError(
            f"temperature: auto does not apply to model {settings.model}; give numbers for "
            "temperature and temperature_ratio"
        )
    if (
        settings.decoder_input == "quantized"
        and settings.codebook_loss == "detached_quantizing_error"
    ):
        raise ConfigError(
            "codebook_loss: detached_quantizing_error stops the gradient to the encoder, so it "
            "cannot go with decoder_input = quantized"
        )


def _is_text(path: Path) -> bool:
    try:
        return bool(text_of(path))
    except UnicodeDecodeError:
        return False


def _is_size(text: str) -> bool:
    return re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", text) is not None


def is_temperature(value: float) -> bool:
    """Whether it is from 1e-10 to 1e10."""
    return 1e-10 <= value <= 1e10


def _is_start(text: str) -> bool:
    try:
        return text == "auto" or is_temperature(float(text))
    except ValueError:
        return False


def _is_ratio(text: str) -> bool:
    return _is_start(text) and (text == "auto" or float(text) <= 1)
