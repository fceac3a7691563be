"""One of two replicas of a data-parallel run: python replica.py RANK FOLDER, by test_replicas."""

import sys
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from softvq.quantizers import EMAVQ, VQ, Annealing, DeadCodeRestart, GumbelVQ, SoftVQ

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
    "kmeans apart": (VQ, {"kmeans_init": True, "sync_codebook": False}),
}
ENTROPY = {"entropy_weight": 0.5}
LEARNED = {"learn_temperature": True, "codebook_loss": "likelihood"}
TRAINED = {
    "vq": (VQ, {}),
    "vq, entropy": (VQ, ENTROPY),
    "ema, entropy": (EMAVQ, ENTROPY | {"codebook_dim": 2}),
    "soft": (SoftVQ, ENTROPY | LEARNED),
    "gumbel": (GumbelVQ, ENTROPY),
}
COUNTED = ((20, 5), (30, 0), (10, 23))  # how many rows each replica's mask leaves it, step by step


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


class Net(nn.Module):
    """A linear layer before a quantizer."""

    def __init__(self, case):
        super().__init__()
        kind, options = TRAINED[case]
        torch.manual_seed(0)
        self.linear = nn.Linear(DIM, DIM)
        self.vq = kind(DIM, CODES, **options)

    def forward(self, x, mask):
        """A loss of all that the quantizer returns."""
        quantized, _, loss = self.vq(self.linear(x), mask=mask)
        return loss + quantized[mask].square().sum()


def counted(step, rank):
    """A replica's rows of a step, and which of them count."""
    rows = batch(step)[:FIRST] if rank == 0 else batch(step)[FIRST:]
    return rows, torch.arange(len(rows)) < COUNTED[step][rank]


def trained(case, rank):
    """Each step's state before it, loss, and mean gradients of both replicas."""
    net, steps = DistributedDataParallel(Net(case)), []
    for step in range(len(COUNTED)):
        before = {name: value.clone() for name, value in net.module.state_dict().items()}
        net.zero_grad()
        torch.manual_seed(step)
        loss = net(*counted(step, rank))
        loss.backward()
        grads = {name: p.grad.clone() for name, p in net.module.named_parameters()}
        steps.append((before, loss.detach(), grads))
    return steps


def regulariser(rank):
    """The statistic of a step in which the second replica has no row."""
    x, mask = counted(1, rank)
    torch.manual_seed(0)
    vq = VQ(DIM, CODES, **ENTROPY)
    return vq(x, mask=mask, return_loss_breakdown=True)[3].entropy_regulariser.detach()


def evaluated_by_one(rank):
    """The statistic of a training step, and before it, on the first replica, of an evaluation."""
    x, _ = counted(0, rank)
    torch.manual_seed(0)
    vq, values = VQ(DIM, CODES, **ENTROPY), []
    for training in (False, True) if rank == 0 else (True,):
        parts = vq.train(training)(x, return_loss_breakdown=True)[3]
        values.append(parts.entropy_regulariser.detach())
    return values


def shares():
    """What the trainer's restart counts, and where it moves codes."""
    rank = distributed.get_rank()
    restart, codebook = DeadCodeRestart(CODES, 0.5, decay=0.0), torch.zeros(CODES, DIM)
    restart.update(torch.full((10 + 20 * rank,), rank))
    counted = restart.share.clone()
    restart.restart(codebook, batch(0)[rank * FIRST :][:FIRST])
    return {"counted": counted, "codebook": codebook, "share": restart.share}


def annealed(rank):
    """The state after steps whose latents and errors differ, as an Annealing leaves it."""
    torch.manual_seed(rank)
    vq = SoftVQ(DIM, CODES)
    annealing, rows = Annealing(vq), slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    annealing.start(batch(0)[rows])
    for step in range(1, 4):
        annealing.update(batch(step)[rows], torch.tensor(0.1 + rank), step / 4)
    annealing.measure(1.0)
    return vq.state_dict() | annealing.state_dict()


def main(rank, folder):
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    rows = slice(0, FIRST) if rank == 0 else slice(FIRST, ROWS)
    results = {case: run(case, rows, seed=rank) for case in CASES}
    results |= {"shares": shares(), "regulariser": regulariser(rank)}
    results |= {"evaluated by one": evaluated_by_one(rank), "annealed": annealed(rank)}
    results |= {case: trained(case, rank) for case in TRAINED}
    torch.save(results, folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
