"""From a configuration to what is trained: the model with its data."""

from pathlib import Path

import torch

from softvq.data import is_among
from softvq.data.watch import unwatched
from softvq.training import ranks
from softvq.training.build import build_data
from softvq.training.codes import load_tokenizer
from softvq.training.config import TrainConfig
from softvq.training.display import with_bar
from softvq.training.families import PRIOR
from softvq.training.images import ImageTask
from softvq.training.origin import check_data, images_of
from softvq.training.prior import PriorTask
from softvq.training.run_folder import RunError, RunFolder
from softvq.training.task import Task


def check_apart(config: TrainConfig, out: Path) -> None:
    """Raise RunError for a run folder that is the tokenizer's, or lies among the run's images."""
    if config.model in PRIOR:
        if out.resolve() == config.tokenizer.resolve():
            raise RunError(
                f"{out}: is the tokenizer's own run folder; choose another one with --out"
            )
        config = RunFolder(config.tokenizer).read_config()
    if config.data == "folder" and config.data_dir and is_among(config.data_dir, out):
        raise RunError(
            f"{out}: lies in the folder of the images, {config.data_dir}, where the pictures of "
            "the run would be taken for images; choose a folder elsewhere with --out"
        )


def load_task(
    config: TrainConfig, device: torch.device, *, quiet: bool = True
) -> tuple[TrainConfig, Task]:
    """The resolved settings, and the untrained model they describe with its data.

    quiet: without a bar while many pictures are looked at or decoded.
    """
    watch = unwatched if quiet else with_bar
    if config.model in PRIOR:
        run = RunFolder(config.tokenizer)
        tokenizer = load_tokenizer(run, device)
        with images_of(run):
            with ranks.first_rank_first():  # it downloads, the others read
                images = build_data(run.read_config(), watch)
            check_data(run, tokenizer, images)
            config = config.resolved(len(images.train))
            ranks.check_batch_size(config.batch_size)
            torch.manual_seed(config.seed)
            return config, PriorTask(config, tokenizer, images, device, run.fingerprint())
    with ranks.first_rank_first():
        images = build_data(config, watch)
    config = config.resolved(len(images.train), images.image_shape)
    ranks.check_batch_size(config.batch_size)
    torch.manual_seed(config.seed)
    return config, ImageTask(config, images, device)
