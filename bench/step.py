"""A training step of the whole model: the same conv net around three quantizers."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.candidates import eager_outputs, eager_scores
from bench.check import require_green
from bench.measure import Clock, bounded_memory, peak_bytes, quantiles, reason
from bench.op import free
from bench.results import OUT, Results, Row, headline, print_table, version
from softvq import SoftQuantized
from softvq.models import LossWeights, SoftVQVAE
from softvq.quantizers import SoftVQ

IMAGE, GRID, DIM = (3, 32, 32), (8, 8), 64


class Size(NamedTuple):
    """Of a step."""

    device: torch.device
    batch: int  # images
    codes: int


class EagerSoftVQ(SoftVQ):
    """SoftVQ with the operator written in plain PyTorch."""

    def quantize(self, z: Tensor) -> SoftQuantized:
        """As SoftVQ, over an N×K matrix; over another where the loss reads constant latents."""
        rows = z.flatten(0, -2)
        scores = of_partition = eager_scores(rows, self.codebook, self.temperature)
        if self.commitment_weight != 1:
            of_partition = eager_scores(rows.detach(), self.codebook, self.temperature)
        outputs = eager_outputs(scores, of_partition, self.codebook)
        shapes = (z.shape, *3 * (z.shape[:-1],))
        return SoftQuantized(*(x.view(shape) for x, shape in zip(outputs, shapes, strict=True)))


class PeerVQ(nn.Module):
    """vector-quantize-pytorch's layer, with its defaults but for options, with the call of ours."""

    def __init__(self, dim: int, codes: int, **options: Any):
        super().__init__()
        from vector_quantize_pytorch import VectorQuantize

        self.dim, self.codebook_size = dim, codes
        self.layer = VectorQuantize(dim=dim, codebook_size=codes, **options)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantized, indices and loss of x (B, h, w, dim)."""
        quantized, indices, loss = self.layer(x.flatten(1, 2))
        return quantized.view(x.shape), indices.view(x.shape[:-1]), loss.sum()


# commitment_weight 1, as vector-quantize-pytorch: the codebook's loss also moves the latents, and
# the operator runs once a step.
QUANTIZERS: dict[str, tuple[str, Callable[[int], nn.Module]]] = {
    "softvq": ("softvq", lambda codes: SoftVQ(DIM, codes, commitment_weight=1.0)),
    "eager": ("torch", lambda codes: EagerSoftVQ(DIM, codes, commitment_weight=1.0)),
    "vector-quantize-pytorch": ("vector-quantize-pytorch", lambda codes: PeerVQ(DIM, codes)),
}


def main(arguments: list[str]) -> int:
    """`python -m bench step`."""
    parser = argparse.ArgumentParser(prog="python -m bench step", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, help="images; default 64 on a CPU, 1024 on a GPU")
    parser.add_argument("--codes", type=int, nargs="+", help="K")
    parser.add_argument("--quick", action="store_true", help="16 images, K = 512")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the devices' folders")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    results = Results(options.out, device)
    if not require_green(results, device):
        return 1
    gpu = device.type == "cuda"
    if not gpu:
        bounded_memory()
    batch = options.batch or (16 if options.quick else 1024 if gpu else 64)
    sizes = options.codes or ([512] if options.quick else [512, 4096, 16384][: 3 if gpu else 2])
    rows = [row for codes in sizes for row in measure(Size(device, batch, codes), 20)]
    written = results.replace("step", rows)
    report(written)
    print(f"\nwritten to {results.path}")
    return 0


def training_step(name: str, size: Size) -> Callable[[], object]:
    """Forward, backward and AdamW on the same images, as a function without arguments."""
    torch.manual_seed(0)
    model = SoftVQVAE(
        IMAGE,
        GRID,
        SoftVQ(DIM, size.codes),
        decoder_input="quantized",
        weights=LossWeights(reconstruction=1.0, kl=0.0),
    )
    model.quantizer = QUANTIZERS[name][1](size.codes)
    model = model.to(size.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    images = torch.rand(size.batch, *IMAGE, device=size.device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(images).losses["loss"].backward()
        optimizer.step()

    return step


def measure(size: Size, repeats: int) -> list[Row]:
    """Images per second and peak memory of each quantizer; the quantizers take turns."""
    clock = Clock(size.device)
    steps: dict[str, Callable[[], object]] = {}
    status: dict[str, str] = {}
    for name in QUANTIZERS:
        try:
            steps[name] = training_step(name, size)
            steps[name]()
        except Exception as error:  # of any library: its row says which
            steps.pop(name, None)
            status[name] = reason(error)
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            clock.settle()
            start = clock.mark()
            step()
            rates[name].append(size.batch / clock.seconds(start, clock.mark()))
    steps.clear()
    free()
    medians = {name: quantiles(values)["p50"] for name, values in rates.items()}
    rows: list[Row] = []
    for name, (package, _) in QUANTIZERS.items():
        base = {
            "candidate": name,
            "version": version(package),
            "rows": size.batch * GRID[0] * GRID[1],
            "codes": size.codes,
            "dim": DIM,
            "dtype": "float32",
            "metric": "images per second",
            "unit": "1/s",
        }
        if name in status:
            rows.append(base | {"status": status[name]})
            continue
        measured = {**quantiles(rates[name]), "status": "ok", "extra_bytes": peak(name, size)}
        if "eager" in medians:
            measured["times_eager"] = medians[name] / medians["eager"]
        rows.append(base | measured)
    return rows


def peak(name: str, size: Size) -> int | str:
    """Bytes beyond the model, its optimizer's state and the images; "" if they cannot be had."""
    try:
        return peak_bytes(size.device, training_step, name, size)
    except Exception:
        return ""
    finally:
        free()


def report(rows: list[dict[str, str]]) -> None:
    """Losing and failing rows too."""
    print(headline(rows[0]))
    print_table(
        ["N", "K", "D", "quantizer", "images/s", "p20–p80", "× eager", "extra MB", ""],
        [
            [
                *(row[name] for name in ("rows", "codes", "dim", "candidate", "p50")),
                f"{row['p20']}–{row['p80']}",
                row["times_eager"],
                f"{float(row['extra_bytes']) / 1e6:.0f}" if row["extra_bytes"] else "",
                row["status"],
            ]
            for row in rows
        ],
    )
