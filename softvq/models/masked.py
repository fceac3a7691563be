"""Convolutions over a grid that see nothing after their own position in raster order.

Nothing is multiplied by a mask. The input is shifted once, by a row for the vertical stack and by a
column for the horizontal one; a layer may then look at its own position, and its kernel holds only
the rows above and this row (vertical) or the columns to the left and this column (horizontal).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class VerticalConv(nn.Conv2d):
    """Row i of (B, C, h, w) → rows i − kernel//2 … i, columns to both sides."""

    def __init__(self, inputs: int, outputs: int, kernel: int):
        super().__init__(inputs, outputs, (kernel // 2 + 1, kernel))
        self.reach = kernel // 2

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (self.reach, self.reach, self.reach, 0)))


class HorizontalConv(nn.Conv2d):
    """Column j of (B, C, h, w) → columns j − kernel//2 … j of the same row."""

    def __init__(self, inputs: int, outputs: int, kernel: int):
        super().__init__(inputs, outputs, (1, kernel // 2 + 1))
        self.reach = kernel // 2

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (self.reach, 0, 0, 0)))


def shift_down(x: Tensor) -> Tensor:
    """(B, C, h, w): row i holds what row i − 1 held, the first row zeros."""
    return F.pad(x[:, :, :-1], (0, 0, 1, 0))


def shift_right(x: Tensor) -> Tensor:
    """(B, C, h, w): column j holds what column j − 1 held, the first column zeros."""
    return F.pad(x[:, :, :, :-1], (1, 0, 0, 0))


def gate(features: Tensor) -> Tensor:
    """tanh(f) ⊙ σ(g) of features (B, 2C, h, w) = [f, g] (Gated PixelCNN, equation 2)."""
    f, g = features.chunk(2, 1)
    return torch.tanh(f) * torch.sigmoid(g)


class GatedLayer(nn.Module):
    """One layer of both stacks (van den Oord et al. 2016b, figure 2 and equation 4).

    The context, anything that may be seen at every position, is added inside all gates.
    """

    def __init__(self, width: int, kernel: int, *, context: bool, dropout: float):
        super().__init__()
        self.vertical = VerticalConv(width, 2 * width, kernel)
        self.across = nn.Conv2d(2 * width, 2 * width, 1)
        self.horizontal = HorizontalConv(width, 2 * width, kernel)
        self.residual = nn.Sequential(nn.Dropout(dropout), nn.Conv2d(width, width, 1))
        self.context = nn.Conv2d(width, 4 * width, 1, bias=False) if context else None

    def down(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """The vertical stack: x (B, C, h, w) → its next x, and what the horizontal stack adds.

        The context is (B, C, h, w), or (B, C, 1, 1) when it is the same everywhere.
        The second result, (B, 2C, h, w), carries the context of the horizontal gates.
        """
        features = self.vertical(x)
        above = self.across(features)
        if self.context is not None:
            vertical, horizontal = self.context(context).chunk(2, 1)
            features, above = features + vertical, above + horizontal
        return gate(features), above

    def right(self, x: Tensor, above: Tensor) -> Tensor:
        """The horizontal stack: x (B, C, h, w) and the vertical stack's word → its next x."""
        return x + self.residual(gate(self.horizontal(x) + above))
