"""The settings: what is allowed, what is said about the rest, and the way to a file and back."""

import dataclasses
import os
from pathlib import Path
from typing import get_args, get_origin

import pytest
import torch

from softvq.data import DATASETS
from softvq.training.config import TrainConfig, read_config, size_pair, torch_device
from softvq.training.families import MODELS
from softvq.training.settings import ConfigError, describe_default, value_types

NAN, INF = float("nan"), float("inf")
WHOLE = ("latent_dim", "codebook_size", "width", "steps", "evaluate_every", "checkpoint_every")
POSITIVE = ("reconstruction_weight", "lr", "codebook_lr_factor")
FROM_ZERO = (
    "quantizing_weight",
    "kl_weight",
    "reconstruction_quantizing_weight",
    "commitment_weight",
    "weight_decay",
    "entropy_weight",
    "dead_code_threshold",
    "clip_gradient",
)
BAD = [
    *((name, value) for name in WHOLE for value in (0, -3, 2.5, "many", True)),
    *((name, value) for name in POSITIVE for value in (0.0, -1.0, NAN, INF, "much", False)),
    *((name, value) for name in FROM_ZERO for value in (-0.1, NAN, INF, "much")),
    *(("batch_size", value) for value in (0, 1, -1)),
    *((name, value) for name in ("residual_blocks", "workers") for value in (-1, 1.0)),
    *(("seed", value) for value in (-1, 2**32, 0.5)),
    *(("validation_fraction", value) for value in (0.0, 1.0, -0.1, NAN)),
    *(("temperature_ratio", value) for value in ("0", "1.1", "-1", "1e-11", "nan", "warm", 0.5)),
    *(("temperature", value) for value in ("0", "-1", "1e-11", "nan", "inf", "warm", "", 2.0)),
    *(("latent_grid", value) for value in ("0", "7x", "7x0", "7x5x3", "-7", "", 7)),
    *(("image_size", value) for value in ("0x8", "big", 8)),
    *(("hidden", value) for value in ("", "0", "256,", "256;64", "-1", "9" * 20, 256)),
    ("data_dir", 5),
    ("tokenizer", 5),
]
BAD_FOR = {
    "vqvae-ema": [("decay", value) for value in (1.0, -0.1, NAN, "slow")],
    "pixelcnn": [
        *(("layers", value) for value in (0, 1.5)),
        *(("dropout", value) for value in (1.0, -0.1, NAN)),
    ],
}


def test_the_defaults_are_valid():
    TrainConfig()


@pytest.mark.parametrize(("name", "value"), BAD, ids=str)
def test_a_bad_value_is_named(name, value):
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name}: ") and str(value) in message and "\n" not in message


@pytest.mark.parametrize(
    ("model", "name", "value"),
    [(model, *bad) for model, bads in BAD_FOR.items() for bad in bads],
    ids=str,
)
def test_a_bad_value_of_another_model_is_named(model, name, value):
    tokenizer = {"tokenizer": Path("run")} if model == "pixelcnn" else {}
    with pytest.raises(ConfigError, match=f"^{name}: .*{value}"):
        TrainConfig(model=model, **tokenizer, **{name: value})


CHOICES = [name for name, kind in value_types(TrainConfig).items() if get_origin(kind)]


@pytest.mark.parametrize("name", CHOICES)
def test_a_bad_choice_lists_the_good_ones(name):
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**{name: "banana"})
    allowed = ", ".join(get_args(value_types(TrainConfig)[name]))
    assert str(caught.value) == f"{name}: 'banana' is not one of {allowed}"


def test_every_setting_has_its_bad_value():
    others = {name for bads in BAD_FOR.values() for name, _ in bads}
    assert {name for name, _ in BAD} | others | set(CHOICES) == {
        field.name for field in dataclasses.fields(TrainConfig)
    }


def test_a_path_that_toml_cannot_hold(tmp_path, monkeypatch):
    """Known before anything is done, also of a relative one."""
    odd = tmp_path / os.fsdecode(b"dir\xff")
    with pytest.raises(ConfigError, match=r"^data_dir: .* a path in UTF-8"):
        TrainConfig(data="folder", data_dir=odd)
    with pytest.raises(ConfigError, match=r"^tokenizer: .* a path in UTF-8"):
        TrainConfig(model="pixelcnn", tokenizer=odd)
    odd.mkdir()
    monkeypatch.chdir(odd)
    with pytest.raises(ConfigError, match=r"^data_dir: .* a path in UTF-8"):
        TrainConfig(data="mnist").resolved(10, (1, 8, 8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature_schedule": "constant"}, "temperature: auto .* give a number"),
        (
            {"temperature_schedule": "learned", "codebook_loss": "quantizing_error"},
            "temperature_schedule: learned needs codebook_loss = likelihood.*quantizing_error",
        ),
        (
            {"decoder_input": "quantized", "codebook_loss": "detached_quantizing_error"},
            "codebook_loss: detached_quantizing_error .* decoder_input = quantized",
        ),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature_schedule": "constant", "temperature": "2.5"},
        {"temperature_schedule": "learned", "codebook_loss": "likelihood"},
        {"decoder_input": "quantized"},
        {"temperature_ratio": "1.0", "temperature": "1e-3"},
        {"latent_grid": "7x5", "residual_blocks": 0, "kl_weight": 0},
        {"architecture": "dense", "hidden": "3"},
        {"decoder_input": "quantized", "commitment_weight": 0.5},
        {"model": "vqvae2", "architecture": "dense", "width": 8},  # of the maps between its levels
    ],
    ids=str,
)
def test_settings_that_do(settings):
    TrainConfig(**settings)


IDLE = [
    ("on_bad_image", "skip", {"data": "mnist"}, "only to folder"),
    ("hidden", "64", {}, "architecture conv, only to dense"),
    ("width", 16, {"architecture": "dense"}, "architecture dense, only to conv"),
    ("residual_blocks", 2, {"model": "vqvae2", "architecture": "dense"}, "only to conv"),
    ("commitment_weight", 0.5, {}, "decoder_input latent, only to quantized"),
    (
        "temperature_ratio",
        "0.1",
        {"temperature": "1", "temperature_schedule": "constant"},
        "temperature_schedule constant, only to exponential, cosine",
    ),
    (
        "quantized_codes",
        "soft",
        {"reconstruction_quantizing_weight": 0.0},
        "reconstruction_quantizing_weight 0, which decodes no codes",
    ),
]


@pytest.mark.parametrize(("name", "value", "others", "said"), IDLE, ids=str)
def test_a_setting_that_would_do_nothing_is_refused(name, value, others, said):
    with pytest.raises(ConfigError, match=f"^{name}: {value} does not apply to .*{said}$"):
        TrainConfig(**others, **{name: value})
    default = getattr(TrainConfig(**others), name)  # as every config.toml has it
    assert TrainConfig(**others, **{name: default}) == TrainConfig(**others)


def test_cuda_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device: cuda is not available here"):
        torch_device("cuda")
    assert torch_device() == torch_device("auto") == torch.device("cpu")


def test_numbers_need_no_quotes_in_toml(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text('data = "folder"\nlatent_grid = 7\ntemperature = 2.5\ndata_dir = "here"\n')
    config = TrainConfig(**read_config(path))
    assert (config.latent_grid, config.temperature) == ("7", "2.5")
    assert config.data_dir == Path("here")


@pytest.mark.parametrize("data_dir", [None, Path("/some/where")])
def test_toml_and_back(tmp_path, data_dir):
    config = TrainConfig(
        data="folder", data_dir=data_dir, steps=7, lr=1e-5, latent_grid="7x5", temperature="0.3"
    )
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml())
    assert TrainConfig(**read_config(path)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"codebok_size = 8", "unknown setting 'codebok_size', did you mean codebook_size?"),
        (b"xyzzy = 8", "unknown setting 'xyzzy'"),
        (b"steps = = 3", "not valid TOML"),
        (b"\xff\xfe\x00", "not valid TOML"),
    ],
    ids=["misspelt", "unknown", "broken", "binary"],
)
def test_a_bad_file_is_named(tmp_path, text, message):
    path = tmp_path / "config.toml"
    path.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    assert str(caught.value).startswith(f"{path}: {message}") and "\n" not in str(caught.value)
    assert ("did you mean" in str(caught.value)) == ("did you mean" in message)


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        read_config(tmp_path / name)


def test_resolved_leaves_nothing_open():
    config = TrainConfig(data="folder", data_dir=Path("pictures")).resolved(1000, (3, 30, 50))
    assert (config.latent_grid, config.steps) == ("7x12", 1500)
    assert (config.evaluate_every, config.checkpoint_every) == (75, 75)
    assert config.data_dir == Path("pictures").absolute()
    assert config.image_size is None  # the images' own
    assert config.resolved(1000, (3, 30, 50)) == config


@pytest.mark.parametrize("data", DATASETS)
def test_resolved_knows_where_downloads_go(data):
    """From any folder the run is then found with its images."""
    place = None if data in ("digits", "folder") else Path("data").absolute()
    assert TrainConfig(data=data).resolved(1000, (1, 28, 28)).data_dir == place


def test_resolved_follows_the_data():
    config = TrainConfig(batch_size=10)
    assert config.resolved(10_000, (1, 8, 8)).steps == 15_000
    assert config.resolved(10, (1, 3, 3)).latent_grid == "1x1"
    dense = TrainConfig(architecture="dense")
    assert dense.resolved(10, (1, 28, 28)).latent_grid == "1x1"


def test_one_image_is_too_few():
    with pytest.raises(ConfigError, match=r"^data: 1 image to train on is too few; .* at least 2"):
        TrainConfig().resolved(1, (1, 8, 8))


def test_resolved_keeps_what_was_given():
    given = TrainConfig(latent_grid="5", steps=30, evaluate_every=4, checkpoint_every=9)
    assert given.resolved(1000, (1, 28, 28)) == given
    few = TrainConfig(steps=3).resolved(100, (1, 28, 28))
    assert (few.evaluate_every, few.checkpoint_every) == (1, 1)
    assert few.batch_size == 100  # no more than there are


def test_sizes():
    assert size_pair("7") == (7, 7) and size_pair("7x5") == (7, 5)
    config = TrainConfig(image_size="64x48", hidden="256,64")
    assert config.image_size_pair == (64, 48) and config.hidden_sizes == (256, 64)


def test_each_model_has_the_defaults_of_its_own():
    soft, vqvae = TrainConfig(), TrainConfig(model="vqvae")
    assert (soft.reconstruction_weight, soft.kl_weight, soft.temperature) == (1e4, 1.0, "auto")
    assert (vqvae.reconstruction_weight, vqvae.kl_weight, vqvae.temperature) == (10.0, None, None)
    assert vqvae.commitment_weight == 0.25
    assert TrainConfig(model="vae").codebook_size is None
    assert TrainConfig(model="vae", latent_dim=3).latent_dim == 3


@pytest.mark.parametrize(
    ("model", "setting"),
    [
        ("ae", {"codebook_size": 8}),
        ("vqvae", {"kl_weight": 1.0}),
        ("vqvae-ema", {"temperature": "1"}),
        ("soft-vqvae", {"decay": 0.9}),
        ("cvae", {"tokenizer": Path("run")}),
        ("pixelcnn", {"data": "digits", "tokenizer": Path("run")}),
    ],
    ids=str,
)
def test_a_setting_of_other_models_is_refused(model, setting):
    name = next(iter(setting))
    with pytest.raises(ConfigError, match=f"^{name}: .* does not apply to model {model}, only to "):
        TrainConfig(model=model, **setting)


def test_what_only_some_models_cannot_be():
    with pytest.raises(ConfigError, match="tokenizer: a pixelcnn learns the codes"):
        TrainConfig(model="pixelcnn")
    with pytest.raises(ConfigError, match="kl_weight: 0 makes the vae an autoencoder"):
        TrainConfig(model="vae", kl_weight=0.0)
    with pytest.raises(ConfigError, match="temperature: auto does not apply to model vqvae-gumbel"):
        TrainConfig(model="vqvae-gumbel", temperature="auto")


@pytest.mark.parametrize("model", MODELS)
def test_every_model_goes_to_toml_and_back(tmp_path, model):
    tokenizer = {"tokenizer": tmp_path} if model == "pixelcnn" else {}
    shape = None if model == "pixelcnn" else (1, 8, 8)
    config = TrainConfig(model=model, **tokenizer).resolved(1000, shape)
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml())
    assert TrainConfig(**read_config(path)) == config


def test_models_without_codes_have_one_latent_per_image():
    assert TrainConfig(model="vae").resolved(10, (1, 28, 28)).latent_grid == "1x1"
    assert TrainConfig(model="vqvae").resolved(10, (1, 28, 28)).latent_grid == "7x7"


def test_the_reconstruction_weight_of_a_vae_is_that_of_a_gaussian_over_its_pixels():
    small, large = (
        TrainConfig(model="vae").resolved(10, shape).reconstruction_weight
        for shape in ((1, 8, 8), (3, 8, 16))
    )
    assert (small, large) == (pytest.approx(64 / (2 * 0.2**2)), pytest.approx(6 * small))
    given = TrainConfig(model="cvae", reconstruction_weight=3.0).resolved(10, (1, 8, 8))
    assert given.reconstruction_weight == 3


def test_defaults_in_words():
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    assert describe_default(fields["lr"], MODELS) == "; default: 0.002, 0.004 for pixelcnn"
    assert describe_default(fields["steps"], MODELS) == ""
    assert describe_default(fields["decay"], MODELS) == (
        "; only for vqvae-ema, vqvae2; default: 0.95"
    )
    assert describe_default(fields["commitment_weight"], MODELS) == (
        "; only for soft-vqvae, vqvae, vqvae-ema, vqvae2; default: 0.25, 0.0 for soft-vqvae"
    )
