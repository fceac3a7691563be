"""Differentiable operators: the registered forward joined to the hand-written backward."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from softvq.kernels import operators


class SoftQuantize(torch.autograd.Function):
    """(z, codebook, temperature) → (quantized, indices, log_partition, entropy).

    Shapes: z (H, N, D), codebook (H, K, D), temperature (); see README.md for the estimators.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        codebook: Tensor,
        temperature: Tensor,
        straight_through: bool,
        detach_probabilities: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        quantized, indices, log_partition, entropy = operators.soft_forward(
            z, codebook, temperature, backend
        )
        if straight_through:
            dim = codebook.shape[2]
            rows = indices[..., None].expand(-1, -1, dim)
            quantized = codebook.gather(1, rows).to(z.dtype)
        ctx.save_for_backward(z, codebook, temperature)
        ctx.detach_probabilities = detach_probabilities
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        if detach_probabilities:
            ctx.mark_non_differentiable(indices, log_partition, entropy)
        else:
            ctx.mark_non_differentiable(indices)
        return quantized, indices, log_partition, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_quantized: Tensor | None,
        _: None,
        grad_log_partition: Tensor | None,
        grad_entropy: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of z, codebook and temperature; None for what nobody asked for."""
        z, codebook, temperature = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if ctx.detach_probabilities:
            if not needs[1]:
                return None, None, None, None, None, None
            grad_codebook = operators.probability_sums(
                z, codebook, temperature, grad_quantized, ctx.backend
            ).to(codebook.dtype)
            return None, grad_codebook, None, None, None, None
        grads = operators.soft_backward(
            *(z, codebook, temperature),
            *(grad_quantized, grad_log_partition, grad_entropy, None),
            *needs,
            ctx.backend,
        )
        return *_only_needed(grads, needs), None, None, None


class CodeUsage(torch.autograd.Function):
    """(z (H, N, D), codebook (H, K, D), temperature ()) → mean probability of each code (H, K)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, codebook: Tensor, temperature: Tensor, backend: str) -> Tensor:
        ones = z.new_ones((*z.shape[:2], 1))
        sums = operators.probability_sums(z, codebook, temperature, ones, backend)
        ctx.save_for_backward(z, codebook, temperature)
        ctx.backend = backend
        return sums[..., 0] / z.shape[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_usage: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of z, codebook and temperature; None for what nobody asked for."""
        inputs, needs = ctx.saved_tensors, ctx.needs_input_grad[:3]
        grads = operators.soft_backward(*inputs, None, None, None, grad_usage, *needs, ctx.backend)
        return *_only_needed(grads, needs), None


def _only_needed(grads, needs):
    """What nobody asked for comes back from the operator empty; autograd wants None."""
    return tuple(grad if needed else None for grad, needed in zip(grads, needs, strict=True))
