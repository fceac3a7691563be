"""What all quantizers have in common: layouts, heads, masks, codes ↔ indices, k-means start."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from softvq import losses
from softvq.checks import (
    check_counts,
    check_floating,
    check_integers,
    check_range,
    check_temperatures,
    check_weights,
)
from softvq.precise import KeepsFloat32
from softvq.quantizers.entropy import batch_regulariser
from softvq.quantizers.kmeans import kmeans
from softvq.quantizers.positions import put_back, valid_positions, without_rows
from softvq.quantizers.straight_through import codes_at
from softvq.quantizers.types import Quantized


class Quantizer(KeepsFloat32):
    """A module with the call of vector-quantize-pytorch: quantized, indices, loss = vq(x).

    Subclasses hold the codes, and say how latents become codes (`quantize`) and what trains
    (`_loss`, `_learn`).

    Args:
        dim: features of the input.
        codebook_size: K.
        codebook_dim: D of a code; other than dim / heads, a linear layer leads in and one out.
        heads: parts of D features that the input is cut into, each with an index of its own.
        separate_codebook_per_head: a codebook for each head; otherwise they share one.
        channel_last: input (B, ..., dim); otherwise (B, dim, ...).
        accept_image_fmap: input (B, dim, H, W), indices (B, H, W).
        return_zeros_for_masked_padding: the output at masked positions is zero, not the input.
        use_cosine_sim: latents and codes are brought to length 1 before they meet.
        kmeans_init: the first training batch's k-means centres become the codes.
        kmeans_iters: steps of that k-means.
        sync_codebook: whether k-means, running statistics and the regulariser's mean assignment
            are, in training, those of all replicas of a data-parallel run; None: if
            torch.distributed is initialised.
        entropy_weight: of `losses.entropy_regulariser` in the loss; 0 also leaves its work out.
        entropy_temperature: the T of the assignments that it looks at.

    Raises:
        TypeError, ValueError: an option that is not allowed.
    """

    codes_name = "codebook_parameter"  # of the tensor (codebooks, K, D) that holds the codes

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        heads: int = 1,
        *,
        separate_codebook_per_head: bool = False,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        return_zeros_for_masked_padding: bool = False,
        use_cosine_sim: bool = False,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sync_codebook: bool | None = None,
        entropy_weight: float = 0.0,
        entropy_temperature: float = 1.0,
    ):
        super().__init__()
        check_counts(
            1, dim=dim, codebook_size=codebook_size, heads=heads, codebook_dim=codebook_dim
        )
        check_counts(0, kmeans_iters=kmeans_iters)
        check_weights(entropy_weight=entropy_weight)
        check_temperatures(entropy_temperature=entropy_temperature)
        if codebook_dim is None and dim % heads:
            raise ValueError(f"dim {dim} does not divide into {heads} heads; give codebook_dim")
        self.dim = int(dim)
        self.codebook_size = int(codebook_size)
        self.codebook_dim = int(dim // heads if codebook_dim is None else codebook_dim)
        self.heads = int(heads)
        self.codebooks = self.heads if separate_codebook_per_head else 1
        self.accept_image_fmap = accept_image_fmap
        self.channel_last = channel_last and not accept_image_fmap
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.use_cosine_sim = use_cosine_sim
        self.kmeans_iters = kmeans_iters
        self.sync_codebook = sync_codebook
        self.entropy_weight = entropy_weight
        self.entropy_temperature = entropy_temperature

        inner = self.codebook_dim * self.heads
        self.project_in = nn.Linear(self.dim, inner) if inner != dim else nn.Identity()
        self.project_out = nn.Linear(inner, self.dim) if inner != dim else nn.Identity()
        # 0 or 1, and not a bool, for averages of models subtract their buffers.
        self.register_buffer("initialised", torch.tensor(float(not kmeans_init)))
        self._is_initialised = not kmeans_init  # known to be, without waiting for a GPU
        self.register_load_state_dict_pre_hook(_take_codes_as_placed)
        self.register_load_state_dict_post_hook(_read_initialised)

    def extra_repr(self) -> str:
        """What print() shows of the module."""
        names = ("dim", "codebook_size", "codebook_dim", "heads", "codebooks")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def _first_codes(self) -> Tensor:
        """Random codes (codebooks, K, D) to start from."""
        codes = torch.randn(self.codebooks, self.codebook_size, self.codebook_dim)
        return normalize(codes, dim=-1) if self.use_cosine_sim else codes

    @property
    def _stored_codes(self) -> Tensor:
        """The codes (codebooks, K, D), as they are stored."""
        return getattr(self, self.codes_name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "codebook":
            check_floating(codebook=value)
            value = value.detach()  # nn.Module would take a parameter for a new one of its own
        super().__setattr__(name, value)

    @property
    def codebook(self) -> Tensor:
        """(K, D), or (heads, K, D) with a codebook per head. Assign to it to set the codes.

        It is a view of the stored codes, to be written in place under no_grad too; with
        use_cosine_sim it is a copy of length 1.
        """
        codes = self._stored_codes[0 if self.codebooks == 1 else ...]
        return normalize(codes, dim=-1) if self.use_cosine_sim else codes

    @codebook.setter
    @torch.no_grad()
    def codebook(self, codes: Tensor) -> None:
        """Copy codes of the same shape in, which k-means then leaves; ValueError for another."""
        shape = self.codebook.shape
        if codes.shape != shape:
            raise ValueError(f"codebook must be {tuple(shape)}, got {tuple(codes.shape)}")
        self._stored_codes.copy_(codes.view_as(self._stored_codes))
        self._mark_initialised()

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        return_loss_breakdown: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, NamedTuple]:
        """Quantise x (B, ..., dim), or (B, dim, ...) without channel_last.

        Args:
            x: float16, bfloat16, float32 or float64; where a linear layer leads in, of its dtype
                outside autocast.
            mask: (B, ...) bool; where it is False nothing is quantised, counted or trained, the
                output is the input (or zero) and the indices are −1. On a GPU a mask costs a host
                synchronisation, for the rows that count are picked out first.
            lens: (B,) integers, instead of a mask for x (B, N, dim): the first lens[b] count.
            return_loss_breakdown: also return the loss's unweighted parts.

        Returns:
            quantized (as x), indices (B, ...) int64, with heads (B, ..., heads), the loss () and,
            if asked for, its parts. The loss of no row at all is zero, but for an entropy
            regulariser over other replicas' rows.

        Raises:
            TypeError, ValueError: an argument of another shape or dtype.
        """
        self._check_input(x)
        x = x if self.channel_last else x.movedim(1, -1)
        valid = valid_positions(x.shape[:-1], x.device, mask, lens)
        z = self._latents(x if valid is None else x[valid])
        if self.training and not self._is_initialised:
            self._initialise(z.detach())
        out = self.quantize(z)
        regulariser = torch.zeros((), device=z.device)
        if self.entropy_weight:
            how = {"training": self.training, "sync": self.sync_codebook}
            regulariser = batch_regulariser(z, self.codebook, self.entropy_temperature, **how)
        loss, breakdown = self._loss(z, out, regulariser)
        if z.numel() == 0:
            loss, breakdown = without_rows(loss, breakdown)
        if self.entropy_weight:
            loss = loss + self.entropy_weight * regulariser
        if self.training:
            self._learn(z.detach(), out)

        quantized, indices = self._outputs(out.quantized), out.indices
        if valid is not None:
            masked = torch.zeros_like(x) if self.return_zeros_for_masked_padding else x
            quantized = put_back(quantized, valid, masked)
            indices = put_back(
                indices, valid, indices.new_full((*valid.shape, *indices.shape[1:]), -1)
            )
        quantized = self._to_input_layout(quantized)
        if return_loss_breakdown:
            return quantized, indices, loss, breakdown
        return quantized, indices, loss

    def latents(self, x: Tensor) -> Tensor:
        """What meets the codes, (B, ..., D), with heads (B, ..., heads, D), of x as forward has it:
        for `Annealing` and `DeadCodeRestart`. Raises TypeError or ValueError of x.
        """
        self._check_input(x)
        return self._latents(x if self.channel_last else x.movedim(1, -1))

    def quantize(self, z: Tensor) -> Quantized:
        """Quantise latents (..., D), with heads (..., heads, D), as `forward` does: no loss."""
        raise NotImplementedError

    def _loss(self, z: Tensor, out: Any, entropy_regulariser: Tensor) -> tuple[Tensor, NamedTuple]:
        """The loss without the regulariser, and the breakdown with it."""
        raise NotImplementedError

    def _learn(self, z: Tensor, out: Any) -> None:
        """Take statistics of a training batch's latents, without gradient."""

    @torch.no_grad()
    def _initialise(self, z: Tensor) -> bool:
        """Let k-means on latents (..., D) place the codes, if there are any and all are finite.

        Not where the buffer says that they are placed: it was copied in, as another replica's is.
        Returns whether it has placed them.
        """
        if self.initialised:
            self._is_initialised = True
            return False
        options = {"spherical": self.use_cosine_sim, "sync": self.sync_codebook}
        for codes, latents in zip(self._stored_codes, self._by_codebook(z), strict=True):
            centres = kmeans(latents, self.codebook_size, self.kmeans_iters, **options)
            if centres is None or not centres.isfinite().all():
                return False
            codes.copy_(centres)
        self._mark_initialised()
        return True

    def _mark_initialised(self) -> None:
        """The codes have been placed: k-means is over."""
        self.initialised.fill_(1)
        self._is_initialised = True

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes (..., D) of indices (...); with heads (..., heads, D) of (..., heads); 0 for −1.

        Raises:
            TypeError: indices that are no whole numbers.
            ValueError: indices that do not end in an axis of the heads or, on a CPU, lie outside
                [−1, K).
        """
        check_integers(indices=indices)
        if self.heads > 1 and indices.shape[-1:] != (self.heads,):
            raise ValueError(
                f"indices must be (..., heads) with heads = {self.heads}, "
                f"got {tuple(indices.shape)}"
            )
        indices = indices.long()  # of bytes, indexing would make a mask
        check_range(-1, self.codebook_size, indices=indices)
        codes = codes_at(self.codebook, indices.clamp(min=0))
        return codes.masked_fill((indices < 0)[..., None], 0)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The nearest codes as forward returns them: projected, in the input's layout; 0 for −1."""
        output = self._outputs(self.get_codes_from_indices(indices).to(self.converted_to))
        masked = indices < 0 if self.heads == 1 else (indices < 0).all(-1)
        return self._to_input_layout(output.masked_fill(masked[..., None], 0))

    def _latents(self, x: Tensor) -> Tensor:
        """What meets the codes: (..., D), with heads (..., heads, D), of x (..., dim)."""
        z = self.project_in(x)
        z = z if self.heads == 1 else z.unflatten(-1, (self.heads, self.codebook_dim))
        if not self.use_cosine_sim:
            return z
        return normalize(losses.in_float32(z), dim=-1).to(z.dtype)

    def _outputs(self, codes: Tensor) -> Tensor:
        """(..., dim) of codes (..., D), with heads (..., heads, D)."""
        return self.project_out(codes if self.heads == 1 else codes.flatten(-2))

    def _to_input_layout(self, x: Tensor) -> Tensor:
        return x if self.channel_last else x.movedim(-1, 1)

    def _by_codebook(self, z: Tensor) -> Tensor:
        """Latents (..., [heads,] *) as (codebooks, n, *): the rows that each codebook sees."""
        return z.reshape(-1, self.codebooks, z.shape[-1]).transpose(0, 1)

    def _check_input(self, x: Tensor) -> None:
        check_floating(x=x)
        if self.accept_image_fmap and x.dim() != 4:
            raise ValueError(f"x must be (B, dim, H, W), got {tuple(x.shape)}")
        axis = -1 if self.channel_last else 1
        if x.dim() < 2 or x.shape[axis] != self.dim:
            layout = "(B, ..., dim)" if self.channel_last else "(B, dim, ...)"
            raise ValueError(f"x must be {layout} with dim = {self.dim}, got {tuple(x.shape)}")


def _take_codes_as_placed(quantizer: Quantizer, state: dict, prefix: str, *_: object) -> None:
    """k-means leaves the codes of a checkpoint that does not say whether they have been placed."""
    codes = state.get(prefix + quantizer.codes_name)
    if codes is not None:
        placed = torch.ones((), dtype=quantizer.initialised.dtype, device=codes.device)
        state.setdefault(prefix + "initialised", placed)


def _read_initialised(quantizer: Quantizer, _: object) -> None:
    """After a checkpoint was loaded: whether its codes have been placed."""
    if not quantizer.initialised.is_meta:  # no codes were in the checkpoint
        quantizer._is_initialised = bool(quantizer.initialised)
