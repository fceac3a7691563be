"""How plain PyTorch multiplies float32 matrices: torch's own setting, and ours for the time being.

A GPU may round the operands to tf32, and some CPUs to bfloat16, as one setting of the whole process
says. A call of ours has a precision of its own, whatever the rest of a program may do.
"""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

# For one thread at a time, also one that needs no change: they share the setting.
_lock = threading.RLock()


def torch_precision(device: torch.device) -> str:
    """ "highest", "high" or "medium": what torch is set to do on this device."""
    with _lock:
        try:
            return torch.get_float32_matmul_precision()
        except RuntimeError:  # set by torch.backends' newer names, which it refuses to translate
            operands = _backend(device).matmul.fp32_precision
            return {"tf32": "high", "bf16": "medium"}.get(operands, "highest")


@contextmanager
def float32_products(precision: str, device: torch.device) -> Iterator[None]:
    """Inside, torch multiplies float32 matrices on this device with this precision, as it names it.

    A CPU rounds nothing at "high": none has tf32, and torch would take a slower way to the same.
    """
    backend = _backend(device)
    reduced = {"medium": "bf16"}
    if device.type == "cuda":
        reduced = {"high": "tf32", "medium": "tf32"}
    allowed = (reduced[precision],) if precision in reduced else ("ieee", "none")
    with _lock:
        before = backend.matmul.fp32_precision
        if before in allowed:
            yield
            return
        backend.matmul.fp32_precision = allowed[0]
        try:
            yield
        finally:
            # "none" follows the backend, and what is read does not tell.
            backend.matmul.fp32_precision = "none"
            if backend.matmul.fp32_precision != before:
                backend.matmul.fp32_precision = before


def tf32_parts(x: Tensor, count: int) -> list[Tensor]:
    """`count` float32 tensors of tf32's 11 bits each, the largest first, whose sum x nearly is.

    A matrix unit that takes float32 for tf32 multiplies them as they are. What is not finite is in
    the first, and the others are then 0.
    """
    parts = []
    for _ in range(count):
        # To the nearest. A GPU's NaN has all bits set: it would become a zero.
        rounded = ((x.view(torch.int32) + 2**12) & -(2**13)).view(torch.float32)
        rest = x - rounded
        splits = rest.isfinite()
        parts.append(torch.where(splits, rounded, x))
        x = torch.where(splits, rest, 0.0)
    return parts


def _backend(device: torch.device):
    return torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn


def without_autocast(device_type: str) -> AbstractContextManager[None]:
    """Nothing is lowered inside; nor on "meta", which has no autocast to turn off."""
    # Not torch.amp.is_autocast_available, at which torch 2.11 cannot compile.
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


@torch.library.custom_op("softvq::float32_product", mutates_args=())
def float32_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, (..., n, m) and (..., m, k), at "highest". Differentiable, compiled too."""
    with float32_products("highest", a.device):
        return a @ b


@float32_product.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def _save(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
    a, b = ctx.saved_tensors
    return float32_product(grad, b.mT), float32_product(a.mT, grad)


float32_product.register_autograd(_gradients, setup_context=_save)
