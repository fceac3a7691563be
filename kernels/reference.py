"""The specification: README.md of this folder, written as plain PyTorch with explicit derivatives.

Holds N×K matrices, so it is for reading, checking and small problems. Every function takes latents
``z`` (H, N, D), a ``codebook`` (H, K, D) and a ``temperature`` (); H counts independent codebooks.
Half-precision inputs are computed in float32, float64 stays float64.
"""

import torch
from torch import Tensor

from softvq.kernels.centre import centre_of
from softvq.kernels.dtypes import accumulation_dtype
from softvq.kernels.products import float32_product


def centre(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Both less a point among the codes, in the accumulation dtype; no distance changes."""
    dtype = accumulation_dtype(z, codebook)
    z, codebook = z.to(dtype), codebook.to(dtype)
    origin = centre_of(codebook)
    return z - origin, codebook - origin


def scores(z: Tensor, codebook: Tensor, temperature: Tensor) -> Tensor:
    """s = −‖z − c‖²/T, (H, N, K). Differentiable by autograd."""
    z, codebook = centre(z, codebook)
    squared_distance = (
        z.square().sum(-1)[..., None]
        - float32_product(2 * z, codebook.mT)
        + codebook.square().sum(-1)[..., None, :]
    )
    return -squared_distance / temperature.to(z.dtype)


def soft_forward(
    z: Tensor, codebook: Tensor, temperature: Tensor, precision: str = "highest"
) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
    """Quantized (H, N, D), indices (H, N), log-partition (H, N), entropy (H, N), nothing to save.

    `precision` is for other backends.
    """
    s = scores(z, codebook, temperature)
    log_partition = s.logsumexp(-1)
    log_p = s.log_softmax(-1)  # s − lse cancels, where both are large
    p = log_p.exp()
    quantized = p @ codebook.to(p.dtype)
    entropy = -(p * log_p).sum(-1)
    return quantized.to(z.dtype), s.argmax(-1), log_partition, entropy, None


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
    """Gradients of z (H, N, D), codebook (H, K, D) and temperature () for the gradients given.

    A missing incoming gradient is zero; an outgoing one that is not needed is None. `quantized`,
    `indices` and `row_state`, the forward's, are for backends that reuse them. With
    detach_log_partition the log-partition is that of constant latents.
    """
    s = scores(z, codebook, temperature)
    centred_z, centred_codebook = centre(z, codebook)
    two_over_t = 2 / temperature.to(s.dtype)

    log_partition = s.logsumexp(-1)
    log_p = s.log_softmax(-1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1)

    g = torch.zeros_like(centred_z) if grad_quantized is None else grad_quantized.to(s.dtype)
    lam = torch.zeros_like(entropy) if grad_log_partition is None else grad_log_partition
    a = g @ centred_codebook.mT
    if grad_usage is not None:
        a = a + grad_usage[:, None, :] / z.shape[1]
    if grad_entropy is not None:
        a = a - grad_entropy[..., None] * log_p
    delta = (p * a).sum(-1, keepdim=True)
    softmax_part = p * (a - delta)
    e = softmax_part + lam[..., None] * p

    grad_z = grad_codebook = grad_temperature = None
    if needs_z:
        grad_z = softmax_part @ centred_codebook
        if not detach_log_partition:
            grad_z += lam[..., None] * (p @ centred_codebook - centred_z)
        grad_z = (two_over_t * grad_z).to(z.dtype)
    if needs_codebook:
        pull = e.mT @ centred_z - e.sum(1)[..., None] * centred_codebook
        grad_codebook = (p.mT @ g + two_over_t * pull).to(codebook.dtype)
    if needs_temperature:
        row = (softmax_part * log_p).sum(-1) + lam * (log_partition - entropy)
        grad_temperature = -row.sum() / temperature.to(s.dtype)
    return grad_z, grad_codebook, grad_temperature


def probability_sums(
    z: Tensor,
    codebook: Tensor,
    temperature: Tensor,
    values: Tensor | None,
    row_state: Tensor | None = None,
    precision: str = "highest",
) -> Tensor:
    """Σ_n p_nk values_n, (H, K, V) for values (H, N, V); Σ_n p_nk, (H, K, 1), for None."""
    p = scores(z, codebook, temperature).softmax(-1)
    return p.sum(1)[..., None] if values is None else p.mT @ values.to(p.dtype)


def nearest(z: Tensor, codebook: Tensor, precision: str = "highest") -> Tensor:
    """Index of the nearest code, (H, N) int64; the lowest index wins a tie of scores as rounded."""
    return scores(z, codebook, z.new_ones(())).argmax(-1)
