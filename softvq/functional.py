"""The public operators: validation, layout and the choice of a backend around `softvq.kernels`."""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from softvq.checks import (
    check_choice,
    check_counts,
    check_dtype,
    check_floating,
    check_range,
    check_temperatures,
    may_read,
)
from softvq.kernels import autograd, operators, reference, support
from softvq.kernels.dtypes import accumulation_dtype
from softvq.kernels.products import without_autocast

Estimator = Literal["soft", "straight_through"]
Backend = Literal["auto", "triton", "streaming", "reference"]
Precision = Literal["highest", "high", "medium"]


class SoftQuantized(NamedTuple):
    """What `soft_quantize` returns; (...) are the leading dimensions of z, heads included."""

    quantized: Tensor  #     (..., D), dtype of z
    indices: Tensor  #       (...), int64, the nearest code
    log_partition: Tensor  # (...), float32 or float64: log Σ_k exp(−‖z−c_k‖²/T)
    entropy: Tensor  #       (...), float32 or float64: nats


def soft_quantize(
    z: Tensor,
    codebook: Tensor,
    temperature: float | Tensor,
    *,
    estimator: Estimator = "soft",
    detach_probabilities: bool = False,
    detach_log_partition: bool = False,
    backend: Backend = "auto",
    precision: Precision | None = None,
) -> SoftQuantized:
    """Quantise latents softly: q = softmax(−‖z−c‖²/T) · C, without an N×K matrix.

    Args:
        z: (..., D), float16, bfloat16, float32 or float64. With H codebooks: (..., H, D).
        codebook: (K, D), or (H, K, D) for H independent codebooks; any of the same dtypes.
        temperature: T, the divisor of the squared distance **summed** over D, from 1e-20 to 1e20. A
            number, or a 0-d tensor (differentiable; on a GPU it is used without a host
            synchronisation). A compiled graph does not recompile when it changes, but for once
            where it is a number.
        estimator: "soft", or "straight_through": the value of the nearest code with the gradient
            of the soft one.
        detach_probabilities: treat the probabilities as constants: only the codebook receives a
            gradient, Pᵀ·dq, and log_partition and entropy receive none (the original Soft VQ-VAE).
        detach_log_partition: let log_partition be that of constant latents: its gradient reaches
            codebook and temperature, not z. One pass then trains the codes on the latents, by their
            free energy, and the latents through quantized.
        backend: "triton" (fused kernels for CUDA from compute capability 8.0 on, for B200 and its
            like from triton 3.8 on; no float64; D > 256 streams), "streaming" (plain PyTorch, any
            device, no N×K matrix), "reference" (N×K matrices, for checking), or "auto": "triton"
            where it can be, else "streaming". All differentiate z, codebook and temperature by
            hand-written formulas, once. The fused kernels have been checked on an H200;
            `python -m pytest -m gpu` checks your GPU.
        precision: how the fused kernels may multiply float32 latents: "highest" is as accurate as
            float32 products, "high" only in the scores (the rest has bfloat16 operands), "medium"
            has bfloat16 operands throughout; None follows `torch.get_float32_matmul_precision()`.
            "streaming" has scores nearly as good as float32 products in any case, and multiplies
            the rest as torch does at this precision, by default at "high" for 16-bit latents;
            "reference" is always float32.

    Raises:
        TypeError: a tensor that is not floating point, a temperature that is no number.
        ValueError: a shape, a temperature or a name that is not allowed, or tensors that
            backend="triton" cannot take.

    The derivation stands in kernels/README.md.
    """
    check_choice("estimator", estimator, get_args(Estimator))
    z_heads, codebook_heads, temperature, backend = _prepare(
        z, codebook, temperature, backend, precision
    )
    outputs = autograd.SoftQuantize.apply(
        z_heads,
        codebook_heads,
        temperature,
        estimator == "straight_through",
        detach_probabilities,
        detach_log_partition,
        precision,
        backend,
    )
    return SoftQuantized(*(_as_rows(output, z, codebook) for output in outputs))


def code_usage(
    z: Tensor,
    codebook: Tensor,
    temperature: float | Tensor,
    *,
    backend: Backend = "auto",
    precision: Precision | None = None,
) -> Tensor:
    """Mean assignment probability of each code over all rows of z, (K,) or (H, K); differentiable.

    Arguments and errors as in `soft_quantize`; a batch without rows has no mean and gives NaN.
    """
    return _usage(z, codebook, temperature, False, backend, precision)[0]


def usage_and_entropy(
    z: Tensor,
    codebook: Tensor,
    temperature: float | Tensor,
    *,
    backend: Backend = "auto",
    precision: Precision | None = None,
) -> tuple[Tensor, Tensor]:
    """`code_usage`, and the entropy (...) of each row's assignment as `soft_quantize` has it.

    What `losses.entropy_regulariser` takes, with one backward pass for both.
    """
    usage, entropy = _usage(z, codebook, temperature, True, backend, precision)
    return usage, _as_rows(entropy, z, codebook)


def assignment_probabilities(z: Tensor, codebook: Tensor, temperature: float | Tensor) -> Tensor:
    """softmax(−‖z−c‖²/T), (..., K). Differentiable.

    The only call that holds an N×K matrix whatever the backend. Arguments and errors as in
    `soft_quantize`.
    """
    z_heads, codebook_heads, temperature, _ = _prepare(z, codebook, temperature, "reference", None)
    with without_autocast(z.device.type):
        p = reference.scores(z_heads, codebook_heads, temperature).softmax(-1)
    return _as_rows(p, z, codebook)


def nearest_codes(
    z: Tensor,
    codebook: Tensor,
    *,
    backend: Backend = "auto",
    precision: Precision | None = None,
) -> tuple[Tensor, Tensor]:
    """Index (...) int64 of each row's nearest code; its squared distance (...), float32 at least.

    z (..., D) and codebook (K, D), or (..., H, D) and (H, K, D). The lowest index wins a tie;
    without Triton a matrix product may round two equal codes apart and so choose the later one. The
    distance is differentiable in z and codebook. Arguments and errors as in `soft_quantize`, but
    "high" here is as accurate as "highest", and "medium" rounds to float16, in the fused kernels.
    """
    z_heads, codebook_heads, _, of_products = _prepare(z, codebook, 1.0, backend, precision)
    indices = operators.nearest(z_heads.detach(), codebook_heads.detach(), precision, of_products)
    of_sums = _choose_backend(z, backend, support.obstacle(z))
    dtype = accumulation_dtype(z_heads, codebook_heads)
    # Cast before: the gradients of a code's rows are summed in this dtype, and rounded once.
    codes = autograd.CodesAt.apply(codebook_heads.to(dtype), indices, of_sums)
    difference = z_heads.to(dtype) - codes
    squared_distance = difference.square().sum(-1)
    return _as_rows(indices, z, codebook), _as_rows(squared_distance, z, codebook)


def nearest_indices(z: Tensor, codebook: Tensor) -> Tensor:
    """The indices of `nearest_codes` alone: the distances are a good part of its work."""
    z_heads, codebook_heads, _, backend = _prepare(z, codebook, 1.0, "auto", None)
    indices = operators.nearest(z_heads.detach(), codebook_heads.detach(), None, backend)
    return _as_rows(indices, z, codebook)


def code_sums(
    z: Tensor, indices: Tensor, codebook_size: int, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Sum (K, D) and count (K,) of the rows of z assigned to each code, in float32 at least.

    The statistics of a k-means step and of an EMA codebook; the sum is differentiable in z.

    Args:
        z: (..., D), any floating dtype.
        indices: (...) int64 in [0, K). On a GPU nobody checks the range, which would wait for the
            device: outside it the result is undefined.
        codebook_size: K.
        backend: as in `soft_quantize`, but "triton" takes float64 and every D, and "reference" is
            "streaming": plain additions, on a GPU in an order that differs from run to run.

    Raises:
        TypeError: z is not floating point, indices are not int64, K is no whole number.
        ValueError: the shapes or devices differ, D or K is below 1, or, on a CPU, an index outside
            [0, K).
    """
    check_choice("backend", backend, get_args(Backend))
    check_floating(z=z)
    check_dtype(torch.int64, indices=indices)
    check_counts(1, codebook_size=codebook_size)
    if z.dim() == 0 or z.shape[-1] == 0:
        raise ValueError(f"z must be (..., D) with D of at least 1, got {tuple(z.shape)}")
    if z.device != indices.device:
        raise ValueError(f"z is on {z.device} and indices on {indices.device}; use one device")
    if indices.shape != z.shape[:-1]:
        raise ValueError(
            f"indices must have the shape of z without its last dimension, {tuple(z.shape[:-1])}; "
            f"got {tuple(indices.shape)}"
        )
    check_range(0, codebook_size, indices=indices)
    rows, indices = z.reshape(-1, z.shape[-1]), indices.reshape(-1)
    backend = _choose_backend(z, backend, support.obstacle(z))
    return operators.code_sums(rows, indices, codebook_size, backend)


def _usage(
    z: Tensor,
    codebook: Tensor,
    temperature: float | Tensor,
    with_entropy: bool,
    backend: str,
    precision: str | None,
) -> tuple[Tensor, Tensor | None]:
    """Usage (K,) or (H, K), and the entropy (H, N) or None."""
    z_heads, codebook_heads, temperature, backend = _prepare(
        z, codebook, temperature, backend, precision
    )
    usage, entropy = autograd.CodeUsage.apply(
        z_heads, codebook_heads, temperature, with_entropy, precision, backend
    )
    return usage if codebook.dim() == 3 else usage.squeeze(0), entropy


def _prepare(
    z: Tensor,
    codebook: Tensor,
    temperature: float | Tensor,
    backend: str,
    precision: str | None,
) -> tuple[Tensor, Tensor, Tensor, str]:
    """Check everything, and bring z to (H, N, D), the codebook to (H, K, D), T to a 0-d tensor."""
    check_choice("backend", backend, get_args(Backend))
    if precision is not None:
        check_choice("precision", precision, get_args(Precision))
    check_floating(z=z, codebook=codebook)
    if codebook.dim() not in (2, 3):
        raise ValueError(f"codebook must be (K, D) or (H, K, D), got {tuple(codebook.shape)}")
    if 0 in codebook.shape:
        raise ValueError(f"codebook is empty: {tuple(codebook.shape)}")
    if z.dim() < codebook.dim() - 1 or z.shape[-1] != codebook.shape[-1]:
        raise ValueError(
            f"z must end in the codebook's dimension D = {codebook.shape[-1]}, "
            f"got z {tuple(z.shape)} and codebook {tuple(codebook.shape)}"
        )
    if z.device != codebook.device:
        raise ValueError(f"z is on {z.device} and codebook on {codebook.device}; use one device")
    temperature = temperature_tensor(temperature, z.device, accumulation_dtype(z, codebook))
    backend = _product_backend(z, codebook, backend)

    if codebook.dim() == 2:
        return z.reshape(1, -1, z.shape[-1]), codebook[None], temperature, backend
    if z.shape[-2] != codebook.shape[0]:
        raise ValueError(
            f"z must be (..., H, D) with the codebook's H = {codebook.shape[0]}, "
            f"got {tuple(z.shape)}"
        )
    return z.reshape(-1, *z.shape[-2:]).transpose(0, 1), codebook, temperature, backend


def _product_backend(z: Tensor, codebook: Tensor, backend: str) -> str:
    """`_choose_backend` for the operators that multiply latents and codes."""
    backend = _choose_backend(z, backend, support.soft_obstacle(z, codebook))
    if backend == "triton" and support.too_large(z, codebook):
        return "streaming"
    return backend


def _choose_backend(z: Tensor, backend: str, obstacle: str | None) -> str:
    """What "auto" stands for; `obstacle` says why the fused kernels cannot be used, if so."""
    if backend == "triton" and obstacle:
        raise ValueError(f"backend 'triton' {obstacle}")
    if backend == "auto":
        return "triton" if z.is_cuda and not obstacle else "streaming"
    return backend


def temperature_tensor(
    temperature: float | Tensor, device: torch.device, dtype: torch.dtype, name: str = "temperature"
) -> Tensor:
    """T () on the device; a number becomes of this dtype, a tensor keeps its own.

    Raises TypeError or ValueError; a tensor on a GPU is not read.
    """
    if isinstance(temperature, Tensor):
        if temperature.dim() != 0 or not temperature.is_floating_point():
            raise ValueError(
                f"{name} must be a number or a 0-d floating-point tensor, got "
                f"shape {tuple(temperature.shape)}, {temperature.dtype}"
            )
        if may_read(temperature):
            check_temperatures(**{name: temperature.item()})
        return temperature.to(device)
    check_temperatures(**{name: temperature})
    if torch.compiler.is_compiling():  # each number that is filled in would be another graph
        return torch.ones((), dtype=dtype, device=device) * temperature
    return torch.full((), temperature, dtype=dtype, device=device)


def _as_rows(output: Tensor, z: Tensor, codebook: Tensor) -> Tensor:
    """Undo the head-first layout: (H, N, ...) back to the leading dimensions of z.

    Views, whose backward copies nothing; an index would allocate its gradient once more.
    """
    output = output if codebook.dim() == 2 else output.transpose(0, 1)
    return output.reshape(z.shape[:-1] + output.shape[2:])
