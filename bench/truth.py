"""The operator as anyone would write it in PyTorch, differentiated by autograd; and its truth."""

from typing import NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    z: Tensor  # (H, N, D)
    codebook: Tensor  # (H, K, D)
    temperature: Tensor  # ()

    def to(self, dtype: torch.dtype) -> "Problem":
        return Problem(*(x.detach().to(dtype).requires_grad_() for x in self))


def forward(problem: Problem, matmul=torch.matmul) -> dict[str, Tensor]:
    z, codebook, temperature = problem
    distance = (
        z.square().sum(-1)[..., None]
        - 2 * matmul(z, codebook.mT)
        + codebook.square().sum(-1)[:, None, :]
    )
    s = -distance / temperature
    log_p = s.log_softmax(-1)
    p = log_p.exp()
    return {
        "quantized": matmul(p, codebook),
        "log_partition": s.logsumexp(-1),
        "entropy": -(p * log_p).sum(-1),
        "usage": p.mean(1),
    }


def gradients(
    problem: Problem, incoming: dict[str, Tensor], matmul=torch.matmul
) -> dict[str, Tensor]:
    """Gradients of the inputs for the incoming gradients, named as the outputs of `forward`."""
    outputs = forward(problem, matmul)
    names = list(incoming)
    grads = torch.autograd.grad(
        [outputs[name] for name in names],
        problem,
        [incoming[name].to(outputs[name].dtype) for name in names],
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(("z", "codebook", "temperature"), grads, strict=True))


def matmul_in(dtype: torch.dtype):
    """A matrix product whose operands, gradients too, are rounded to `dtype`; float32 sums."""

    class Matmul(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            a, b = a.to(dtype).float(), b.to(dtype).float()
            ctx.save_for_backward(a, b)
            return a @ b

        @staticmethod
        def backward(ctx, grad):
            a, b = ctx.saved_tensors
            grad = grad.to(dtype).float()
            return grad @ b.mT, a.mT @ grad

    return Matmul.apply


class Errors:
    """Largest errors of one quantity over several draws, ours and plain PyTorch's.

    One draw of one number can be exact by luck; the largest of several cannot.
    """

    def __init__(self, floor: float = 0.0):
        self.ours = self.plain = self.largest = 0.0
        self.floor = floor

    def add(self, ours: Tensor, plain: Tensor, truth: Tensor) -> None:
        self.eps = torch.finfo(ours.dtype).eps
        error = (ours.double() - truth).abs().nan_to_num(nan=torch.inf)  # max() would drop a NaN
        self.ours = max(self.ours, error.max().item())
        self.plain = max(self.plain, (plain.to(ours.dtype).double() - truth).abs().max().item())
        self.largest = max(self.largest, truth.abs().max().item())

    def allowed(self, factor: float) -> float:
        """factor × plain + 4 eps × (largest true value + floor)."""
        return factor * self.plain + 4 * self.eps * (self.largest + self.floor)

    def assert_no_worse(self, factor: float, what: str) -> None:
        """Ours within what is allowed."""
        allowed = self.allowed(factor)
        assert self.ours <= allowed, f"{what}: error {self.ours:.3g}, allowed {allowed:.3g}"
