"""How the products of one call are computed: which operands, in how many parts."""

from typing import Literal, NamedTuple

import torch

# bfloat16 latents as they are, with a codebook that is so too or has two parts; anything else that
# is rounded once; two parts of float32 latents in the scores; two parts in every product.
Operands = Literal["bfloat16", "mixed", "converted", "high", "split"]


class Arithmetic(NamedTuple):
    """How the products of one call are computed.

    Operands are bfloat16, with the range of a float32, or float16, with three more bits but a range
    so short that whatever is multiplied must first be scaled by a power of two.
    """

    operand: torch.dtype
    split_latents: bool  # z enters the scores as a high and a low part
    split_codebook: bool  # and the codes likewise
    split_all: bool  # and so does every operand of every other product
    centre: bool  # subtract a point among the codes first

    @property
    def operands(self) -> Operands:
        """What the choice of a tile depends on."""
        if self.split_all:
            return "split"
        if self.split_latents:
            return "high"
        if self.operand != torch.bfloat16 or self.centre:
            return "converted"
        return "mixed" if self.split_codebook else "bfloat16"


def arithmetic(z_dtype: torch.dtype, codebook_dtype: torch.dtype, precision: str) -> Arithmetic:
    """The arithmetic for these dtypes; `precision` speaks for float32 latents only.

    Centring 16-bit latents would round them again, where their products are exact as they are.
    """
    if z_dtype != torch.float32:
        return Arithmetic(z_dtype, False, codebook_dtype != z_dtype, False, False)
    if precision == "highest":
        return Arithmetic(torch.float16, True, True, True, True)
    high = precision == "high"
    return Arithmetic(torch.bfloat16, high, high, False, True)
