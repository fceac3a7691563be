"""An autoregressive network over a grid of code indices.

A code's probability is conditioned on all codes before it in raster order:
p(codes) = Π p(code_ij | codes above, codes to the left in its row)
(van den Oord et al. 2016b, "Conditional image generation with PixelCNN decoders", equation 1).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softvq import losses
from softvq.checks import check_counts, check_dtype, check_positive, check_range
from softvq.models.checks import check_labels
from softvq.models.masked import GatedLayer, shift_down, shift_right
from softvq.models.networks import Grid


class CoarseCodes(nn.Module):
    """Features of another level's codes: (B, h', w') int64 → (B, width, h, w).

    Residual convolutions see all of them, then the nearest neighbour of each position is taken
    (VQ-VAE-2, Razavi et al. 2019, section 3.2).
    """

    BLOCKS = 2

    def __init__(self, codebook_size: int, width: int):
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(width, width, 1),
            )
            for _ in range(self.BLOCKS)
        )

    def forward(self, indices: Tensor, grid: Grid) -> Tensor:
        x = self.embedding(indices).permute(0, 3, 1, 2)
        for block in self.blocks:
            x = x + block(x)
        return F.interpolate(x, grid)


class PixelCNN(nn.Module):
    """Gated PixelCNN over one grid of indices, of any size.

    Args:
        codebook_size: K, the number of values an index may take.
        classes: number of class labels; 0 for a prior that knows none.
        condition_size: codebook size of a coarser grid of codes that is given whole; 0 for none.
        width: channels of both stacks. kernel: odd, of the convolutions.
        layers: gated layers; L of them look back 1 + L·(kernel // 2) rows.
        dropout: on the gated features that the horizontal residuals read.

    Raises:
        TypeError: a size that is no whole number.
        ValueError: a size that is too small, or an even kernel.
    """

    def __init__(
        self,
        codebook_size: int,
        *,
        classes: int = 0,
        condition_size: int = 0,
        width: int = 64,
        layers: int = 4,
        kernel: int = 3,
        dropout: float = 0.0,
    ):
        super().__init__()
        check_counts(1, codebook_size=codebook_size, width=width)
        check_counts(0, classes=classes, condition_size=condition_size, layers=layers)
        if kernel < 3 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and at least 3, got {kernel}")
        self.codebook_size = codebook_size
        self.embedding = nn.Embedding(codebook_size, width)
        # Row 0 stands for an unknown class, -1, and stays zero.
        self.classes = nn.Embedding(classes + 1, width, padding_idx=0) if classes else None
        self.condition = CoarseCodes(condition_size, width) if condition_size else None
        context = bool(classes or condition_size)
        self.layers = nn.ModuleList(
            GatedLayer(width, kernel, context=context, dropout=dropout) for _ in range(layers)
        )
        self.head = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
            nn.ReLU(),
            nn.Conv2d(width, codebook_size, 1),
        )
        for parameter in self.head[-1].parameters():
            nn.init.zeros_(parameter)  # the first guess is uniform

    def forward(
        self, indices: Tensor, labels: Tensor | None = None, condition: Tensor | None = None
    ) -> Tensor:
        """Logits (B, h, w, K), float32 at least, of each index given those before it.

        Args:
            indices: (B, h, w) int64.
            labels: (B,) int64, -1 for an unknown class; None for a batch of unknown ones.
            condition: (B, h', w') int64, the coarser codes.

        Raises:
            TypeError: indices or condition that are not int64, labels that are no whole numbers.
            ValueError: another shape; a condition too many or missing; on a CPU, an index, label or
                condition that is out of range.
        """
        check_dtype(torch.int64, indices=indices)
        if indices.dim() != 3:
            raise ValueError(f"indices must be (B, h, w), of one head, got {tuple(indices.shape)}")
        check_range(0, self.codebook_size, indices=indices)
        context = self._context(labels, condition, indices.shape)
        x = self._embed(indices)
        return self._across(x, self._down(x, context))

    def log_likelihood(
        self, indices: Tensor, labels: Tensor | None = None, condition: Tensor | None = None
    ) -> Tensor:
        """log p(indices | labels, condition) in nats per image, (B,). Arguments as for forward."""
        logits = self(indices, labels, condition)
        nats = F.cross_entropy(logits.flatten(0, 2), indices.flatten(), reduction="none")
        return -nats.view(len(indices), -1).sum(1)

    @torch.no_grad()
    def sample(
        self,
        count: int,
        grid: Grid,
        labels: Tensor | None = None,
        condition: Tensor | None = None,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw codes (count, h, w) int64 one after the other; put the network in eval mode first.

        Args:
            grid: (h, w). labels: (count,) int64. condition: (count, h', w') int64.
            temperature: divides the logits; below 1 the likelier codes are preferred.
            generator: of the network's device; equal generators draw equal codes.

        Raises what forward does of labels and condition; ValueError: a temperature not above 0.
        """
        check_positive(temperature=temperature)
        height, width = grid
        indices = torch.zeros(count, *grid, dtype=torch.int64, device=self.embedding.weight.device)
        context = self._context(labels, condition, indices.shape)
        for i in range(height):
            # The rows above are complete: the vertical stack runs once per row.
            seen = None if context is None else context[:, :, : i + 1]
            above = [a[:, :, i:] for a in self._down(self._embed(indices[:, : i + 1]), seen)]
            for j in range(width):
                logits = self._across(self._embed(indices[:, i : i + 1]), above)[:, 0, j]
                probabilities = (logits / temperature).softmax(-1)
                indices[:, i, j] = probabilities.multinomial(1, generator=generator)[:, 0]
        return indices

    def _embed(self, indices: Tensor) -> Tensor:
        """Indices (B, h, w) → (B, width, h, w)."""
        return self.embedding(indices).permute(0, 3, 1, 2)

    def _context(
        self, labels: Tensor | None, condition: Tensor | None, shape: torch.Size
    ) -> Tensor | None:
        """What every position may see: (B, width, h, w), or (B, width, 1, 1) of a class alone."""
        if (condition is None) != (self.condition is None):
            wants = "needs" if condition is None else "takes no"
            raise ValueError(f"this prior {wants} condition")
        context = None
        if self.classes is not None:
            if labels is None:
                labels = torch.full(shape[:1], -1, device=self.embedding.weight.device)
            check_labels(labels, -1, self.classes.num_embeddings - 1, shape[0])
            context = self.classes(labels + 1)[:, :, None, None]
        if self.condition is not None:
            check_dtype(torch.int64, condition=condition)
            if condition.dim() != 3 or len(condition) != shape[0]:
                got = tuple(condition.shape)
                raise ValueError(f"condition must be ({shape[0]}, h', w'), got {got}")
            check_range(0, self.condition.embedding.num_embeddings, condition=condition)
            features = self.condition(condition, shape[1:])
            context = features if context is None else context + features
        return context

    def _down(self, x: Tensor, context: Tensor | None) -> list[Tensor]:
        """Vertical stack on embeddings (B, width, h, w): each layer's word for the other stack."""
        x = shift_down(x)
        words = []
        for layer in self.layers:
            x, above = layer.down(x, context)
            words.append(above)
        return words

    def _across(self, x: Tensor, above: list[Tensor]) -> Tensor:
        """Horizontal stack and head on embeddings (B, width, h, w): logits (B, h, w, K)."""
        x = shift_right(x)
        for layer, word in zip(self.layers, above, strict=True):
            x = layer.right(x, word)
        return losses.in_float32(self.head(x)).permute(0, 2, 3, 1)
