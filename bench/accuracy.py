"""How exact every candidate of `bench op` is: against float64, over temperatures and offsets."""

import torch
from torch import Tensor

from bench.candidates import Run, Setting, softvq_candidates, torch_candidates
from bench.hard import hard_candidates
from bench.measure import reason
from bench.peers import peer_candidates
from bench.results import Row, print_table, version
from bench.truth import Problem, forward, gradients

TEMPERATURES, OFFSETS = (0.01, 0.1, 1.0, 10.0), (0.0, 10.0)


def accuracy(device: torch.device, quick: bool) -> list[Row]:
    """A row for every candidate, setting and metric."""
    rows, codes = (512, 256) if quick else (4096, 1024)
    torch.compiler.reset()  # earlier shapes count against the limit of recompilations
    dtypes = (torch.float32,) if quick or device.type == "cpu" else (torch.float32, torch.bfloat16)
    return [
        row
        for dtype in dtypes
        for temperature in TEMPERATURES
        for offset in OFFSETS
        for row in compare(Setting(device, rows, codes, 16, dtype, temperature, offset), quick)
    ]


def compare(setting: Setting, quick: bool) -> list[Row]:
    """Every candidate on one problem; the rounded inputs are the problem."""
    soft = torch_candidates(setting) + peer_candidates(setting) + softvq_candidates(setting)
    candidates = soft + hard_candidates(setting)
    if quick:  # compilation takes longer than everything else
        candidates = [c for c in candidates if c.name in ("softvq", "eager", "eager, lean")]
    z, codebook, grad = setting.draw(0)
    temperature = torch.tensor(setting.temperature, device=setting.device)
    problem = Problem(z[None], codebook[None], temperature).to(torch.float64)
    true = {name: x[0] for name, x in forward(problem).items()}
    true["indices"] = torch.cdist(problem.z, problem.codebook).argmin(-1)[0]
    found = gradients(problem, {"quantized": grad[None]})
    true |= {f"grad {name}": found[name][0] for name in ("z", "codebook")}
    rows: list[Row] = []
    for candidate in candidates:
        if candidate.name == "two products":  # not this operator
            continue
        base = {
            **setting.columns(),
            "candidate": candidate.name,
            "version": version(candidate.package),
            "outputs": candidate.outputs,
            "precision": candidate.precision,
        }
        try:
            measured = errors(
                candidate.prepare(setting), (z, codebook, grad), true, candidate in soft
            )
        except Exception as error:  # of any library: its row says which
            rows.append(base | {"status": reason(error)})
            continue
        rows += [base | {"metric": k, "p50": v, "status": "ok"} for k, v in measured.items()]
    return rows


def errors(
    run: Run, tensors: tuple[Tensor, ...], true: dict[str, Tensor], soft: bool
) -> dict[str, float]:
    """Share of wrong indices; largest error of the log-partition; others relative to the largest
    true value."""
    z, codebook, grad = tensors
    with torch.set_grad_enabled(soft):
        outputs = run(z, codebook)
    found: dict[str, float] = {}
    if outputs.indices is not None:
        found["wrong indices"] = (outputs.indices != true["indices"]).double().mean().item()
    if outputs.log_partition is not None:
        error = outputs.log_partition.double() - true["log_partition"]
        found["error of log-partition"] = error.abs().max().item()
    if soft:
        grads = torch.autograd.grad(outputs.quantized, (z, codebook), grad)
        for name, value in zip(
            ("quantized", "grad z", "grad codebook"), (outputs.quantized, *grads), strict=True
        ):
            error = (value.double() - true[name]).abs().max() / true[name].abs().max()
            found[f"error of {name}"] = error.item()
    return found


def print_accuracy(rows: list[dict[str, str]]) -> None:
    """A line for every candidate and setting."""
    metrics = ["wrong indices", "error of log-partition", "error of quantized"]
    metrics += ["error of grad z", "error of grad codebook"]
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("dtype", "temperature", "offset", "candidate"))
        found = lines.setdefault(key, {"status": row["status"]})
        found[row["metric"]] = row["p50"]
    print(f"\nAgainst float64, N = {rows[0]['rows']}, K = {rows[0]['codes']}, D = {rows[0]['dim']}")
    print_table(
        ["dtype", "T", "offset", "candidate", *metrics, ""],
        [
            [*key, *(found.get(m, "") for m in metrics), found["status"]]
            for key, found in lines.items()
        ],
    )
