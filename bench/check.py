"""The operator against float64, beside plain PyTorch's own error; exit status 1 if a bound breaks.

The bounds are those of the tests (bench/bounds.py). A second table compares how accurate the
candidates of `bench op` are.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from bench.accuracy import accuracy, print_accuracy
from bench.bounds import errors_over_draws, factor, make
from bench.results import OUT, Results, Row, headline, print_table
from bench.truth import Problem, matmul_in
from softvq.kernels import streaming

FLOAT32, HALVES = torch.float32, (torch.bfloat16, torch.float16)


class Case(NamedTuple):
    """One problem, drawn `draws` times."""

    dtype: torch.dtype = FLOAT32
    temperature: float = 1.0
    offset: float = 0.0
    dim: int = 64
    codes: int = 256
    rows: int = 256

    def draw(self, device: torch.device) -> Problem:
        shape = (1, self.rows, self.codes, self.dim)
        return make(*shape, temperature=self.temperature, offset=self.offset, device=device)


def cases(backend: str, quick: bool, small: bool) -> Iterator[Case]:
    """Every dtype at every temperature and offset; then D and K one by one."""
    small_sizes = {"dim": 20, "codes": 70, "rows": 70} if small else {}
    temperatures, offsets = (0.01, 0.1, 1.0, 10.0), (0.0, 10.0)
    dtypes = (FLOAT32, *HALVES) + ((torch.float64,) if backend == "streaming" else ())
    if quick:
        temperatures, offsets, dtypes = (0.1, 1.0), (0.0,), dtypes[:2]
    for dtype in dtypes:
        for temperature in temperatures:
            for offset in offsets:
                yield Case(dtype, temperature, offset, **small_sizes)
    if quick:
        return
    for dtype in dtypes[:2]:
        for dim in (1, 4, 16, 130) if small else (1, 4, 16, 48, 128, 256):
            yield Case(dtype, **small_sizes | {"dim": dim})
        for codes in (1, 67, 130) if small else (1, 67, 1000, 4096):
            yield Case(dtype, **small_sizes | {"codes": codes})


def main(arguments: list[str]) -> int:
    """`python -m bench check`."""
    parser = argparse.ArgumentParser(prog="python -m bench check", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--backend",
        choices=("streaming", "triton"),
        help="default: triton on a GPU; without one it needs TRITON_INTERPRET=1",
    )
    parser.add_argument("--quick", action="store_true", help="two dtypes, two temperatures")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the devices' folders")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    backend = options.backend or default_backend(device)
    results = Results(options.out, device)
    torch.manual_seed(0)
    rows = check(backend, device, options.quick)
    written = results.replace("check", rows)
    compared = results.replace("accuracy", accuracy(device, options.quick))
    print(headline(written[0]))
    print_checks(written)
    print_accuracy(compared)
    broken = sum(row["status"] != "ok" for row in written)
    print(f"\n{len(written)} bounds, {broken} broken; written to {results.path}")
    return 1 if broken else 0


def default_backend(device: torch.device) -> str:
    """What users of the device should get."""
    return "triton" if device.type == "cuda" else "streaming"


def check(backend: str, device: torch.device, quick: bool) -> list[Row]:
    """A row for every case and quantity."""
    interpreted = backend == "triton" and device.type == "cpu"
    rows: list[Row] = []
    for case in cases(backend, quick, small=interpreted):
        errors = errors_over_draws(
            module(backend),
            partial(case.draw, device),
            case.dtype,
            draws=2 if interpreted else 4,
            **allowances(backend, case.dtype),
        )
        for name, error in errors.items():
            allowed = error.allowed(factor(name))
            rows.append(
                {
                    **{key: getattr(case, key) for key in ("rows", "codes", "dim")},
                    **{key: getattr(case, key) for key in ("temperature", "offset")},
                    "candidate": f"softvq {backend}",
                    "dtype": str(case.dtype).removeprefix("torch."),
                    "precision": "highest",
                    "metric": name,
                    "p50": error.ours,
                    "plain": error.plain,
                    "allowed": allowed,
                    "status": "ok" if error.ours <= allowed else "broken",
                }
            )
    return rows


def module(backend: str) -> ModuleType:
    """The backend's functions; the fused ones need Triton."""
    if backend == "streaming":
        return streaming
    from softvq.kernels import fused

    return fused


def allowances(backend: str, dtype: torch.dtype) -> dict[str, float | Callable]:
    """As in the tests: what 16-bit matrix units round, plain PyTorch rounds too."""
    if backend == "triton" and dtype in HALVES:
        return {"matmul": matmul_in(dtype), "usage_floor": 10.0}
    return {}


def require_green(results: Results, device: torch.device) -> bool:
    """Whether this very code has passed; a quick check runs if none has been made."""
    if not results.current("check"):
        torch.manual_seed(0)
        results.replace("check", check(default_backend(device), device, quick=True))
    broken = [row for row in results.current("check") if row["status"] != "ok"]
    if broken:
        print("The numeric check is red; no speed is reported for wrong results:\n")
        print_checks(broken)
    return not broken


def print_checks(rows: list[dict[str, str]]) -> None:
    """One line a case: the quantity nearest to its bound, forward and gradients."""
    worst: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        kind = "gradients" if "grad" in row["metric"] else "forward"
        key = (*(row[name] for name in ("dtype", "temperature", "offset", "dim", "codes")), kind)
        if key not in worst or _used(row) > _used(worst[key]):
            worst[key] = row
    print_table(
        [*("dtype", "T", "offset", "D", "K", "part"), *("worst", "error", "plain", "allowed", "")],
        [
            [*key, *(row[name] for name in ("metric", "p50", "plain", "allowed", "status"))]
            for key, row in worst.items()
        ],
    )


def _used(row: dict[str, str]) -> float:
    """Error over what is allowed; exact results may have nothing allowed."""
    return float(row["p50"]) / max(float(row["allowed"]), 1e-300)
