"""A rank of two that train from memory, then from the disk: `streamed_worker.py RANK FOLDER OUT`.

Leaves the runs in OUT, and for each step the numbers of the pictures that this rank has seen.
"""

import sys
from pathlib import Path

import torch

from softvq.training.config import TrainConfig
from softvq.training.trainer import Trainer, train
from tests.launch import use_store


def main(rank: int, folder: Path, out: Path) -> None:
    step, seen = Trainer._step, []

    def step_and_look(self, batch):
        seen.append(batch[0][:, 0, 0, 0].tolist())
        step(self, batch)

    Trainer._step, Trainer.finish = step_and_look, lambda self: None
    for number, stream in enumerate(("off", "on")):
        use_store(number)
        seen.clear()
        config = TrainConfig(
            data="folder", data_dir=folder, stream=stream, workers=1, batch_size=8, steps=4,
            width=2, latent_dim=3, codebook_size=8, device="cpu",
        )  # fmt: skip
        assert train(config, out / stream, quiet=True)
    torch.save(seen, out / f"{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
