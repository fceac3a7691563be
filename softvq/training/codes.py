"""The codes of a trained model: made from its data, written to and read from files."""

import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from softvq.data import Batch, DataError, DataSplits
from softvq.models import CodeLevel, ImageModel, level_suffix
from softvq.training.evaluation import batch_size, to_pixels
from softvq.training.families import CONTINUOUS, PRIOR
from softvq.training.files import replacing
from softvq.training.run_folder import RunError, RunFolder

SPLITS = ("train", "validation", "test")
PICTURES = "pictures"  # that are in no data set


# Comparing tensors gives no single bool, so sets compare by identity (eq=False).
@dataclass(frozen=True, eq=False)
class CodeSet:
    """Codes of images, with their labels.

    codes: (N, h, w) int32 by level. labels: (N,) int64, -1 for an image without a class.
    """

    codes: dict[str, Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, chosen: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Codes (B, h, w) int64 by level and labels (B,) of the images at `chosen`, (B,)."""
        return {name: grid[chosen].long() for name, grid in self.codes.items()}, self.labels[chosen]

    def to(self, device: torch.device) -> "CodeSet":
        """The same on a device."""
        codes = {name: grid.to(device) for name, grid in self.codes.items()}
        return CodeSet(codes, self.labels.to(device))


class CodeSplits(NamedTuple):
    """The codes of a data set's splits."""

    train: CodeSet
    validation: CodeSet
    test: CodeSet
    levels: dict[str, CodeLevel]
    class_names: tuple[str, ...]


def load_tokenizer(run: RunFolder, device: torch.device) -> ImageModel:
    """The model of a run, if it has codes. Raises RunError."""
    model = run.read_config().model
    if model in (*CONTINUOUS, *PRIOR):
        raise RunError(f"{run.path}: a run of model {model}, which makes no codes of images")
    return run.load_model(device)


def encode_splits(model: ImageModel, data: DataSplits, device: torch.device) -> CodeSplits:
    """The nearest codes of every image."""
    size = batch_size(data.image_shape)
    sets = [
        encode_images(model, split.load(torch.arange(len(split)).split(size), device), device)
        for split in data[:3]
    ]
    return CodeSplits(*sets, model.levels, data.class_names)


@torch.no_grad()
def encode_images(model: ImageModel, batches: Iterable[Batch], device: torch.device) -> CodeSet:
    """The nearest codes, on the CPU; of grey images in colour where the model needs it."""
    codes: dict[str, list[Tensor]] = {name: [] for name in model.levels}
    labels = []
    for batch in batches:
        pixels = to_pixels(batch.images, device).expand(-1, model.image_shape[0], -1, -1)
        for name, grid in model.encode_indices(pixels).items():
            codes[name].append(grid.int().cpu())
        labels.append(batch.labels.cpu())
    return CodeSet({name: torch.cat(grids) for name, grids in codes.items()}, torch.cat(labels))


def array_name(split: str, level: str) -> str:
    """Where a file of codes holds the codes of a level of a split: train, or train_top."""
    return f"{split}{level_suffix(level)}"


def write_codes(
    path: Path,
    sets: Mapping[str, CodeSet],
    model: ImageModel,
    fingerprint: str,
    **names: Sequence[str],
) -> None:
    """Write codes to an .npz file; docs/training.md says what it holds.

    sets: by split. fingerprint: of the run. names: arrays of text.
    """
    size = max(level.codebook_size for level in model.levels.values())
    arrays = {"model": np.array(fingerprint), "codebook_size": np.array(size)}
    arrays |= {name: np.array(texts, dtype=str) for name, texts in names.items()}
    for split, held in sets.items():
        for level, grid in held.codes.items():
            arrays[array_name(split, level)] = grid.numpy()
        arrays[f"{split}_labels"] = held.labels.numpy()
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)


def read_codes(
    path: Path, split: str, levels: Mapping[str, CodeLevel], model: str
) -> dict[str, Tensor]:
    """Codes (N, h, w) int64 by level of one split of a file; of one that names no model, too.

    Raises DataError, also where the file names another model.
    """
    codes = {}
    for level, (grid, size) in levels.items():
        name = array_name(split, level)
        try:
            with np.load(path, allow_pickle=False) as file:
                if name not in file:
                    others = ", ".join(n for n in file if file[n].ndim == 3)
                    raise DataError(
                        f"{path}: holds no codes named {name!r}, but {others or 'none'}"
                    )
                indices = torch.from_numpy(file[name].astype(np.int64, casting="safe"))
                if str(file.get("model", model)) != model:
                    raise DataError(f"{path}: codes of another model, or from before it changed")
        # An empty file, an array without names, numbers that are no integers, a broken archive.
        except (EOFError, OSError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{path}: cannot read codes ({error})") from error
        if indices.shape[1:] != grid or not ((indices >= 0) & (indices < size)).all():
            raise DataError(
                f"{path}: {name!r} is not code grids (N, {grid[0]}, {grid[1]}) in 0..{size - 1}"
            )
        codes[level] = indices
    counts = {array_name(split, level): len(indices) for level, indices in codes.items()}
    if len(set(counts.values())) > 1:
        raise DataError(f"{path}: the levels hold codes of different numbers of images: {counts}")
    return codes


def check_prior(prior: RunFolder, tokenizer: RunFolder) -> None:
    """Raise RunError unless the prior was trained on the codes of this very model."""
    prior.read_config()
    if prior.read_shape().get("tokenizer") != tokenizer.fingerprint():
        raise RunError(
            f"{prior.path}: not a pixelcnn for the codes of {tokenizer.path} as it is now; train "
            "one with softvq train --model pixelcnn --tokenizer"
        )
