"""Modules that keep some of their state precise when a model is converted to half precision."""

from collections.abc import Callable
from itertools import chain
from typing import Self

import torch
from torch import Tensor, nn


def precise_dtype() -> torch.dtype:
    """Of what is kept precise when it is created: the default dtype, float32 at least."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


class KeepsFloat32(nn.Module):
    """A module whose tensors named in `in_float32` follow it to devices and to float64 only.

    Running averages move by steps of a percent and less, which half precision rounds away; a
    temperature would be another one, or infinite. They are created in `precise_dtype()`.
    """

    in_float32: tuple[str, ...] = ()

    @property
    def converted_to(self) -> torch.dtype:
        """The dtype of all other floating-point tensors, the default one where there are none."""
        tensors = chain(self.named_parameters(), self.named_buffers())
        others = (x.dtype for name, x in tensors if name not in self.in_float32)
        return next(
            (dtype for dtype in others if dtype.is_floating_point), torch.get_default_dtype()
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        tensors = [getattr(self, name) for name in self.in_float32]
        kept = {id(x) for x in (*tensors, *(tensor.grad for tensor in tensors))}

        def convert(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            if id(tensor) in kept and torch.finfo(converted.dtype).bits < 32:
                return tensor.to(converted.device)
            return converted

        return super()._apply(convert, recurse)
