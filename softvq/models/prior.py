"""A prior over the codes of a model: one PixelCNN for each level, the coarsest first."""

import math
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from softvq.models.base import CodeLevel
from softvq.models.checks import check_codes
from softvq.models.pixelcnn import PixelCNN


class CodePrior(nn.Module):
    """One PixelCNN for each level of a quantised autoencoder, each given the level before.

    p(top, bottom | class) = p(top | class) · p(bottom | top, class), VQ-VAE-2's hierarchy (Razavi
    et al. 2019, section 3.2); a plain model has one level.

    Args:
        levels: coarsest first, by name; codes go in and come out as dicts of the same names.
        classes, width, layers, kernel, dropout: as for PixelCNN, the same at every level.

    Raises what PixelCNN does; ValueError: no levels.
    """

    def __init__(
        self,
        levels: Mapping[str, CodeLevel],
        *,
        classes: int = 0,
        width: int = 64,
        layers: int = 4,
        kernel: int = 3,
        dropout: float = 0.0,
    ):
        super().__init__()
        if not levels:
            raise ValueError("levels must name at least one grid of codes, got none")
        self.levels = {name: CodeLevel(*level) for name, level in levels.items()}
        self.classes = classes
        self.before = {after: before for before, after in pairwise(levels)}
        self.networks = nn.ModuleDict()
        condition_size = 0
        for name, level in self.levels.items():
            self.networks[name] = PixelCNN(
                level.codebook_size,
                classes=classes,
                condition_size=condition_size,
                width=width,
                layers=layers,
                kernel=kernel,
                dropout=dropout,
            )
            condition_size = level.codebook_size

    @property
    def latents(self) -> int:
        """Number of codes per image, of all levels."""
        return sum(math.prod(level.grid) for level in self.levels.values())

    def forward(
        self, codes: Mapping[str, Tensor], labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The losses of a batch of codes, name → (B, h, w) integers; labels (B,), -1 unknown.

        "loss": nats per latent, of all levels' codes together; "bits_per_latent": the same in
        bits; of several levels also each one's own, "bits_per_latent_<name>". All 0-d.

        Raises:
            TypeError: codes that are no dict, codes or labels that are no whole numbers.
            ValueError: other levels or shapes; on a CPU, a code or label that is out of range.
        """
        nats = {name: -value.mean() for name, value in self._log_likelihoods(codes, labels).items()}
        loss = sum(nats.values()) / self.latents
        parts = {"loss": loss, "bits_per_latent": loss.detach() / math.log(2)}
        if len(nats) > 1:
            for name, value in nats.items():
                bits = value.detach() / (math.prod(self.levels[name].grid) * math.log(2))
                parts[f"bits_per_latent_{name}"] = bits
        return parts

    def log_likelihood(self, codes: Mapping[str, Tensor], labels: Tensor | None = None) -> Tensor:
        """log p(codes | labels) in nats per image, (B,). Arguments as for forward."""
        return sum(self._log_likelihoods(codes, labels).values())

    @torch.no_grad()
    def sample(
        self,
        count: int,
        labels: Tensor | None = None,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Draw codes level by level, name → (count, h, w) int64. Arguments as for PixelCNN."""
        codes: dict[str, Tensor] = {}
        for name, level in self.levels.items():
            codes[name] = self.networks[name].sample(
                count,
                level.grid,
                labels,
                codes.get(self.before.get(name)),
                temperature=temperature,
                generator=generator,
            )
        return codes

    def _log_likelihoods(
        self, codes: Mapping[str, Tensor], labels: Tensor | None
    ) -> dict[str, Tensor]:
        """Each level's share of log_likelihood, (B,)."""
        check_codes("codes", codes, {name: level.grid for name, level in self.levels.items()})
        codes = {name: indices.long() for name, indices in codes.items()}
        return {
            name: network.log_likelihood(codes[name], labels, codes.get(self.before.get(name)))
            for name, network in self.networks.items()
        }
