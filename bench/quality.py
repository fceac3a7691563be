"""What each quantizer reaches in one net on one data set, and how many codes it keeps in use.

Every row has the same encoder and decoder, first weights, batches, steps and optimizer, seed by
seed, and is measured on the whole test split with the decoder fed the nearest codes.
"""

import argparse
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from bench.measure import quantiles
from bench.results import OUT, Results, Row, headline, print_table, version
from bench.step import PeerVQ
from bench.trainer import ours
from softvq.training.config import TrainConfig
from softvq.training.load import load_task

DIM = 16
NET: dict[str, Any] = {"latent_dim": DIM, "width": 16, "residual_blocks": 1, "batch_size": 256}
PEER = "vector-quantize-pytorch"
METRICS = ("reconstruction_hard_error", "perplexity")


class Entry(NamedTuple):
    """A row: settings of our trainer, and another's layer in place of the quantizer."""

    settings: dict[str, Any]
    peer: Callable[[int], nn.Module] | None = None


# The decoder reads q, and T falls until q is the nearest code.
SOFT = {
    "model": "soft-vqvae",
    "decoder_input": "quantized",
    "kl_weight": 0.0,
    "reconstruction_quantizing_weight": 0.0,
    "temperature_ratio": "0.005",
    "entropy_weight": 10.0,
    "dead_code_threshold": 0.4,
}
ENTRIES = {
    "softvq SoftVQ": Entry(SOFT),
    "softvq VQ": Entry({"model": "vqvae"}),
    "softvq EMAVQ": Entry({"model": "vqvae-ema"}),
    "softvq GumbelVQ": Entry({"model": "vqvae-gumbel"}),
    # Its README's three settings: the first example, and its two cures for unused codes.
    f"{PEER}, first example": Entry(
        {"model": "vqvae"}, lambda k: PeerVQ(DIM, k, decay=0.8, commitment_weight=1.0)
    ),
    f"{PEER}, k-means and restarts": Entry(
        {"model": "vqvae"}, lambda k: PeerVQ(DIM, k, kmeans_init=True, threshold_ema_dead_code=2)
    ),
    f"{PEER}, cosine similarity": Entry(
        {"model": "vqvae"}, lambda k: PeerVQ(DIM, k, use_cosine_sim=True, threshold_ema_dead_code=2)
    ),
}


def main(arguments: list[str]) -> int:
    """`python -m bench quality`."""
    parser = argparse.ArgumentParser(prog="python -m bench quality", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--codes", type=int, nargs="+", default=[64, 128, 256, 512], help="K")
    parser.add_argument("--peer-codes", type=int, nargs="+", default=[256], help="K of the peers")
    parser.add_argument("--seeds", type=int, default=3, help="models of each kind, seeds from 0 on")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time, a thread each")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the devices' folders")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    settings = {name: getattr(options, name) for name in ("data", "data_dir", "steps")}
    models = [
        (name, settings | {"codebook_size": codes})
        for name, entry in ENTRIES.items()
        for codes in (options.peer_codes if entry.peer else options.codes)
    ]
    runs = [(*model, seed, device) for model in models for seed in range(options.seeds)]
    torch.set_num_threads(1)  # here for the results' sake, which say how many there were
    results = Results(options.out, device)
    rows: list[Row] = []
    # Processes that start afresh: OpenMP's threads do not survive a fork.
    pool = ProcessPoolExecutor(
        options.jobs, get_context("spawn"), torch.set_num_threads, (1,), max_tasks_per_child=1
    )
    with pool:
        found = pool.map(measure, *zip(*runs, strict=True))
        for model, of_seeds in zip(models, zip(*[found] * options.seeds, strict=True), strict=True):
            rows += summary(*model, of_seeds)
            report(results.replace("quality", rows))
    return 0


def measure(
    name: str, settings: dict[str, Any], seed: int, device: torch.device
) -> dict[str, float]:
    """Metrics of a trained model; none if it needs a package that is not installed."""
    entry = ENTRIES[name]
    if entry.peer and not version(PEER):
        return {}
    return trained(TrainConfig(**NET, **entry.settings, **settings, seed=seed), entry.peer, device)


def summary(name: str, settings: dict[str, Any], of_seeds: Sequence[dict[str, float]]) -> list[Row]:
    """One row for each metric of the models that differ by their seed alone."""
    row = {
        "candidate": name,
        "version": version(PEER if ENTRIES[name].peer else "softvq"),
        "rows": settings["steps"],
        "codes": settings["codebook_size"],
        "dim": DIM,
    }
    if not all(of_seeds):
        return [{**row, "metric": metric, "status": "not installed"} for metric in METRICS]
    return [
        {**row, "metric": metric, "status": "ok", **quantiles([of[metric] for of in of_seeds])}
        for metric in METRICS
    ]


def trained(
    config: TrainConfig, peer: Callable[[int], nn.Module] | None, device: torch.device
) -> dict[str, float]:
    """Metrics of the model after its last step."""
    config, task = load_task(config, device)
    if peer is not None:
        task.model.quantizer = peer(config.codebook_size).to(device)
    ours(config, task)(config.steps)
    return task.evaluate("test")


def report(rows: list[dict[str, str]]) -> None:
    """A line for each model."""
    print(headline(rows[0]))
    models = zip(*[iter(rows)] * len(METRICS), strict=True)
    print_table(
        ["K", "quantizer", "hard error", "p20–p80", "perplexity", "p20–p80", ""],
        [
            [
                *(of[0]["codes"], of[0]["candidate"]),
                *(cell for row in of for cell in (row["p50"], f"{row['p20']}–{row['p80']}")),
                of[0]["status"],
            ]
            for of in models
        ],
    )
