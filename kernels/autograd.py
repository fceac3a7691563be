"""Differentiable operators: the registered forward joined to the hand-written backward."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from softvq.kernels import operators


class _Last(torch.autograd.Function):
    """A gradient as it is; its own gradient, also by the tensors it depends on, is an error."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *depends_on: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            "softvq's soft operators can be differentiated once, not twice; where a second "
            "derivative is needed, build the loss from softvq.assignment_probabilities"
        )


def _differentiable_once(backward: Callable[..., tuple[Tensor | None, ...]]):
    """For a backward(ctx, saved, *incoming): whoever differentiates what it returns gets an error.

    PyTorch's `once_differentiable` looks at the incoming gradients alone; those of a sum do not
    depend on anything, and the second derivative would be zero without a word.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once, for torch.utils.checkpoint gives them once
        with torch.no_grad():
            grads = backward(ctx, saved, *incoming)
        if torch.is_grad_enabled():
            depends_on = *incoming, *saved
            grads = tuple(None if x is None else _Last.apply(x, *depends_on) for x in grads)
        return grads

    return once


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
        detach_log_partition: bool,
        precision: str | None,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        quantized, indices, log_partition, entropy, row_state = operators.soft_forward(
            z, codebook, temperature, precision, backend
        )
        saved = (quantized, indices, row_state) if backend == "triton" else (None,) * 3
        if straight_through:
            dim = codebook.shape[2]
            rows = indices[..., None].expand(-1, -1, dim)
            # The cast first: torch 2.11 compiles a cast of the output to one without gradient.
            quantized = codebook.to(z.dtype).gather(1, rows)
        ctx.save_for_backward(z, codebook, temperature, *saved)
        ctx.detach_probabilities = detach_probabilities
        ctx.detach_log_partition = detach_log_partition
        ctx.precision, ctx.backend = precision, backend
        ctx.set_materialize_grads(False)
        if detach_probabilities:
            ctx.mark_non_differentiable(indices, log_partition, entropy)
        else:
            ctx.mark_non_differentiable(indices)
        return quantized, indices, log_partition, entropy

    @staticmethod
    @_differentiable_once
    def backward(
        ctx: Any,
        saved: tuple[Tensor | None, ...],
        grad_quantized: Tensor | None,
        _: None,
        grad_log_partition: Tensor | None,
        grad_entropy: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of z, codebook and temperature; None for what nobody asked for."""
        *inputs, quantized, indices, row_state = saved
        needs, how = ctx.needs_input_grad[:3], (ctx.precision, ctx.backend)
        if not ctx.detach_probabilities:
            grads = operators.soft_backward(
                *inputs,
                *(grad_quantized, grad_log_partition, grad_entropy, None),
                *(*needs, quantized, indices, row_state, ctx.detach_log_partition, *how),
            )
            return *_only_needed(grads, needs), None, None, None, None, None
        grad_codebook = None
        if needs[1] and grad_quantized is not None:
            sums = operators.probability_sums(*inputs, grad_quantized, row_state, *how)
            grad_codebook = sums.to(inputs[1].dtype)
        return None, grad_codebook, None, None, None, None, None, None


class CodeUsage(torch.autograd.Function):
    """(z (H, N, D), codebook (H, K, D), temperature ()) → mean probability of each code (H, K), and
    with_entropy the entropy (H, N) of each assignment, else None. Both have one backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        codebook: Tensor,
        temperature: Tensor,
        with_entropy: bool,
        precision: str | None,
        backend: str,
    ) -> tuple[Tensor, Tensor | None]:
        inputs, how = (z, codebook, temperature), (precision, backend)
        entropy, saved = None, (None,) * 3
        if with_entropy:
            quantized, indices, _, entropy, row_state = operators.soft_forward(*inputs, *how)
            if backend == "triton":
                saved = quantized, indices, row_state
        sums = operators.probability_sums(*inputs, None, saved[2], *how)
        ctx.save_for_backward(*inputs, *saved)
        ctx.precision, ctx.backend = how
        ctx.set_materialize_grads(False)
        return sums[..., 0] / z.shape[1], entropy

    @staticmethod
    @_differentiable_once
    def backward(
        ctx: Any,
        saved: tuple[Tensor | None, ...],
        grad_usage: Tensor | None,
        grad_entropy: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of z, codebook and temperature; None for what nobody asked for."""
        *inputs, quantized, indices, row_state = saved
        needs = ctx.needs_input_grad[:3]
        grads = operators.soft_backward(
            *(*inputs, None, None, grad_entropy, grad_usage, *needs),
            *(quantized, indices, row_state, False, ctx.precision, ctx.backend),
        )
        return *_only_needed(grads, needs), None, None, None


class CodesAt(torch.autograd.Function):
    """(codebook (H, K, D), indices (H, N)) → codes (H, N, D); differentiable as often as you like.

    `gather` adds its gradient by atomics on a GPU, in another order each time; code_sums does not.
    """

    @staticmethod
    def forward(ctx: Any, codebook: Tensor, indices: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.codebook_shape, ctx.dtype, ctx.backend = codebook.shape, codebook.dtype, backend
        return codebook.gather(1, indices[..., None].expand(-1, -1, codebook.shape[2]))

    @staticmethod
    def backward(ctx: Any, grad_codes: Tensor) -> tuple[Tensor, None, None]:
        """Each code receives the sum of what its rows receive."""
        (indices,) = ctx.saved_tensors
        heads, codes, dim = ctx.codebook_shape
        # Heads one after the other are one larger codebook.
        indices = indices + codes * torch.arange(heads, device=indices.device)[:, None]
        rows, indices = grad_codes.reshape(-1, dim), indices.flatten()
        sums, _ = operators.code_sums(rows, indices, heads * codes, ctx.backend)
        return sums.view(heads, codes, dim).to(ctx.dtype), None, None


def _only_needed(grads, needs):
    """What nobody asked for comes back from the operator empty; autograd wants None."""
    return tuple(grad if needed else None for grad, needed in zip(grads, needs, strict=True))
