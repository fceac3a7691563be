"""One of two replicas of a data-parallel run: python replica.py RANK FOLDER, by test_replicas."""

import sys
from pathlib import Path

import torch
from torch import distributed

from softvq.quantizers import EMAVQ, VQ, DeadCodeRestart

DIM, CODES, ROWS, FIRST = 3, 8, 60, 37  # the first replica has 37 of the 60 rows

CASES = {
    "statistics": (EMAVQ, {}),
    "heads": (EMAVQ, {"dim": 2 * DIM, "heads": 2, "separate_codebook_per_head": True}),
    "restart": (EMAVQ, {"threshold_ema_dead_code": 5.0, "decay": 0.5}),
    "kmeans": (EMAVQ, {"kmeans_init": True, "threshold_ema_dead_code": 1.0}),
    "cosine": (EMAVQ, {"kmeans_init": True, "use_cosine_sim": True}),
    "parameters": (VQ, {"kmeans_init": True}),
    "seeds": (VQ, {"kmeans_init": True, "kmeans_iters": 0}),
    "apart": (EMAVQ, {"sync_codebook": False}),
}


def batch(step, dim=DIM):
    """The rows of all replicas."""
    return torch.randn(ROWS, dim, generator=torch.Generator().manual_seed(step))


def quantizer(case):
    """The quantizer of a case, the same wherever it is built."""
    kind, options = CASES[case]
    torch.manual_seed(0)
    return kind(**{"dim": DIM, "codebook_size": CODES} | options)


def run(case, rows, seed):
    """Three training steps on some of the rows; in the last one the first replica has none."""
    vq = quantizer(case)
    torch.manual_seed(seed)
    for step in range(3):
        mask = torch.arange(ROWS)[rows] >= (FIRST if step == 2 else 0)
        vq(batch(step, vq.dim)[rows], mask=mask)
    return vq.state_dict()


def shares():
    """What the trainer's restart counts, and where it moves codes."""
    rank = distributed.get_rank()
    restart, codebook = DeadCodeRestart(CODES, 0.5, decay=0.0), torch.zeros(CODES, DIM)
    restart.update(torch.full((10 + 20 * rank,), rank))
    counted = restart.share.clone()
    restart.restart(codebook, batch(0)[rank * FIRST :][:FIRST])
    return {"counted": counted, "codebook": codebook, "share": restart.share}


def main(rank, folder):
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    rows = slice(0, FIRST) if rank == 0 else slice(FIRST, ROWS)
    results = {case: run(case, rows, seed=rank) for case in CASES}
    results["shares"] = shares()
    torch.save(results, folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
