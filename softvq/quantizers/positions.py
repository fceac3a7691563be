"""Which positions of a batch count: masks and lengths."""

from typing import NamedTuple

import torch
from torch import Tensor

from softvq.checks import check_dtype, check_integers, check_range


def valid_positions(
    shape: torch.Size, device: torch.device, mask: Tensor | None, lens: Tensor | None
) -> Tensor | None:
    """The mask, or the one that lengths stand for; None where every position counts.

    Args:
        shape: of the positions, (B, ...).
        mask: bool, of that shape.
        lens: (B,) integers; the first lens[b] positions of (B, N) count.
    Raises:
        TypeError, ValueError: a dtype or shape that is not allowed, lengths beyond N (on a CPU),
            or both are given.
    """
    if mask is not None and lens is not None:
        raise ValueError("give mask or lens, not both")
    if lens is not None:
        check_integers(lens=lens)
        if len(shape) != 2 or lens.shape != shape[:1]:
            raise ValueError(
                f"lens must be (B,) for positions (B, N) = {tuple(shape)}, got {tuple(lens.shape)}"
            )
        check_range(0, shape[1] + 1, lens=lens)
        return torch.arange(shape[1], device=device) < lens.to(device)[:, None]
    if mask is None:
        return None
    check_dtype(torch.bool, mask=mask)
    if mask.shape != shape:
        raise ValueError(
            f"mask must have the positions' shape {tuple(shape)}, got {tuple(mask.shape)}"
        )
    return mask


def put_back(values: Tensor, valid: Tensor, elsewhere: Tensor) -> Tensor:
    """`elsewhere` (B, ..., *), with the rows (n, *) of `values` at the valid positions."""
    full = elsewhere.to(values.dtype, copy=True)
    full[valid] = values
    return full


def without_rows(loss: Tensor, parts: NamedTuple) -> tuple[Tensor, NamedTuple]:
    """Losses () that are means over nothing, as zeros with gradients of zero.

    They keep their graphs: data-parallel training waits for the same gradients from every replica.
    """
    regulariser = parts.entropy_regulariser  # of all replicas' rows
    nothing = torch.ones_like(loss, dtype=torch.bool)
    parts = type(parts)._make(part.masked_fill(nothing, 0) for part in parts)
    return loss.masked_fill(nothing, 0), parts._replace(entropy_regulariser=regulariser)
