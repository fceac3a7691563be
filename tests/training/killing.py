"""A script: one run of a few steps undisturbed, and one that is killed again and again.

`python killing.py FOLDER KILLS SEED` leaves both in FOLDER, as whole and parts, and prints how each
kill was done. Every part is a forked process, which saves the start of an interpreter; it dies of
SIGKILL at a random time, at a random change of the run folder, or halfway through writing a file.
After every fourth kill the newest checkpoint is cut short, or scrambled.
"""

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch

from softvq.training import steering
from softvq.training.config import TrainConfig
from softvq.training.trainer import train

CONFIG = TrainConfig(
    steps=240,
    batch_size=32,
    evaluate_every=4,
    checkpoint_every=3,
    width=2,
    latent_dim=3,
    codebook_size=8,
    decoder_input="quantized",
    dead_code_threshold=0.9,
    device="cpu",
)
CHANGES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_a_change(folder: Path, number: int) -> None:
    """Be killed just before change number `number` of what lies in the folder."""
    changes = count(1)

    def look(event: str, arguments: tuple[object, ...]) -> None:
        inside = event in CHANGES and str(arguments[0]).startswith(str(folder))
        if inside and next(changes) == number:
            die()

    sys.addaudithook(look)


def die_while_writing(number: int) -> None:
    """Be killed when half of file number `number` is written."""
    files, write = count(1), Path.write_bytes

    def write_half(path: Path, data: bytes) -> int:
        if next(files) == number:
            write(path, data[: len(data) // 2])
            die()
        return write(path, data)

    Path.write_bytes = write_half


def damage_newest(checkpoints: Path, draw: random.Random) -> str | None:
    """Do harm to the last of several checkpoints; says which file of it, and how."""
    found = sorted(checkpoints.glob("step-*"), key=lambda path: int(path.name[len("step-") :]))
    if len(found) < 2:
        return None
    file = draw.choice(sorted(found[-1].iterdir()))
    data = file.read_bytes()
    half, rest = data[: len(data) // 2], data[len(data) // 2 :]
    how = draw.choice(("cut", "scrambled"))
    file.write_bytes(half if how == "cut" else half + rest[::-1])
    return f"{found[-1].name}/{file.name} {how}"


def fork(run: Path, prepare: Callable[[], None] | None = None) -> int:
    """A process that trains, or goes on with, the run."""
    pid = os.fork()
    if pid:
        return pid
    try:
        if prepare:
            prepare()
        train(CONFIG, run, resume=(run / "config.toml").exists(), quiet=True)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def ended(pid: int) -> bool:
    """Wait; False when it was killed. Raises RuntimeError when it failed."""
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status not in (0, -signal.SIGKILL):
        raise RuntimeError(f"a training process ended with status {status}")
    return status == 0


def main(folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    steering.RESTART_EVERY, steering.RESTART_FROM = 2, 0.0
    steering.MEASURE_EVERY = 3
    started = time.perf_counter()
    train(CONFIG, folder / "whole", quiet=True)  # here: what it imports, the forks have
    seconds = time.perf_counter() - started

    parts, draw = folder / "parts", random.Random(seed)
    for number in range(kills):
        how = draw.choice(("time", "change", "half a file"))
        if how == "time":
            moment = draw.uniform(0, 0.1 * seconds)
            pid = fork(parts)
            time.sleep(moment)
            os.kill(pid, signal.SIGKILL)
        elif how == "change":
            moment = draw.randint(1, 100)
            pid = fork(parts, lambda number=moment: die_at_a_change(parts, number))
        else:
            moment = draw.randint(1, 12)
            pid = fork(parts, lambda number=moment: die_while_writing(number))
        if ended(pid):
            raise RuntimeError("the run came to its end before all kills; make it longer")
        left = sorted(path.name for path in parts.glob("checkpoints/*"))
        print("killed:", how, moment, *left, flush=True)
        if number % 4 == 3 and (harm := damage_newest(parts / "checkpoints", draw)):
            print("damaged:", harm, flush=True)
    ended(fork(parts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
