"""The losses of the family, each a scalar from tensors; weights are the caller's."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from softvq.checks import check_choice

Difference = Literal["squared", "absolute"]


def in_float32(x: Tensor) -> Tensor:
    """x in float32 at least: sums of many 16-bit numbers would round."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def reconstruction_error(output: Tensor, images: Tensor, kind: Difference = "squared") -> Tensor:
    """Mean over all elements of |x̂ − x|² ("squared") or |x̂ − x| ("absolute"), ().

    output and images (...), of one shape. Raises ValueError for another kind.
    """
    check_choice("kind", kind, get_args(Difference))
    difference = in_float32(output) - images
    return (difference.square() if kind == "squared" else difference.abs()).mean()


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(μ, σ²) ‖ N(0, 1)) = ½(−logvar + μ² + exp(logvar) − 1), (), of (B, ...) each.

    Summed over all latent dimensions of an image, averaged over the batch (first dimension).
    Kingma and Welling 2014, appendix B.
    """
    mean, logvar = in_float32(mean), in_float32(logvar)
    return 0.5 * (mean.square() + logvar.exp() - logvar - 1).sum() / len(mean)


def quantizing_error(z: Tensor, quantized: Tensor) -> Tensor:
    """Mean over all elements of (z − q)², (), of z and q (...).

    Squared: a root's derivative is infinite at zero.
    """
    return (in_float32(z) - quantized).square().mean()


def free_energy(log_partition: Tensor, temperature: Tensor, dim: int) -> Tensor:
    """−T · log Σ_k exp(−‖z−c_k‖²/T), averaged over rows and divided by the dimension D, ().

    log_partition (...) of `softvq.soft_quantize`, at the temperature () that it had there.
    Its codebook gradient is the soft k-means step; as T falls it becomes the squared distance to
    the nearest code per element. Rose 1998, "Deterministic annealing for clustering".
    """
    return -(temperature * log_partition).mean() / dim


def mixture_negative_log_likelihood(
    log_partition: Tensor, temperature: Tensor, dim: int, codebook_size: int
) -> Tensor:
    """−log p(z)/D of the mixture of K equal Gaussians of variance T/2 at the codes, ().

    log_partition (...) and temperature () as for `free_energy`.
    −log p(z) = −log_partition + ½D log(πT) + log K. The log T term keeps a learned T finite.
    """
    normaliser = 0.5 * dim * torch.log(math.pi * temperature) + math.log(codebook_size)
    return (normaliser - log_partition.mean()) / dim


def commitment_loss(z: Tensor, codes: Tensor) -> Tensor:
    """Mean over all elements of (z − sg[e])², (), of z and e (...); no gradient for the codes.

    The third term of van den Oord et al. 2017, eq. 3, without its weight β.
    """
    return quantizing_error(z, codes.detach())


def kl_to_uniform(entropy: Tensor, codebook_size: int) -> Tensor:
    """KL(p ‖ uniform) = log K − H(p), averaged over the entropies (...) of the assignments.

    The rate term of a discrete VAE with a uniform prior: Jang et al. 2017, "Categorical
    reparameterization with Gumbel-softmax"; Ramesh et al. 2021 (DALL·E), section 2.1.
    """
    return math.log(codebook_size) - entropy.mean()


def entropy_regulariser(entropy: Tensor, usage: Tensor) -> Tensor:
    """Mean entropy of the assignments minus the entropy of their mean; 0 at most.

    Low when every latent is sure of its code and all codes are used alike; it is minus the mutual
    information of latent and code. Yu et al. 2024 (MAGVIT-v2), eq. 5; Shi et al. 2024 (IBQ).

    Args:
        entropy: (...), of each latent's assignment.
        usage: (K,) or (H, K), the mean assignment; both as from `softvq.usage_and_entropy`.
    """
    # A floor inside the logarithm: the derivative of p·log p at an unused code is infinite.
    smallest = torch.finfo(usage.dtype).tiny
    usage_entropy = -(usage * usage.clamp(min=smallest).log()).sum(-1)
    return entropy.mean() - usage_entropy.mean()
