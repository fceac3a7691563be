"""The Triton backend: the fused kernels behind the functions of `streaming`.

z (H, N, D), codebook (H, K, D), temperature (); D up to 256; float32, bfloat16, float16. Every
launch goes to the inputs' own device, reads the temperature there, and never waits for it.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from softvq.kernels import code_sweep, forward, row_gradients
from softvq.kernels.arithmetic import arithmetic
from softvq.kernels.nearest import nearest as nearest
from softvq.kernels.primitives import LARGEST
from softvq.kernels.prologue import PreparedCodebook, prepare


def soft_forward(
    z: Tensor, codebook: Tensor, temperature: Tensor, precision: str = "highest"
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Quantized (H, N, D), indices, log-partition and entropy (H, N); and for the backward each
    row's largest score and 1/Σ weights (2, H, N).
    """
    how = arithmetic(z.dtype, codebook.dtype, precision)
    with torch.cuda.device_of(z):
        prepared = prepare(codebook, how, temperature)
        return forward.launch(
            _unit_stride(z), prepared, codebook.shape[1], temperature, how, quantize=True
        )


def soft_backward(
    z: Tensor,
    codebook: Tensor,
    temperature: Tensor,
    grad_quantized: Tensor | None,
    grad_log_partition: Tensor | None,
    grad_entropy: Tensor | None,
    grad_usage: Tensor | None,
    needs_z: bool,
    needs_codebook: bool,
    needs_temperature: bool,
    quantized: Tensor | None = None,
    indices: Tensor | None = None,
    row_state: Tensor | None = None,
    detach_log_partition: bool = False,
    precision: str = "highest",
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of z, codebook and temperature for the gradients given.

    `quantized`, `indices` and `row_state` are the forward's; without them it runs again. A missing
    incoming gradient is zero; an outgoing one that is not needed is None. With detach_log_partition
    the log-partition is that of constant latents.
    """
    how = arithmetic(z.dtype, codebook.dtype, precision)
    codes = codebook.shape[1]
    with torch.cuda.device_of(z):
        z, grad_quantized = _unit_stride(z), _unit_stride(grad_quantized)
        grad_log_partition = _float32_rows(grad_log_partition)
        grad_entropy = _float32_rows(grad_entropy)
        prepared = prepare(codebook, how, temperature)
        if row_state is None:
            saved = forward.launch(z, prepared, codes, temperature, how, quantize=True)
            quantized, indices, row_state = saved.quantized, saved.indices, saved.row_state
        code_gradient = _code_gradient(grad_usage, z.shape[1], prepared)
        grads = row_gradients.launch(
            *(z, prepared, temperature, quantized.contiguous(), indices, row_state),
            *(grad_quantized, grad_log_partition, grad_entropy, code_gradient),
            *(how, needs_z, needs_temperature, detach_log_partition),
        )
        grad_codebook = None
        if needs_codebook:
            grad_codebook = code_sweep.launch(
                *(z, prepared, codes, temperature, row_state, grad_quantized, how, grads.largest),
                *(grad_entropy, code_gradient, grads.row_shift),
            ).to(codebook.dtype)
    return grads.grad_z, grad_codebook, grads.grad_temperature


def probability_sums(
    z: Tensor,
    codebook: Tensor,
    temperature: Tensor,
    values: Tensor | None,
    row_state: Tensor | None = None,
    precision: str = "highest",
) -> Tensor:
    """Σ_n p_nk values_n, (H, K, D) for values (H, N, D); Σ_n p_nk, (H, K, 1), for None."""
    how = arithmetic(z.dtype, codebook.dtype, precision)
    codes = codebook.shape[1]
    with torch.cuda.device_of(z):
        z, values = _unit_stride(z), _unit_stride(values)
        prepared = prepare(codebook, how, temperature)
        if row_state is None:
            row_state = forward.launch(
                z, prepared, codes, temperature, how, quantize=False
            ).row_state
        largest = None
        if values is not None and prepared.scale is not None:
            largest = values.abs().amax((1, 2)).float() / LARGEST.value
        return code_sweep.launch(z, prepared, codes, temperature, row_state, values, how, largest)


def _unit_stride(x: Tensor | None) -> Tensor | None:
    """Kernels take any stride between rows, but a row must be contiguous."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _float32_rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _code_gradient(grad_usage: Tensor | None, rows: int, prepared: PreparedCodebook):
    """υ/N, padded like the codebook."""
    if grad_usage is None:
        return None
    padded_codes = prepared.high.shape[1]
    return pad(grad_usage.float() / rows, (0, padded_codes - grad_usage.shape[1]))
