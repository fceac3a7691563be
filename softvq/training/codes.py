"""The codes of a trained model: made from its data, written to and read from files."""

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from softvq.data import DataError, DataSplits
from softvq.models import LEVEL, CodeLevel, ImageModel
from softvq.training.evaluation import batch_size, to_pixels
from softvq.training.families import CONTINUOUS, PRIOR
from softvq.training.files import replacing
from softvq.training.run_folder import RunError, RunFolder

SPLITS = ("train", "validation", "test")


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


@torch.no_grad()
def encode_splits(model: ImageModel, data: DataSplits, device: torch.device) -> CodeSplits:
    """The nearest codes of every image; grey ones become colour where the model needs it."""
    sets, size = [], batch_size(data.image_shape)
    for split in data[:3]:
        batches = []
        for images, labels in split.load(torch.arange(len(split)).split(size), device):
            pixels = to_pixels(images, device).expand(-1, model.image_shape[0], -1, -1)
            codes = model.encode_indices(pixels)
            codes = {name: grid.int().cpu() for name, grid in codes.items()}
            batches.append((codes, labels.cpu()))
        codes = {name: torch.cat([b[name] for b, _ in batches]) for name in model.levels}
        sets.append(CodeSet(codes, torch.cat([labels for _, labels in batches])))
    return CodeSplits(*sets, model.levels, data.class_names)


def array_name(split: str, level: str) -> str:
    """Where a file of codes holds the codes of a level of a split: train, or train_top."""
    return split if level == LEVEL else f"{split}_{level}"


def write_codes(path: Path, splits: CodeSplits, model: str) -> None:
    """Write codes to an .npz file.

    It holds for each split NAME the arrays NAME, the nearest codes (N, h, w) int32 (of a model of
    two levels NAME_top and NAME_bottom), and NAME_labels (N,) int64; codebook_size; and model, the
    fingerprint of the run whose codes they are.
    """
    sizes = {level.codebook_size for level in splits.levels.values()}
    arrays = {"codebook_size": np.array(max(sizes)), "model": np.array(model)}
    for split, held in zip(SPLITS, splits[:3], strict=True):
        for level, codes in held.codes.items():
            arrays[array_name(split, level)] = codes.numpy()
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
                indices = torch.from_numpy(file[name].astype(np.int64, casting="safe"))
                if str(file.get("model", model)) != model:
                    raise DataError(f"{path}: codes of another model, or from before it changed")
        except KeyError:
            raise DataError(f"{path}: holds no codes named {name!r}") from None
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
