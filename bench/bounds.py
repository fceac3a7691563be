"""What every backend without an N×K matrix must pass: float64 truth, beside plain PyTorch."""

from collections.abc import Callable
from types import ModuleType

import torch

from bench.truth import Errors, Problem, forward, gradients

ALL = ("quantized", "log_partition", "entropy", "usage")
GRADIENTS = ("grad z", "grad codebook", "grad temperature")
ORDERS = 4  # of the features, in which plain PyTorch adds them up


def make(heads, rows, codes, dim, temperature=1.0, offset=0.0, device="cpu") -> Problem:
    return Problem(
        torch.randn(heads, rows, dim, device=device) + offset,
        torch.randn(heads, codes, dim, device=device) + offset,
        torch.tensor(temperature, device=device),
    )


def undecided(heads, rows, codes, dim, temperature=1.0, device="cpu") -> Problem:
    """Latents half way between two codes, give or take T.

    At a small T a random latent has one code, however its distances are rounded: the largest error
    of thousands is then that of a row or two, and how it compares with another a matter of luck.
    """
    problem = make(heads, rows, codes, dim, temperature, device=device)
    of_head = torch.arange(heads, device=device)[:, None]
    first, second = torch.randint(codes, (2, heads, rows), device=device)
    middle = (problem.codebook[of_head, first] + problem.codebook[of_head, second]) / 2
    return problem._replace(z=middle + temperature / (4 * dim**0.5) * problem.z)


def incoming_for(problem: Problem) -> dict[str, torch.Tensor]:
    return {name: torch.randn_like(output) for name, output in forward(problem).items()}


def run(backend: ModuleType, problem: Problem, **options) -> dict[str, torch.Tensor]:
    """The backend's floating outputs by name, and what it saved."""
    inputs = [x.detach() for x in problem]
    quantized, indices, log_partition, entropy, row_state = backend.soft_forward(*inputs, **options)
    sums = backend.probability_sums(*inputs, None, **options)
    usage = sums[..., 0] / inputs[0].shape[1]
    outputs = dict(zip(ALL, (quantized, log_partition, entropy, usage), strict=True))
    return outputs | {"indices": indices, "row_state": row_state}


def results(
    problem: Problem, incoming: dict[str, torch.Tensor], matmul=torch.matmul
) -> dict[str, torch.Tensor]:
    """Outputs of plain PyTorch, and its gradients for the incoming gradients, by name."""
    grads = gradients(problem, incoming, matmul)
    return forward(problem, matmul) | {f"grad {name}": grad for name, grad in grads.items()}


def plain_results(
    given: Problem, incoming: dict[str, torch.Tensor], order: torch.Tensor, matmul
) -> dict[str, torch.Tensor]:
    """What plain float32 PyTorch makes of the features in this order (D), and so in the scores of
    other roundings; brought back to the given order."""
    z, codebook, temperature = given
    ordered = Problem(z[..., order], codebook[..., order], temperature).to(torch.float32)
    features = {"quantized", "grad z", "grad codebook"}
    incoming = {name: x[..., order] if name in features else x for name, x in incoming.items()}
    found = results(ordered, incoming, matmul)
    if z.dtype != codebook.dtype:
        # What the scores decide; in them, the codes are in two parts of the latents' dtype.
        high = ordered.codebook.to(z.dtype)
        low = (ordered.codebook - high).to(z.dtype)
        exact = forward(ordered._replace(codebook=high.float() + low.float()))
        found |= {name: x for name, x in exact.items() if name != "quantized"}
    back = order.argsort()
    return {name: x[..., back] if name in features else x for name, x in found.items()}


def errors_over_draws(
    backend: ModuleType,
    draw: Callable[[], Problem],
    dtype=torch.float32,
    names=ALL,
    draws=8,
    matmul=torch.matmul,
    **options,
) -> dict[str, Errors]:
    """Errors of outputs and gradients, the backend's and plain float32 PyTorch's, over draws.

    Where a row or two decide, between codes that are nearly as near, plain PyTorch's error is a
    matter of luck: it is the largest of several orders in which it can add up the features.
    With `matmul` plain PyTorch multiplies otherwise; with a `dtype` of None the drawn dtypes stay.
    """
    errors = {name: Errors() for name in (*ALL, *GRADIENTS)}
    errors["entropy"].floor = 1.0
    for _ in range(draws):
        # The rounded inputs are the problem.
        given = draw() if dtype is None else draw().to(dtype)
        incoming = incoming_for(given.to(torch.float32))
        incoming = {name: incoming[name].to(given.z.dtype) for name in names}
        found = run(backend, given, **options)
        grads = backend.soft_backward(
            *(x.detach() for x in given),
            *(incoming.get(name) for name in ALL),
            *(True, True, True, *(found[name] for name in ("quantized", "indices", "row_state"))),
            **options,
        )
        found |= dict(zip(GRADIENTS, grads, strict=True))
        truth = results(given.to(torch.float64), incoming)
        dim, device = given.z.shape[-1], given.z.device
        for order in [torch.arange(dim), *(torch.randperm(dim) for _ in range(ORDERS - 1))]:
            plain = plain_results(given, incoming, order.to(device), matmul)
            for name, error in errors.items():
                error.add(found[name], plain[name], truth[name])
    return errors


def factor(name: str) -> float:
    """How many times plain PyTorch's own error an output or gradient may have."""
    return 3 if name.startswith("grad") else 2


def check(backend: ModuleType, draw: Callable[[], Problem], *args, **options) -> None:
    """Each within `factor` times plain float32 PyTorch's own error, over draws."""
    for name, error in errors_over_draws(backend, draw, *args, **options).items():
        error.assert_no_worse(factor(name), name)


def far_code(factor: float, device="cpu") -> Problem:
    """One code is `factor` times as far from the origin as the others; no latent is near it."""
    problem = make(1, 67, 130, 16, device=device)
    problem.codebook[0, 5] *= factor
    return problem


def near_ties() -> Problem:
    problem = make(1, 64, 32, 16, temperature=0.01)
    codebook = problem.codebook
    codebook[:, 16:] = codebook[:, :16] * (1 + 1e-6)
    return Problem(codebook[:, :16].repeat(1, 4, 1) + 1e-3, codebook, problem.temperature)


# Of float32 latents, largest error relative to the largest true value (T = D / 48): what the
# scores lose is about 1e-6·|z||c| split and 5e-4·|z||c| single; operands of the other products
# have 8 bits.
REDUCED_PRECISION = {
    "high": {
        "log_partition": 1e-5,
        "entropy": 2e-4,
        "usage": 1e-4,
        "quantized": 5e-3,
        "grad": 1e-2,
    },
    "medium": {"log_partition": 1e-2, "entropy": 0.1, "usage": 5e-2, "quantized": 0.1, "grad": 0.1},
}


def reduced_errors(
    backend: ModuleType, precision: str, offset: float, device: str | torch.device, dim: int = 48
) -> dict[str, float]:
    """Errors of one problem as REDUCED_PRECISION bounds them, without the offset of the data."""
    problem = make(2, 130, 130, dim, temperature=dim / 48, device=device)
    # Exact also far from zero, so that every offset poses the same problem.
    problem = Problem(*((x * 64).round() / 64 + offset for x in problem[:2]), problem.temperature)
    outputs, true = run(backend, problem, precision=precision), problem.to(torch.float64)
    incoming = {name: torch.randn_like(outputs[name]) for name in ALL}
    saved = (outputs["quantized"], outputs["indices"], outputs["row_state"])
    grads = backend.soft_backward(
        *problem, *incoming.values(), True, True, True, *saved, precision=precision
    )
    names = ("z", "codebook", "temperature")
    found = outputs | {f"grad {n}": grad for n, grad in zip(names, grads, strict=True)}
    truth = forward(true) | {f"grad {n}": x for n, x in gradients(true, incoming).items()}
    return {
        name: ((found[name] - x).abs().max() / (x - offset * (name == "quantized")).abs().max())
        .nan_to_num(nan=torch.inf)
        .item()
        for name, x in truth.items()
    }


def nearest_excess(
    z: torch.Tensor,
    codebook: torch.Tensor,
    indices: torch.Tensor,
    unit: float = 2**-24,
    centred: bool = False,
) -> float:
    """By how much the chosen codes of z (N, D) are further, squared, than the nearest ones, at
    most, over what the rounding of a product z·c explains: a few units of the largest |z|·|c|,
    where `centred` of what is left of both without the mean code. At most 1.
    """
    z, codebook = z.double(), codebook.double()
    if centred:
        centre = codebook.mean(0)
        z, codebook = z - centre, codebook - centre
    longest, worst = codebook.norm(dim=1).max(), z.new_zeros(())
    for rows, chosen in zip(z.split(4096), indices.split(4096), strict=True):
        # The same for all codes of a row: ‖z‖² is left out.
        distance = codebook.square().sum(1) - 2 * rows @ codebook.T
        excess = distance.gather(1, chosen[:, None])[:, 0] - distance.amin(1)
        rounding = 16 * unit * (rows.norm(dim=1) + longest) * longest
        # A single code, centred, has no length.
        worst = worst.maximum((excess / rounding.clamp(min=1e-300)).max())  # NaN stays NaN
    return worst.item()
