"""What the device itself can do, measured in the same run: products, copies, exponentials.

A candidate's percent of a limit is the time that limit alone would need over the time it took.
"""

from collections.abc import Callable

import torch

from bench.candidates import Setting
from bench.measure import Clock, quantiles
from bench.results import Row

PASSES = {"forward": 4, "backward": 10, "both": 14, "hard": 2}  # floating-point operations / NKD
EXPONENTIALS = {"forward": 1, "backward": 1, "both": 2, "hard": 0}  # per N·K
TURNS = 9
CHAIN = 64  # exponentials per number loaded on a GPU


def measure_limits(device: torch.device, dtypes: list[torch.dtype]) -> list[Row]:
    """Operations, bytes and exponentials per second, a row each."""
    work: dict[tuple[str, str, str], tuple[float, Callable[[], object]]] = {}
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        work["matmul", name, "operations/s"] = _matmul(device, dtype)
    work["copy", "", "bytes/s"] = _copy(device)
    work["exp", "float32", "exponentials/s"] = _exponential(device)
    clock = Clock(device)
    rows = []
    for (metric, dtype, unit), (amount, run) in work.items():
        rates = []
        for repeat in range(TURNS + 1):
            clock.settle()
            start = clock.mark()
            run()
            seconds = clock.seconds(start, clock.mark())
            if repeat:  # the first turn warms up
                rates.append(amount / seconds)
        rows.append({"metric": metric, "dtype": dtype, "unit": unit, **quantiles(rates)})
    return rows


def percents(setting: Setting, what: str, seconds: float, limits: list[Row]) -> dict[str, float]:
    """How much of each measured limit a pass of that many seconds reaches."""
    pairs = setting.rows * setting.codes
    dtype = str(setting.dtype).removeprefix("torch.")
    needed = {
        ("matmul", dtype): PASSES[what] * pairs * setting.dim,
        ("copy", ""): least_bytes(setting, what),
        ("exp", "float32"): EXPONENTIALS[what] * pairs,
    }
    rates = {(row["metric"], row["dtype"]): float(row["p50"]) for row in limits}
    return {
        f"percent_{metric}": 100 * amount / rates[metric, dtype] / seconds
        for (metric, dtype), amount in needed.items()
        if (metric, dtype) in rates
    }


def least_bytes(setting: Setting, what: str) -> int:
    """Bytes of inputs and outputs that must be read or written once, whatever the method."""
    latents = setting.rows * setting.dim * setting.dtype.itemsize
    codebook = setting.codes * setting.dim * setting.dtype.itemsize
    reads = {"forward": 2 * latents + codebook, "backward": 3 * latents + 2 * codebook}
    reads["both"] = reads["forward"] + reads["backward"]
    return reads.get(what, latents + 2 * codebook)


def _matmul(device: torch.device, dtype: torch.dtype) -> tuple[float, Callable[[], object]]:
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2.0 * size**3, lambda: a @ b


def _copy(device: torch.device) -> tuple[float, Callable[[], object]]:
    numbers = 2**29 if device.type == "cuda" else 2**26
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    return 8.0 * numbers, lambda: target.copy_(source)


def _exponential(device: torch.device) -> tuple[float, Callable[[], object]]:
    """Exponentials of numbers in registers on a GPU, in the cache on a CPU."""
    if device.type == "cuda":
        x = torch.rand(2**25, device=device)

        @torch.compile
        def chain(x):
            for _ in range(CHAIN):
                x = torch.exp2(-x)
            return x

        return float(CHAIN * x.numel()), lambda: chain(x)
    x = torch.rand(2**17)
    y = torch.empty_like(x)

    def repeated() -> None:
        for _ in range(CHAIN):
            torch.exp2(x, out=y)

    return float(CHAIN * x.numel()), repeated
