"""Ways to compute soft quantisation, each forward and backward in z and the codebook."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import softvq

SDPA_BATCH = 16


class Candidate(NamedTuple):
    run: Callable[[Tensor, Tensor, float], Tensor]  # z (N, D), codebook (K, D), T → q (N, D)
    outputs: str


def eager(z: Tensor, codebook: Tensor, temperature: float) -> Tensor:
    """The N×K matrix in plain PyTorch, with everything `soft_quantize` returns."""
    distance = z.square().sum(1, keepdim=True) - 2 * z @ codebook.T + codebook.square().sum(1)
    scores = -distance / temperature
    log_p = scores.log_softmax(1)
    p = log_p.exp()
    scores.detach().argmax(1)
    scores.detach().logsumexp(1)
    -(p.detach() * log_p.detach()).sum(1)
    return p @ codebook


def eager_quantized_only(z: Tensor, codebook: Tensor, temperature: float) -> Tensor:
    """The N×K matrix in plain PyTorch, q and indices only."""
    scores = torch.addmm(codebook.square().sum(1) / -2, z, codebook.T) * (2 / temperature)
    p = scores.softmax(1)
    scores.detach().argmax(1)
    return p @ codebook


def attention(z: Tensor, codebook: Tensor, temperature: float) -> Tensor:
    """PyTorch's own flash attention on vectors with a bias column, rows split over a batch axis.

    Its backward works in parallel over the batch; it returns neither index nor entropy.
    """
    dim = codebook.shape[1]
    queries = torch.nn.functional.pad(z * (2 / temperature), (0, 1), value=1.0)
    bias = codebook.square().sum(1, keepdim=True) / -temperature
    keys = torch.cat([codebook, bias], 1)
    values = torch.nn.functional.pad(codebook, (0, 1))
    shape = (SDPA_BATCH, 1, -1, dim + 1)
    out = scaled_dot_product_attention(
        queries.view(shape), keys.expand(shape), values.expand(shape), scale=1.0
    )
    return out.reshape(len(z), dim + 1)[:, :dim]


def streaming(z: Tensor, codebook: Tensor, temperature: float) -> Tensor:
    """softvq's CPU backend."""
    return softvq.soft_quantize(z, codebook, temperature, backend="streaming").quantized


ALL_OUTPUTS = "q, indices, log-partition, entropy"
CANDIDATES = {
    "eager": Candidate(eager, ALL_OUTPUTS),
    "eager, q only": Candidate(eager_quantized_only, "q, indices"),
    "attention": Candidate(attention, "q"),
    "softvq": Candidate(streaming, ALL_OUTPUTS),
}
