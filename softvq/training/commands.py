"""What can be done with a finished run: measure, reconstruct, encode, decode."""

import dataclasses
import json
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from softvq.data import DataError, find_images, load_images
from softvq.models import SoftVQVAE
from softvq.training.build import build_data
from softvq.training.config import TrainConfig, size_pair, torch_device
from softvq.training.evaluation import BATCH, evaluate, to_pixels
from softvq.training.files import replacing, write_text
from softvq.training.pictures import save_reconstructions
from softvq.training.run_folder import RunFolder

SPLITS = ("train", "validation", "test")
PER_PAGE = 12  # images in one picture of reconstructions


def evaluate_run(run: RunFolder, split: str) -> dict[str, float]:
    """Metrics of the run's model over one split of its data; also left in RUN/eval-SPLIT.json."""
    config = run.read_config()
    device = torch_device()
    model = run.load_model(device)
    values = evaluate(model, getattr(build_data(config), split), device).values
    write_text(run.path / f"eval-{split}.json", json.dumps(values, indent=2) + "\n")
    return values


def reconstruct(run: RunFolder, sources: Sequence[Path], out: Path) -> list[Path]:
    """Pictures of the model's reconstructions of image files, PER_PAGE to a picture, in `out`."""
    device = torch_device()
    model = run.load_model(device)
    paths = [p for s in sources for p in (find_images(s) if s.is_dir() else [s])]
    images = to_pixels(load_images(paths, model.image_shape), device)
    out.mkdir(parents=True, exist_ok=True)
    pages = [out / f"reconstructions-{n}.png" for n in range(-(-len(images) // PER_PAGE))]
    for page, batch in zip(pages, images.split(PER_PAGE), strict=True):
        save_reconstructions(page, reconstruction_rows(model, batch))
    return pages


def reconstruction_rows(model: SoftVQVAE, images: Tensor) -> dict[str, Tensor]:
    """The rows of reconstructions.png for images (B, C, H, W) in [0, 1]."""
    seen = model.evaluate(images)
    return {
        "input": images,
        "reconstruction": seen.reconstruction,
        "soft codes": seen.soft_reconstruction,
        "nearest codes": seen.nearest_reconstruction,
    }


@torch.no_grad()
def encode(run: RunFolder, data: str | None, data_dir: Path | None, out: Path) -> Path:
    """Write the codes of every split to `out`, an .npz file.

    It holds for each split NAME the arrays NAME, the nearest codes (N, h, w) int32, and
    NAME_labels (N,) int64, and codebook_size.
    """
    config = run.read_config()
    changes = {} if data is None else {"data": data, "data_dir": None}
    changes |= {} if data_dir is None else {"data_dir": data_dir}
    device = torch_device()
    model = run.load_model(device)
    splits = build_data(dataclasses.replace(config, **changes))
    if splits.image_shape != model.image_shape:
        raise DataError(
            f"{data or config.data}: images of shape {splits.image_shape}, but the model is for "
            f"{model.image_shape}"
        )
    arrays: dict[str, np.ndarray] = {"codebook_size": np.array(config.codebook_size)}
    for name in SPLITS:
        split = getattr(splits, name)
        indices = [
            model.encode_indices(to_pixels(batch, device)).int().cpu()
            for batch in split.images.split(BATCH)
        ]
        arrays[name] = torch.cat(indices).numpy()
        arrays[f"{name}_labels"] = split.labels.numpy()
    with replacing(out) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
    return out


@torch.no_grad()
def decode(run: RunFolder, codes: Path, split: str, out: Path) -> Path:
    """Write the image of each of the split's code grids to `out`, as 00000.png and so on."""
    config = run.read_config()
    device = torch_device()
    model = run.load_model(device)
    indices = read_codes(codes, split, config)
    out.mkdir(parents=True, exist_ok=True)
    number = 0
    for batch in indices.split(BATCH):
        images = model.decode_indices(batch.to(device))
        pixels = images.mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        for image in pixels:
            Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(
                out / f"{number:05}.png"
            )
            number += 1
    return out


def read_codes(path: Path, split: str, config: TrainConfig) -> Tensor:
    """Code grids (N, h, w) int64 of one split of an encoded file. Raises DataError."""
    grid, codes = size_pair(config.latent_grid), config.codebook_size
    try:
        with np.load(path, allow_pickle=False) as file:
            indices = torch.from_numpy(file[split].astype(np.int64, casting="safe"))
    except KeyError:
        raise DataError(f"{path}: holds no codes named {split!r}") from None
    # An empty file, an array without names, numbers that are no integers, a broken archive.
    except (EOFError, OSError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: cannot read codes ({error})") from error
    if indices.shape[1:] != grid or not ((indices >= 0) & (indices < codes)).all():
        raise DataError(
            f"{path}: {split!r} is not code grids (N, {grid[0]}, {grid[1]}) in 0..{codes - 1}"
        )
    return indices
