"""The options that all quantizers take, and what they return at least."""

from typing import Protocol, TypedDict

from torch import Tensor


class QuantizerOptions(TypedDict, total=False):
    """Keywords that every quantizer takes; `Quantizer` explains them."""

    separate_codebook_per_head: bool
    channel_last: bool
    accept_image_fmap: bool
    return_zeros_for_masked_padding: bool
    use_cosine_sim: bool
    kmeans_init: bool
    kmeans_iters: int
    sync_codebook: bool | None
    entropy_weight: float
    entropy_temperature: float


class Quantized(Protocol):
    """What `quantize` returns, at least."""

    @property
    def quantized(self) -> Tensor:
        """Values (..., D)."""

    @property
    def indices(self) -> Tensor:
        """Codes (...) int64."""
