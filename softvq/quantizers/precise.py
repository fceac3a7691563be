"""Modules that keep some of their state precise when a model is converted to half precision."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn


def precise_dtype() -> torch.dtype:
    """Of what is kept precise when it is created: the default dtype, float32 at least."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


class KeepsFloat32(nn.Module):
    """A module whose tensors named in `in_float32` follow it to devices and to float64 only.

    They are created in `precise_dtype()`.
    Running averages move by steps of a percent and less, which half precision rounds away; a
    temperature would be another one, or infinite. `converted_to` is the dtype of all others.
    """

    in_float32: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.converted_to = torch.get_default_dtype()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {id(getattr(self, name)) for name in self.in_float32}

        def convert(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            if id(tensor) in kept and torch.finfo(converted.dtype).bits < 32:
                return tensor.to(converted.device)
            return converted

        like = torch.empty((), dtype=self.converted_to, device="cpu")
        self.converted_to = fn(like).dtype
        return super()._apply(convert, recurse)
