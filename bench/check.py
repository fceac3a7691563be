"""The operator against float64, beside plain PyTorch's own error; exit status 1 if a bound breaks.

The bounds are those of the tests (bench/bounds.py). A second table compares how accurate the
candidates of `bench op` are.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from bench.accuracy import accuracy, print_accuracy
from bench.bounds import REDUCED_PRECISION, errors_over_draws, factor, make, reduced_errors
from bench.results import OUT, Results, Row, headline, print_table
from bench.truth import Problem, matmul_in
from softvq.kernels.operators import BACKENDS

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
        """Random latents and codes, of float32."""
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
        for dim in (4, 16, 130) if small else (4, 16, 128, 256):
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
    broken = sum(row["status"] == "broken" for row in written)
    bounds = broken + sum(row["status"] == "ok" for row in written)
    print(f"\n{bounds} bounds, {broken} broken; written to {results.path}")
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
            draws=4,
            **allowances(backend, case.dtype),
        )
        base = case._asdict() | {"dtype": str(case.dtype).removeprefix("torch.")}
        base |= {"candidate": f"softvq {backend}", "precision": "highest"}
        for name, error in errors.items():
            found = {"metric": name, "p50": error.ours, "plain": error.plain}
            allowed = error.allowed(factor(name)) if bounded(case) else None
            rows.append(base | found | judged(error.ours, allowed))
    if backend == "triton" and not quick:
        rows += reduced(device)
    return rows


def reduced(device: torch.device) -> list[Row]:
    """The lower precisions of the fused kernels, whose bounds stand by themselves."""
    rows: list[Row] = []
    for precision, bounds in REDUCED_PRECISION.items():
        for offset in (0.0, 100.0):
            base = {"candidate": "softvq triton", "dtype": "float32", "precision": precision}
            base |= {"rows": 130, "codes": 130, "dim": 48, "temperature": 1.0, "offset": offset}
            for name, error in reduced_errors(module("triton"), precision, offset, device).items():
                found = {"metric": name, "p50": error}
                rows.append(base | found | judged(error, bounds[name.partition(" ")[0]]))
    return rows


def bounded(case: Case) -> bool:
    """Whether the tests bound a case. Of 16-bit latents they do near the origin, from T = 0.1 and
    D = 5 up: elsewhere float32 multiplies them exactly, and the yardstick, its error, vanishes.
    """
    near = case.offset == 0 and case.temperature >= 0.1 and case.dim >= 5
    return case.dtype not in HALVES or near


def judged(error: float, allowed: float | None) -> Row:
    """The columns that say whether a bound holds."""
    if allowed is None:
        return {"status": "no bound"}
    return {"allowed": allowed, "status": "ok" if error <= allowed else "broken"}


def module(backend: str) -> ModuleType:
    """The backend's functions; the fused ones need Triton."""
    return import_module(BACKENDS[backend])


def allowances(backend: str, dtype: torch.dtype) -> dict[str, Callable]:
    """As in the tests: what 16-bit matrix units round, plain PyTorch rounds too."""
    return {"matmul": matmul_in(dtype)} if backend == "triton" and dtype in HALVES else {}


def require_green(results: Results, device: torch.device) -> bool:
    """Whether this very code has passed; a quick check runs if none has been made."""
    backend = default_backend(device)
    if not any(row["candidate"] == f"softvq {backend}" for row in results.current("check")):
        torch.manual_seed(0)
        results.replace("check", check(backend, device, quick=True))
    broken = [row for row in results.current("check") if row["status"] == "broken"]
    if broken:
        print("The numeric check is red; no speed is reported for wrong results:\n")
        print_checks(broken)
    return not broken


def print_checks(rows: list[dict[str, str]]) -> None:
    """A line for the forward and one for the gradients: what is nearest to its bound."""
    worst: dict[tuple[str, ...], dict[str, str]] = {}
    case = ("dtype", "precision", "temperature", "offset", "dim", "codes")
    for row in rows:
        kind = "gradients" if "grad" in row["metric"] else "forward"
        key = (*(row[name] for name in case), kind)
        if key not in worst or _used(row) > _used(worst[key]):
            worst[key] = row
    columns = ["dtype", "precision", "T", "offset", "D", "K", "part", "worst", "error", "plain"]
    print_table(
        [*columns, "allowed", ""],
        [
            [*key, *(row[name] for name in ("metric", "p50", "plain", "allowed", "status"))]
            for key, row in worst.items()
        ],
    )


def _used(row: dict[str, str]) -> float:
    """Error over what is allowed or, without a bound, plain PyTorch's; either may be zero."""
    return float(row["p50"]) / max(float(row["allowed"] or row["plain"]), 1e-300)
