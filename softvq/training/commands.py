"""What can be done with a finished run: measure, reconstruct, encode, decode, sample."""

import dataclasses
import json
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from softvq.data import Batch, DataError, find_images, load_images
from softvq.data.workers import in_workers
from softvq.models import Autoencoder, CodePrior
from softvq.training.allowed import OF_FOLDERS, is_temperature
from softvq.training.build import build_data, worker_count
from softvq.training.codes import (
    PICTURES,
    SPLITS,
    check_prior,
    encode_images,
    encode_splits,
    load_tokenizer,
    read_codes,
    write_codes,
)
from softvq.training.config import torch_device
from softvq.training.evaluation import batch_size, evaluate, to_pixels
from softvq.training.families import PRIOR
from softvq.training.files import check_place, write_text
from softvq.training.origin import check_data, images_of
from softvq.training.pictures import save_rows
from softvq.training.prior import decoded_samples
from softvq.training.prior_evaluation import prior_metrics
from softvq.training.run_folder import RunError, RunFolder
from softvq.training.settings import ConfigError
from softvq.training.showing import PER_ROW, even_labels, reconstruction_rows, sampled_rows
from softvq.training.warn import warn


def evaluate_run(run: RunFolder, split: str, data_dir: Path | None = None) -> dict[str, float]:
    """Metrics of the run's model over one split of its data; also left in RUN/eval-SPLIT.json,
    where it can be written.

    data_dir: where the data are now.
    """
    device = torch_device()
    model = run.load_model(device)
    source = run  # of the images
    if isinstance(model, CodePrior):
        source = RunFolder(run.read_config().tokenizer)
        if not source.config.exists():
            raise RunError(
                f"{source.path}: no run there, the tokenizer of {run.path}; where it has moved, "
                f"name the place with softvq train --out {run.path} --resume --tokenizer"
            )
        check_prior(run, source)
    moved = {} if data_dir is None else {"data_dir": data_dir}
    with images_of(source):
        images = build_data(dataclasses.replace(source.read_config(), **moved))
        check_data(run, model, images)
        if isinstance(model, CodePrior):
            tokenizer = load_tokenizer(source, device)
            codes = encode_splits(tokenizer, images, device)
            values = prior_metrics(model, tokenizer, images, codes, split, device)
        else:
            values = evaluate(model, getattr(images, split), device).values
    path = run.path / f"eval-{split}.json"
    try:
        write_text(path, json.dumps(values, indent=2) + "\n")
    except OSError as error:
        warn(f"{path}: cannot be written ({error.strerror})")
    return values


def reconstruct(run: RunFolder, sources: Sequence[Path], out: Path) -> list[Path]:
    """Pictures of the model's reconstructions of image files, PER_ROW to a picture, in `out`.

    The images are brought to one size where those of the training were.
    """
    config, device = run.read_config(), torch_device()
    if config.model in (*PRIOR, "cvae"):
        needs = "codes, not images" if config.model in PRIOR else "the class of each image"
        raise RunError(f"{run.path}: a {config.model} needs {needs}; it cannot reconstruct files")
    model = run.load_model(device)
    paths = _pictures(sources)
    images = load_images(paths, model.image_shape, fitted=config.image_size is not None)
    names = [f"reconstructions-{n}.png" for n in range(-(-len(images) // PER_ROW))]
    pages = _to_write(out, names, "reconstructions-*.png")
    for page, batch in zip(pages, images.split(PER_ROW), strict=True):
        save_rows(page, reconstruction_rows(model, to_pixels(batch, device), None))
    return pages


def _pictures(sources: Sequence[Path]) -> list[Path]:
    """The picture files, and those in the folders. Raises DataError where there are none."""
    for source in sources:
        if not source.exists():
            raise DataError(f"{source}: no such picture or folder")
    return [p for s in sources for p in (find_images(s) if s.is_dir() else [s])]


def _to_write(folder: Path, names: list[str], like: str) -> list[Path]:
    """The folder, made, with these names. Raises DataError where others like them would stay."""
    folder.mkdir(parents=True, exist_ok=True)
    if others := sorted({path.name for path in folder.glob(like)} - set(names)):
        raise DataError(
            f"{folder}: holds {others[0]}, which would stay among the {len(names)} pictures to be "
            "written; choose an empty or a new folder"
        )
    return [folder / name for name in names]


def encode(run: RunFolder, data: str | None, data_dir: Path | None, out: Path) -> Path:
    """Write the codes of every split of the data to `out`, with labels and names of classes."""
    device = torch_device()
    model = load_tokenizer(run, device)
    check_place(out)
    changes = {} if data is None else {"data": data, "data_dir": None, **dict.fromkeys(OF_FOLDERS)}
    changes |= {} if data_dir is None else {"data_dir": data_dir}
    config = dataclasses.replace(run.read_config(), **changes)
    with images_of(run) if data is None else nullcontext():
        images = build_data(config)
        if data is None:
            check_data(run, model, images)
        channels, *size = images.image_shape
        if size != list(model.image_shape[1:]) or channels > model.image_shape[0]:
            raise DataError(
                f"{config.data}: images of shape {images.image_shape}, but the model is "
                f"for {model.image_shape}"
            )
        splits = encode_splits(model, images, device)
    sets = dict(zip(SPLITS, splits[:3], strict=True))
    write_codes(out, sets, model, run.fingerprint(), class_names=splits.class_names)
    return out


def encode_pictures(run: RunFolder, sources: Sequence[Path], out: Path) -> Path:
    """Write the codes of picture files to `out`, with the names of the files.

    They are brought to one size where those of the training were.
    """
    config, device = run.read_config(), torch_device()
    model = load_tokenizer(run, device)
    paths = _pictures(sources)
    check_place(out)
    size = batch_size(model.image_shape)
    parts = [paths[start : start + size] for start in range(0, len(paths), size)]
    read = partial(load_images, shape=model.image_shape, fitted=config.image_size is not None)
    images = in_workers(read, parts, worker_count(config))
    batches = (Batch(some, torch.full([len(some)], -1)) for some in images)
    sets = {PICTURES: encode_images(model, batches, device)}
    write_codes(out, sets, model, run.fingerprint(), files=[str(path) for path in paths])
    return out


@torch.no_grad()
def decode(run: RunFolder, codes: Path, split: str, out: Path) -> Path:
    """Write the image of each of the split's code grids to `out`, as 00000.png and so on."""
    device = torch_device()
    model = load_tokenizer(run, device)
    indices = read_codes(codes, split, model.levels, run.fingerprint())
    total, size = len(next(iter(indices.values()))), batch_size(model.image_shape)
    paths = _to_write(out, [f"{number:05}.png" for number in range(total)], "[0-9]*.png")
    for start in range(0, total, size):
        batch = {name: grid[start : start + size].to(device) for name, grid in indices.items()}
        images = model.decode_indices(batch)
        pixels = images.mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        for path, image in zip(paths[start : start + size], pixels, strict=True):
            Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(path)
    return out


def sample(
    run: RunFolder,
    prior: RunFolder | None,
    count: int,
    class_name: str | None,
    *,
    temperature: float | None,
    seed: int,
    out: Path,
) -> Path:
    """Write a picture of `count` images that nobody drew, of all classes or of one.

    A model with codes gets them from `prior`, a run of a pixelcnn on that very model's codes, whose
    choices have the temperature.
    Raises RunError for a model that cannot be sampled so, and ConfigError for an unknown class.
    """
    if count < 1:
        raise ConfigError(f"count: {count} is not allowed; it must be at least 1")
    if temperature is not None and not is_temperature(temperature):
        raise ConfigError(
            f"temperature: {temperature} is not allowed; it must be from 1e-10 to 1e10"
        )
    if out.suffix.lower() != ".png":
        raise ConfigError(f"out: {out} is not allowed; it must end in .png")
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed: {seed} is not allowed; it must be from 0 to 2^32 − 1")
    device = torch_device()
    model = run.load_model(device)
    if isinstance(model, CodePrior):
        raise RunError(
            f"{run.path}: a run of a pixelcnn; give the model it decodes with, and this "
            "run as --prior"
        )
    if isinstance(model, Autoencoder):
        if prior is not None:
            raise RunError(f"{run.path}: model {run.read_config().model} has no codes for a prior")
        if temperature is not None:
            raise ConfigError(f"temperature: {temperature} is that of a prior, and there is none")
        drawn, classes, shape = model.sample, model.classes, run.read_shape()
    else:
        if prior is None:
            raise RunError(
                f"{run.path}: its codes need a prior; train one with softvq train --model pixelcnn "
                f"--tokenizer {run.path}, and give its run as --prior"
            )
        check_prior(prior, run)
        codes = prior.load_model(device)
        drawn, classes = decoded_samples(codes, model, temperature or 1.0), codes.classes
        shape = prior.read_shape()
    names = shape["class_names"] if classes else ()
    labels = even_labels(count, classes, device)
    if class_name is not None:
        if class_name not in names:
            known = f"not one of {', '.join(names)}" if names else "not known: the model has none"
            raise ConfigError(f"class: {class_name!r} is {known}")
        labels = torch.full_like(labels, names.index(class_name))
    check_place(out)
    torch.manual_seed(seed)
    save_rows(out, sampled_rows(drawn, labels, names, model.image_shape))
    return out
