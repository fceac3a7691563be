"""Ways to compute soft quantisation, each set up as well as its authors would."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import softvq


class Setting(NamedTuple):
    """What an operator is asked to do."""

    device: torch.device
    rows: int
    codes: int
    dim: int
    dtype: torch.dtype = torch.float32
    temperature: float = 1.0
    offset: float = 0.0  # of the data from the origin

    def draw(self, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (N, D), codebook (K, D), both leaves, and the gradient of q (N, D)."""
        generator = torch.Generator(self.device).manual_seed(seed)

        def normal(rows: int) -> Tensor:
            return torch.randn(rows, self.dim, generator=generator, device=self.device)

        z, codebook = normal(self.rows) + self.offset, normal(self.codes) + self.offset
        z, codebook = (x.to(self.dtype).requires_grad_() for x in (z, codebook))
        return z, codebook, normal(self.rows).to(self.dtype)

    def columns(self) -> dict[str, object]:
        """Of the CSV."""
        return {
            "rows": self.rows,
            "codes": self.codes,
            "dim": self.dim,
            "dtype": str(self.dtype).removeprefix("torch."),
            "temperature": self.temperature,
            "offset": self.offset,
        }


class Outputs(NamedTuple):
    """What a candidate gives; None is what it cannot."""

    quantized: Tensor | None = None
    indices: Tensor | None = None
    log_partition: Tensor | None = None
    entropy: Tensor | None = None


Run = Callable[[Tensor, Tensor], Outputs]


class Candidate(NamedTuple):
    """A way to compute it: `prepare` sets it up for a setting, and may raise what it lacks."""

    name: str
    prepare: Callable[[Setting], Run]
    outputs: str
    package: str = "torch"  # whose version counts
    precision: str = ""


ALL = "q, indices, log-partition, entropy"
LEAN = "q, indices"


def eager(z: Tensor, codebook: Tensor, temperature: float | Tensor) -> Outputs:
    """The N×K matrix in plain PyTorch, with everything `soft_quantize` returns."""
    scores = eager_scores(z, codebook, temperature)
    return eager_outputs(scores, scores.detach(), codebook)


def eager_scores(z: Tensor, codebook: Tensor, temperature: float | Tensor) -> Tensor:
    """−‖z−c‖²/T, (N, K), in float32."""
    distance = (
        z.float().square().sum(1, keepdim=True)
        - 2 * (z @ codebook.T).float()
        + codebook.float().square().sum(1)
    )
    return -distance / temperature


def eager_outputs(scores: Tensor, of_partition: Tensor, codebook: Tensor) -> Outputs:
    """Everything that follows from scores (N, K); the log-partition from those `of_partition`."""
    log_p = scores.log_softmax(1)
    p = log_p.exp()
    indices = scores.detach().argmax(1)
    entropy = -(p.detach() * log_p.detach()).sum(1)
    return Outputs(p.to(codebook.dtype) @ codebook, indices, of_partition.logsumexp(1), entropy)


def eager_lean(z: Tensor, codebook: Tensor, temperature: float | Tensor) -> Outputs:
    """The N×K matrix in plain PyTorch, q and indices only, with the fewest passes over it."""
    bias = codebook.square().sum(1) / -2
    scores = torch.addmm(bias, z, codebook.T) * (2 / temperature)
    return Outputs(scores.softmax(1) @ codebook, scores.detach().argmax(1))


def chunked(z: Tensor, codebook: Tensor, temperature: float) -> Outputs:
    """Lean eager in blocks of rows, each recomputed in the backward (torch.utils.checkpoint)."""
    elements = 2**22 if z.device.type == "cpu" else 2**26  # of a block: a cache; a busy GPU
    step = max(32, elements // len(codebook))
    parts = [
        checkpoint(eager_lean, block, codebook, temperature, use_reentrant=False)
        for block in z.split(step)
    ]
    return Outputs(torch.cat([q for q, *_ in parts]), torch.cat([i for _, i, *_ in parts]))


def two_products(z: Tensor, codebook: Tensor, temperature: float) -> Outputs:
    """Nothing but the two matrix products: what no exact way can beat."""
    return Outputs((z @ codebook.T) @ codebook)


def plain(function: Callable[[Tensor, Tensor, float], Outputs]) -> Callable[[Setting], Run]:
    """Prepare a function by giving it the temperature."""

    def prepare(setting: Setting) -> Run:
        return lambda z, codebook: function(z, codebook, setting.temperature)

    return prepare


def compiled(
    function: Callable[[Tensor, Tensor, float | Tensor], Outputs], mode: str | None = None
) -> Callable[[Setting], Run]:
    """Prepare a function by torch.compile for the one shape and any temperature."""

    def prepare(setting: Setting) -> Run:
        run = torch.compile(function, dynamic=False, mode=mode)
        temperature = torch.tensor(setting.temperature, device=setting.device)
        return lambda z, codebook: run(z, codebook, temperature)

    return prepare


def ours(backend: str = "auto", precision: str = "highest") -> Callable[[Setting], Run]:
    """Prepare softvq."""

    def prepare(setting: Setting) -> Run:
        def run(z: Tensor, codebook: Tensor) -> Outputs:
            options = {"backend": backend, "precision": precision}
            return Outputs(*softvq.soft_quantize(z, codebook, setting.temperature, **options))

        return run

    return prepare


def softvq_candidates(setting: Setting) -> list[Candidate]:
    """Ours: what a user gets, and on a GPU each backend and precision by name."""
    found = [Candidate("softvq", ours(), ALL, "softvq")]
    if setting.device.type == "cuda":
        found += [
            Candidate("softvq streaming", ours("streaming"), ALL, "softvq"),
            Candidate("softvq triton", ours("triton"), ALL, "softvq", "highest"),
        ]
        if setting.dtype == torch.float32:
            for precision in ("high", "medium"):
                run = ours("triton", precision)
                found.append(
                    Candidate(f"softvq triton, {precision}", run, ALL, "softvq", precision)
                )
    return found


def torch_candidates(setting: Setting) -> list[Candidate]:
    """Plain PyTorch, and what PyTorch makes of it."""
    return [
        Candidate("eager", plain(eager), ALL),
        Candidate("eager, lean", plain(eager_lean), LEAN),
        Candidate("eager, chunked", plain(chunked), LEAN),
        Candidate("compiled", compiled(eager), ALL),
        Candidate("compiled, lean", compiled(eager_lean), LEAN),
        Candidate("two products", plain(two_products), "z·Cᵀ·C"),
    ]


def slow_candidates(setting: Setting) -> list[Candidate]:
    """What compiles for a minute: after all others, whose time it would take."""
    if setting.device.type == "cpu" or setting.codes > 4096:
        return []
    return [Candidate("max-autotune", compiled(eager_lean, "max-autotune"), LEAN)]


def batches(setting: Setting) -> int:
    """Into how many batch entries attention's rows are split, so that its backward is parallel.

    Its dK and dV have a program for every batch entry and every 128 keys; there should be a few for
    each processor.
    """
    wanted = 16
    if setting.device.type == "cuda":
        processors = torch.cuda.get_device_properties(setting.device).multi_processor_count
        wanted = 2 * processors / math.ceil(setting.codes / 128)
    return math.gcd(setting.rows, 2 ** max(0, math.ceil(math.log2(wanted))))
