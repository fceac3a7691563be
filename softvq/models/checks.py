"""Checks of what models are built of and given: each error names the argument and what it must be.

None waits for a GPU, and none breaks a compiled graph.
"""

from collections.abc import Mapping

from torch import Tensor

from softvq.checks import check_floating, check_integers, check_range
from softvq.models.networks import Grid, Shape
from softvq.quantizers import Quantizer


def check_layout(**quantizers: Quantizer) -> None:
    """Quantizers of latents (B, h, w, D): others may fit the shape, not the meaning of the axes.

    Raises TypeError or ValueError.
    """
    for name, quantizer in quantizers.items():
        if not isinstance(quantizer, Quantizer):
            raise TypeError(f"{name} must be a quantizer, got a {type(quantizer).__name__}")
        if not quantizer.channel_last:
            raise ValueError(
                f"{name} must have channel_last=True and accept_image_fmap=False, "
                "for its latents are (B, h, w, D)"
            )


def check_images(images: Tensor, shape: Shape) -> None:
    """A batch (B, *shape) of floating-point images. Raises TypeError or ValueError."""
    check_floating(images=images)
    if images.dim() != 4 or images.shape[1:] != shape:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"images must be (B, {wanted}), got {tuple(images.shape)}")


def check_labels(labels: Tensor, least: int, classes: int, count: int) -> None:
    """Labels (count,) in [least, classes). Raises TypeError or ValueError."""
    check_integers(labels=labels)
    if labels.shape != (count,):
        raise ValueError(f"labels must be ({count},), one an image, got {tuple(labels.shape)}")
    check_range(least, classes, labels=labels)


def check_codes(argument: str, codes: Mapping[str, Tensor], grids: Mapping[str, Grid]) -> None:
    """A dict of indices (B, h, w, ...) by level. Raises TypeError or ValueError."""
    if not isinstance(codes, Mapping):
        raise TypeError(f"{argument} must be a dict by level, got a {type(codes).__name__}")
    if set(codes) != set(grids):
        raise ValueError(f"{argument} must be of the levels {[*grids]}, got {[*codes]}")
    for level, grid in grids.items():
        name = f"{argument}[{level!r}]"
        check_integers(**{name: codes[level]})
        if codes[level].shape[1:3] != grid:
            got = tuple(codes[level].shape)
            raise ValueError(f"{name} must be (B, {grid[0]}, {grid[1]}), got {got}")
