"""The quantizer of the VQ-VAE."""

from typing import NamedTuple, Unpack

from torch import Tensor, nn

from softvq import losses
from softvq.checks import check_weights
from softvq.functional import nearest_codes
from softvq.quantizers.base import Quantizer
from softvq.quantizers.straight_through import codes_at, straight_through
from softvq.quantizers.types import QuantizerOptions


class VQQuantized(NamedTuple):
    """What `VQ.quantize` returns; (...) are the leading dimensions of z."""

    quantized: Tensor  #        (..., D), dtype of z: the code's value, a gradient for z
    indices: Tensor  #          (...) int64
    squared_distance: Tensor  # (...), ‖sg[z] − e‖², differentiable in the codes only


class VQLoss(NamedTuple):
    """Parts of what VQ computed, 0-d tensors, unweighted."""

    codebook: Tensor  #            mean of (sg[z] − e)²
    commitment: Tensor  #          mean of (z − sg[e])²
    entropy_regulariser: Tensor  # zero with entropy_weight=0


class VQ(Quantizer):
    """The nearest code, trained by gradients.

    van den Oord et al. 2017, "Neural discrete representation learning", eq. 1 to 3: the value is
    the nearest code's, the gradient passes straight through to the latent, and
    loss = ‖sg[z] − e‖² + β‖z − sg[e]‖², each a mean over elements.

    Args:
        dim, codebook_size, codebook_dim, heads, **options: see `Quantizer`.
        commitment_weight: β.
        rotation_trick: the gradient reaches the latent turned and scaled as the latent would be to
            become its code: `straight_through` with `rotated`.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        heads: int = 1,
        *,
        commitment_weight: float = 0.25,
        rotation_trick: bool = False,
        **options: Unpack[QuantizerOptions],
    ):
        super().__init__(dim, codebook_size, codebook_dim, heads, **options)
        check_weights(commitment_weight=commitment_weight)
        self.commitment_weight = commitment_weight
        self.rotation_trick = rotation_trick
        self.codebook_parameter = nn.Parameter(self._first_codes())

    def quantize(self, z: Tensor) -> VQQuantized:
        """The nearest codes of latents (..., D), with heads (..., heads, D)."""
        codebook = self.codebook
        indices, squared_distance = nearest_codes(z.detach(), codebook)
        codes = codes_at(codebook.detach(), indices)
        quantized = straight_through(z, codes, self.rotation_trick)
        return VQQuantized(quantized, indices, squared_distance)

    def _loss(
        self, z: Tensor, out: VQQuantized, entropy_regulariser: Tensor
    ) -> tuple[Tensor, VQLoss]:
        codebook = out.squared_distance.mean() / self.codebook_dim
        commitment = losses.commitment_loss(z, out.quantized)
        loss = codebook + self.commitment_weight * commitment
        return loss, VQLoss(codebook, commitment, entropy_regulariser)
