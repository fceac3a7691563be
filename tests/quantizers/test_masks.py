"""Masked positions: as if they were not there."""

import pytest
import torch

from softvq.quantizers import EMAVQ, VQ, GumbelVQ, SoftVQ

DIM, CODES = 6, 10
OPTIONS = [
    (SoftVQ, {"commitment_weight": 0.25}),
    (VQ, {}),
    (EMAVQ, {"threshold_ema_dead_code": 1.0}),
    (GumbelVQ, {"straight_through": True}),
]
each = pytest.mark.parametrize(
    ("kind", "options"), OPTIONS, ids=lambda value: getattr(value, "__name__", "")
)


def pair(kind, options):
    """Two equal quantizers with everything that could look at a masked row switched on."""
    options = {"kmeans_init": True, "entropy_weight": 0.1, "codebook_dim": 4, "heads": 2} | options
    one, other = kind(DIM, CODES, **options), kind(DIM, CODES, **options)
    other.load_state_dict(one.state_dict())
    return one, other


@each
def test_masked_rows_change_nothing(kind, options):
    masked, short = pair(kind, options)
    mask = torch.rand(4, 12) < 0.6
    for step in range(3):
        x = torch.randn(4, 12, DIM)
        x[~mask] = float("nan")  # nobody may look
        rows = x[mask].requires_grad_()
        x.requires_grad_()
        results = []
        for vq, given, where in ((masked, x, {"mask": mask}), (short, rows, {})):
            torch.manual_seed(step)
            quantized, indices, loss = vq(given, **where)
            vq.zero_grad()
            valid = quantized[mask] if where else quantized
            (loss + valid.square().sum()).backward()
            results.append((valid, indices[mask] if where else indices, loss))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(x.grad[mask], rows.grad)
        assert torch.equal(x.grad[~mask], torch.zeros_like(x.grad[~mask]))
        for a, b in zip(masked.parameters(), short.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None)
            assert a.grad is None or torch.equal(a.grad, b.grad)
        for a, b in zip(masked.state_dict().values(), short.state_dict().values(), strict=True):
            assert torch.equal(a, b)


@each
def test_masked_positions_return_the_input_and_no_index(kind, options):
    vq, _ = pair(kind, options)
    x, mask = torch.randn(4, 12, DIM), torch.rand(4, 12) < 0.6
    quantized, indices, _ = vq(x, mask=mask)
    assert torch.equal(quantized[~mask], x[~mask])
    assert torch.equal(indices == -1, ~mask[..., None].expand(4, 12, 2))
    vq.return_zeros_for_masked_padding = True
    assert torch.equal(vq(x, mask=mask)[0][~mask], torch.zeros_like(x[~mask]))


@each
def test_lengths_are_a_mask(kind, options):
    one, other = pair(kind, options)
    x, lens = torch.randn(3, 5, DIM), torch.tensor([5, 2, 0])
    torch.manual_seed(1)
    by_length = one(x, lens=lens)
    torch.manual_seed(1)
    by_mask = other(x, mask=torch.arange(5) < lens[:, None])
    for a, b in zip(by_length, by_mask, strict=True):
        assert torch.equal(a, b)
    assert torch.equal((by_length[1] >= 0).all(-1).sum(1), lens)


@each
def test_channel_first_images_are_masked_too(kind, options):
    vq = kind(DIM, CODES, accept_image_fmap=True, **options)
    x, mask = torch.randn(2, DIM, 4, 5), torch.rand(2, 4, 5) < 0.5
    quantized, indices, _ = vq(x, mask=mask)
    assert torch.equal(quantized.movedim(1, -1)[~mask], x.movedim(1, -1)[~mask])
    assert torch.equal(indices == -1, ~mask)


@each
def test_a_batch_without_a_valid_row(kind, options):
    vq, _ = pair(kind, options)
    x = torch.randn(2, 3, DIM, requires_grad=True)
    quantized, indices, loss, parts = vq(
        x, mask=torch.zeros(2, 3, dtype=torch.bool), return_loss_breakdown=True
    )
    assert torch.equal(quantized, x) and (indices == -1).all()
    assert loss == 0 and all(part == 0 for part in parts)
    loss.backward()
    assert not vq.initialised  # k-means waits for rows
    vq(torch.randn(2, 30, DIM))
    assert vq.initialised
    before = vq.codebook.clone()
    vq(x, mask=torch.zeros(2, 3, dtype=torch.bool))
    torch.testing.assert_close(vq.codebook, before)


@each
def test_without_a_valid_row_every_parameter_has_a_gradient_of_zero(kind, options):
    vq, _ = pair(kind, options)
    x, mask = torch.randn(2, 3, DIM), torch.zeros(2, 3, dtype=torch.bool)
    quantized, _, loss = vq(x, mask=mask)
    (quantized[mask].sum() + loss).backward()
    for parameter in vq.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mask": torch.ones(2, 3)}, TypeError, "mask must be .* torch.bool, got torch.float32"),
        ({"mask": [[True] * 3] * 2}, TypeError, "mask must be .* torch.bool, got a list"),
        (
            {"mask": torch.ones(2, 4, dtype=torch.bool)},
            ValueError,
            r"mask must have the positions' shape \(2, 3\), got \(2, 4\)",
        ),
        ({"lens": torch.ones(2)}, TypeError, "lens must be whole numbers, got torch.float32"),
        ({"lens": [1, 3]}, TypeError, "lens must be whole numbers, got a list"),
        ({"lens": torch.ones(3, dtype=torch.int64)}, ValueError, r"lens must be \(B,\) .* \(3,\)"),
        ({"lens": torch.tensor([4, -1])}, ValueError, r"lens must lie in \[0, 4\), got -1 to 4"),
        (
            {
                "lens": torch.ones(2, dtype=torch.int64),
                "mask": torch.ones(2, 3, dtype=torch.bool),
            },
            ValueError,
            "give mask or lens, not both",
        ),
    ],
    ids=["dtype", "list", "shape", "lens dtype", "lens list", "lens shape", "lens values", "both"],
)
def test_bad_masks_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        VQ(DIM, CODES)(torch.randn(2, 3, DIM), **arguments)
