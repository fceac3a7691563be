"""Restarting dead codes."""

import pytest
import torch

from softvq.quantizers import VQ, DeadCodeRestart, GumbelVQ, SoftVQ

CODES, DIM = 6, 3
THRESHOLD = 0.5


def with_dead(*dead):
    """A counter that has seen every code but these, and a codebook."""
    restart = DeadCodeRestart(CODES, THRESHOLD, decay=0.5)
    alive = torch.tensor([code for code in range(CODES) if code not in dead])
    for _ in range(4):
        restart.update(alive.repeat(5).view(5, -1))
    return restart, torch.randn(CODES, DIM)


def is_a_row_of(code, rows):
    return (rows == code).all(-1).any().item()


def test_shares_are_running_averages():
    restart = DeadCodeRestart(2, THRESHOLD, decay=0.9)
    restart.update(torch.tensor([[0, 0], [0, 1]]))
    torch.testing.assert_close(restart.share, torch.tensor([0.525, 0.475]))


def test_shares_in_double_precision():
    restart = DeadCodeRestart(3, THRESHOLD, decay=0.0).double()
    restart.update(torch.tensor([0, 1, 1]))
    wanted = torch.tensor([1, 2, 0], dtype=torch.float64) / 3
    torch.testing.assert_close(restart.share, wanted, rtol=1e-15, atol=0)


def test_masked_positions_do_not_count():
    restart = DeadCodeRestart(2, THRESHOLD, decay=0.0)
    restart.update(torch.tensor([[0, -1], [1, -1], [1, 1]]))
    assert torch.equal(restart.share, torch.tensor([0.25, 0.75]))
    restart.update(torch.tensor([-1, -1]))
    assert torch.equal(restart.share, torch.zeros(2))


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([0.0, 1.0], TypeError, "indices must be a tensor of torch.int64, got torch.float32"),
        ([0, 2], ValueError, r"indices must lie in \[-1, 2\), got 0 to 2"),
        ([-2, 1], ValueError, r"indices must lie in \[-1, 2\), got -2 to 1"),
    ],
)
def test_indices_that_are_none_are_refused(indices, error, message):
    with pytest.raises(error, match=message):
        DeadCodeRestart(2, THRESHOLD).update(torch.tensor(indices))


@pytest.mark.parametrize("dead", [[], [1]])
def test_indices_of_other_latents_are_refused(dead):
    restart, codebook = with_dead(*dead)
    indices = torch.zeros(7, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"indices .* \(\.\.\., D\) = \(2, 7, 3\), got \(7,\)"):
        restart.restart(codebook, torch.randn(2, 7, DIM), indices)


def test_only_dead_codes_move_and_they_move_to_latents():
    restart, codebook = with_dead(1, 4)
    before, latents = codebook.clone(), torch.randn(2, 7, DIM)
    restart.restart(codebook, latents)
    alive = [0, 2, 3, 5]
    assert torch.equal(codebook[alive], before[alive])
    assert all(is_a_row_of(codebook[code], latents.flatten(0, 1)) for code in (1, 4))
    assert not torch.equal(codebook[1], codebook[4])  # drawn without replacement


def test_a_restarted_code_is_not_restarted_again():
    restart, codebook = with_dead(1)
    restart.restart(codebook, torch.randn(7, DIM))
    before = codebook.clone()
    restart.restart(codebook, torch.randn(7, DIM))
    assert torch.equal(codebook, before)


def test_threshold_zero_never_restarts():
    restart = DeadCodeRestart(CODES, 0.0, decay=0.0)
    restart.update(torch.zeros(5, dtype=torch.int64))
    codebook = torch.randn(CODES, DIM)
    before = codebook.clone()
    restart.restart(codebook, torch.randn(7, DIM))
    assert torch.equal(codebook, before)


def test_latents_that_have_their_code_are_not_drawn():
    restart, codebook = with_dead(2)
    far = torch.full((DIM,), 30.0)
    latents = torch.cat([codebook[[0, 1, 3, 4, 5]].repeat(20, 1), far[None]])
    restart.restart(codebook, latents)
    assert torch.equal(codebook[2], far)


def test_more_dead_codes_than_rows():
    restart, codebook = with_dead(0, 1, 2, 3)
    before, latents = codebook.clone(), torch.randn(3, DIM)
    restart.restart(codebook, latents)
    assert sorted(map(tuple, codebook[:3].tolist())) == sorted(map(tuple, latents.tolist()))
    assert torch.equal(codebook[3:], before[3:])
    restart.restart(codebook, latents)  # the one that was left out has its turn
    assert is_a_row_of(codebook[3], latents)


def test_latents_that_are_not_finite_are_not_drawn():
    restart, codebook = with_dead(0, 1, 2)
    latents = torch.randn(4, DIM)
    latents[0, 0], latents[1, 1], latents[2] = torch.nan, torch.inf, -torch.inf
    restart.restart(codebook, latents)
    assert is_a_row_of(codebook[0], latents[3:]) and codebook.isfinite().all()


def test_masked_latents_are_not_drawn():
    restart, codebook = with_dead(0, 1, 2)
    latents, indices = 100 + torch.randn(2, 4, DIM), torch.full((2, 4), -1)
    indices[1, 2] = 5
    restart.restart(codebook, latents, indices)
    assert torch.equal(codebook[0], latents[1, 2]) and codebook.max() < 110
    assert (codebook[1:] < 50).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shares_do_not_follow_a_model_to_half_precision(dtype):
    restart, codebook = with_dead(1)
    before, codebook = restart.share.clone(), codebook.to(dtype)
    restart.to(dtype)
    assert torch.equal(restart.share, before)
    restart.update(torch.zeros(5, dtype=torch.int64))
    latents = (200 * torch.randn(7, DIM)).to(dtype)  # squared, more than float16 holds
    restart.restart(codebook, latents)
    assert is_a_row_of(codebook[1], latents)


@pytest.mark.parametrize("kind", [SoftVQ, VQ, GumbelVQ])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_cosine_sim": True}, "codebook is a copy, as with use_cosine_sim"),
        ({"heads": 3}, r"with K = 6, got \(6, 1\) and \(7, 3\)"),
        ({"codebook_dim": 2}, r"with K = 6, got \(6, 2\) and \(7, 3\)"),
        ({"heads": 3, "separate_codebook_per_head": True}, r"got \(3, 6, 1\) and \(7, 3\)"),
    ],
    ids=str,
)
def test_codebooks_that_it_cannot_move_are_refused(kind, options, message):
    restart, _ = with_dead(1)
    with pytest.raises(ValueError, match=message):
        restart.restart(kind(DIM, CODES, **options).codebook, torch.randn(7, DIM))


def test_the_seed_decides():
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        restart, codebook = with_dead(1, 4)
        latents = torch.randn(200, DIM)
        torch.manual_seed(seed)
        restart.restart(codebook, latents)
        results.append(codebook)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_a_parameter_is_moved_in_place():
    restart, codebook = with_dead(1)
    parameter = torch.nn.Parameter(codebook[None].clone())
    latents = torch.randn(7, DIM)
    restart.restart(parameter[0], latents)
    assert is_a_row_of(parameter.data[0, 1], latents) and parameter.grad_fn is None


def test_shares_are_saved():
    restart, _ = with_dead(1)
    other = DeadCodeRestart(CODES, THRESHOLD)
    other.load_state_dict(restart.state_dict())
    assert torch.equal(other.share, restart.share)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0.5), "codebook_size must be at least 1, got 0"),
        ((4, -1.0), "threshold must be .* got -1.0"),
        ((4, 0.5, 1.0), "decay must be .* below 1, got 1.0"),
    ],
)
def test_bad_options_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        DeadCodeRestart(*arguments)
