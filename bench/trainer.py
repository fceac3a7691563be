"""The trainer's step loop beside a plain PyTorch loop: the same net, data, batch and losses."""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from bench.measure import quantiles
from bench.results import OUT, Results, Row, headline, print_table, version
from bench.step import EagerSoftVQ
from softvq.models import SoftVQVAE
from softvq.quantizers import SoftVQ
from softvq.training.build import build_data
from softvq.training.config import TrainConfig
from softvq.training.cuda_graph import record
from softvq.training.engine import Engine
from softvq.training.images import ImageTask
from softvq.training.optimizer import build_optimizer, set_learning_rates
from softvq.training.trainer import batches

BATCH, GRID, DIM, CODES = 256, 7, 64, 512
OURS, PLAIN = "softvq train", "plain PyTorch"
Steps = Callable[[int], None]


class Setting(NamedTuple):
    """What both loops are given."""

    device: torch.device
    data: str
    data_dir: Path | None
    steps: int  # of one measurement
    repeats: int


def main(arguments: list[str]) -> int:
    """`python -m bench trainer`."""
    parser = argparse.ArgumentParser(prog="python -m bench trainer", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data", choices=("fashion-mnist", "digits"), default="fashion-mnist")
    parser.add_argument("--data-dir", type=Path, help="where Fashion-MNIST is, or goes")
    parser.add_argument("--steps", type=int, help="of a measurement; default 5, on a GPU 200")
    parser.add_argument("--repeats", type=int, default=7, help="measurements of each; default 7")
    parser.add_argument("--quick", action="store_true", help="digits, 2 steps, 2 measurements")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the devices' folders")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    steps = options.steps or (200 if device.type == "cuda" else 5)
    setting = Setting(device, options.data, options.data_dir, steps, options.repeats)
    if options.quick:
        setting = Setting(device, "digits", None, 2, 2)
    results = Results(options.out, device)
    written = results.replace("trainer", measure(setting))
    report(written)
    print(f"\nwritten to {results.path}")
    return 0


def configuration(setting: Setting) -> TrainConfig:
    """The model of both: the decoder reads the quantized latents, nothing is sampled."""
    return TrainConfig(
        data=setting.data,
        data_dir=setting.data_dir,
        device=setting.device.type,
        batch_size=BATCH,
        latent_grid=str(GRID),
        latent_dim=DIM,
        codebook_size=CODES,
        decoder_input="quantized",
        kl_weight=0.0,
        reconstruction_quantizing_weight=0.0,
        steps=100_000,  # of the schedules: no measurement comes to their end
    )


def ours(config: TrainConfig, task: ImageTask) -> Steps:
    """What `softvq train` does between two validations."""
    device = task.device
    optimizer = build_optimizer(config, task.model)
    engine = Engine(config, task, optimizer, device, print)
    source = task.load(batches(task.examples, config.batch_size, config.seed, 0, device))
    task.start(next(source))
    taken = 0

    def run(steps: int) -> None:
        nonlocal taken
        for _ in range(steps):
            task.model.train()
            set_learning_rates(optimizer, config, taken)
            taken += 1
            engine.step(next(source), taken)

    return run


def plain(config: TrainConfig, task: ImageTask) -> Steps:
    """A loop as tutorials write it; task: for its data and its model, whose quantizer is replaced
    by one with the N×K matrix in plain PyTorch."""
    device, model = task.device, task.model.to(memory_format=torch.contiguous_format)
    codebook = model.quantizer.codebook.detach().clone()
    model.quantizer = EagerSoftVQ(DIM, CODES).to(device)
    model.quantizer.codebook = codebook
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    images = task.train.images.cpu().float() / 255
    loader = DataLoader(TensorDataset(images), batch_size=config.batch_size, shuffle=True,
                        drop_last=True)  # fmt: skip
    source = endless(loader)

    def run(steps: int) -> None:
        total = 0.0
        for _ in range(steps):
            model.train()
            (batch,) = next(source)
            loss = model(batch.to(device)).losses["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()

    return run


def endless(loader: DataLoader) -> Iterator[list[Tensor]]:
    """Epoch after epoch."""
    while True:
        yield from loader


def measure(setting: Setting) -> list[Row]:
    """Images per second of both, in turns; the parts of a step of ours."""
    config = configuration(setting)
    data = build_data(config)
    config = config.resolved(len(data.train), data.image_shape)
    loops: dict[str, Steps] = {}
    for name, build in ((OURS, ours), (PLAIN, plain)):
        torch.manual_seed(config.seed)
        loops[name] = build(config, ImageTask(config, data, setting.device))
    pieces = parts(config, ImageTask(config, data, setting.device))
    for run in loops.values():
        run(max(15, setting.steps) if setting.device.type == "cuda" else 2)  # compiles, records
    taken: dict[str, list[float]] = {name: [] for name in (*loops, *pieces)}
    for _ in range(setting.repeats):
        for name, run in (loops | pieces).items():
            taken[name].append(seconds(setting.device, run, setting.steps) / setting.steps)
    rates = {name: [config.batch_size / took for took in taken[name]] for name in loops}
    medians = {name: quantiles(values)["p50"] for name, values in rates.items()}
    base: Row = {
        "rows": config.batch_size * GRID**2,
        "codes": CODES,
        "dim": DIM,
        "dtype": "float32",
        "outputs": setting.data,
        "status": "ok",
    }
    rows: list[Row] = []
    for name, values in rates.items():
        rows.append(
            base
            | quantiles(values)
            | {
                "candidate": name,
                "version": version("softvq" if name == OURS else "torch"),
                "metric": "images per second",
                "unit": "1/s",
                "times_eager": medians[name] / medians[PLAIN],
            }
        )
    found = {part: quantiles(taken[part])["p50"] for part in pieces}
    found["rest"] = config.batch_size / medians[OURS] - sum(found.values())
    for part, took in found.items():
        rows.append(
            base | {"candidate": OURS, "pass": part, "metric": "time", "unit": "s", "p50": took}
        )
    return rows


def seconds(device: torch.device, run: Steps, steps: int) -> float:
    """Wall time of some steps, until the device has done them."""
    synchronise(device)
    started = time.perf_counter()
    run(steps)
    synchronise(device)
    return time.perf_counter() - started


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def parts(config: TrainConfig, task: ImageTask) -> dict[str, Steps]:
    """The net's and the quantizer's forward and backward alone.

    What a step takes beyond them is the rest: the data, the losses, the optimizer, the steering.
    """
    images = task.train.images[: config.batch_size].float() / 255
    model = task.model.train()
    latents = model.encode(images).z.detach()
    return {
        "net": as_trained(net(model, images), task.device),
        "quantizer": as_trained(quantizer(model, latents), task.device),
    }


def as_trained(work: Steps, device: torch.device) -> Steps:
    """Warm; on a GPU recorded as a CUDA graph, as the step that it is a part of."""
    if device.type != "cuda":
        work(2)
        return work
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        work(3)
    torch.cuda.current_stream().wait_stream(aside)
    replay = record(lambda: work(1))

    def run(steps: int) -> None:
        for _ in range(steps):
            replay()

    return run


def autocast(device: torch.device) -> torch.autocast:
    """As in the step, around each forward: its copies of weights live only until it is left, and
    what is recorded may read none that were made before."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def net(model: SoftVQVAE, images: Tensor) -> Steps:
    """Encoder and decoder, forward and backward, with nothing between them."""

    def run(steps: int) -> None:
        for _ in range(steps):
            with autocast(images.device):
                output = model.decode(model.encode(images).z)
            model.zero_grad()
            output.backward(torch.ones_like(output))

    return run


def quantizer(model: SoftVQVAE, latents: Tensor) -> Steps:
    """The quantizer and its loss, forward and backward, on latents (B, h, w, D)."""
    layer: SoftVQ = model.quantizer
    latents = latents.requires_grad_()

    def run(steps: int) -> None:
        for _ in range(steps):
            with autocast(latents.device):
                quantized, _, loss = layer(latents)
            layer.zero_grad()
            torch.autograd.backward((quantized, loss), (torch.ones_like(quantized), None))

    return run


def report(rows: list[dict[str, str]]) -> None:
    """Both loops, then the parts of our step."""
    print(headline(rows[0]))
    loops = [row for row in rows if not row["pass"]]
    print_table(
        ["loop", "data", "images/s", "p20–p80", "× plain"],
        [
            [row["candidate"], row["outputs"], row["p50"], f"{row['p20']}–{row['p80']}",
             row["times_eager"]]
            for row in loops
        ],
    )  # fmt: skip
    print()
    print_table(
        ["part of a step", "ms"],
        [[row["pass"], f"{1e3 * float(row['p50']):.3f}"] for row in rows if row["pass"]],
    )
