"""The one rule for the precision of intermediate results."""

import torch
from torch import Tensor


def accumulation_dtype(z: Tensor, codebook: Tensor) -> torch.dtype:
    """float64 when either input is float64, otherwise float32; never less."""
    return torch.promote_types(torch.promote_types(z.dtype, codebook.dtype), torch.float32)
