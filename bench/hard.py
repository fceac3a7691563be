"""Hard assignment: the nearest code, and the sums and counts that a step of k-means or EMA needs.

Everything without gradients. What each gives beside the indices differs; the column `outputs` of
the results says it.
"""

import torch
from torch import Tensor

import softvq
from bench.candidates import Candidate, Outputs, Run, Setting

SUMS = "indices, sums, counts"


def hard_candidates(setting: Setting) -> list[Candidate]:
    """Plain PyTorch, the two libraries for it, and ours."""
    return [
        Candidate("cdist", cdist, SUMS),
        Candidate("softvq nearest", nearest, SUMS, "softvq"),
        Candidate(
            "vector-quantize-pytorch",
            vector_quantize,
            "q, indices, EMA codebook",
            "vector-quantize-pytorch",
        ),
        Candidate("flash-kmeans", flash_kmeans, "indices, new centroids", "flash-kmeans"),
    ]


def cdist(setting: Setting) -> Run:
    """The N×K distances in plain PyTorch, and index_add."""

    def run(z: Tensor, codebook: Tensor) -> Outputs:
        indices = torch.cdist(z.float(), codebook.float()).argmin(1)
        torch.zeros_like(codebook, dtype=torch.float32).index_add_(0, indices, z.float())
        torch.bincount(indices, minlength=setting.codes)
        return Outputs(None, indices)

    return run


def nearest(setting: Setting) -> Run:
    """softvq.nearest_codes and softvq.code_sums."""
    backend = "triton" if setting.device.type == "cuda" else "auto"

    def run(z: Tensor, codebook: Tensor) -> Outputs:
        indices, _ = softvq.nearest_codes(z, codebook, backend=backend)
        softvq.code_sums(z, indices, setting.codes)
        return Outputs(None, indices)

    return run


def vector_quantize(setting: Setting) -> Run:
    """A VectorQuantize layer in training, with its default EMA update."""
    from vector_quantize_pytorch import VectorQuantize

    layer = VectorQuantize(dim=setting.dim, codebook_size=setting.codes, decay=0.8)
    layer = layer.to(setting.device).train()

    def run(z: Tensor, codebook: Tensor) -> Outputs:
        layer.codebook = codebook.float()
        quantized, indices, _ = layer(z[None])
        return Outputs(quantized[0], indices[0])

    return run


def flash_kmeans(setting: Setting) -> Run:
    """The two kernels of one k-means iteration, as batch_kmeans_Euclid calls them."""
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton
    from flash_kmeans.centroid_update_triton import triton_centroid_update_sorted_euclid

    def run(z: Tensor, codebook: Tensor) -> Outputs:
        squares = z.float().square().sum(1)
        indices = euclid_assign_triton(z[None], codebook[None], squares[None])
        triton_centroid_update_sorted_euclid(z[None], indices, codebook[None])
        return Outputs(None, indices[0])

    return run
