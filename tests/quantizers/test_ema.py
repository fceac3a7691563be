"""EMAVQ against pencil and paper."""

import pytest
import torch

from softvq.quantizers import EMAVQ

DIM, CODES = 4, 8


def line():
    """Codes 0 and 4 on a line, N = (1, 1); γ = ½, and an ε of 1 that nobody can overlook."""
    vq = EMAVQ(1, 2, decay=0.5, eps=1.0)
    vq.codebook = torch.tensor([[0.0], [4.0]])
    return vq


def points(*values):
    return torch.tensor(values)[:, None]


def close(given, *wanted):
    torch.testing.assert_close(given.flatten(), torch.tensor(wanted))


def test_two_steps_by_hand():
    vq = line()
    close(vq.sums, 0.0, 4.0)  # Ñ = 2(1+1)/(2+2) = 1
    vq(points(1.0, 3.0, 5.0))
    # n = (1, 2), Σz = (1, 8): N = (1, 3/2), m = (1/2, 6), Ñ = (5/2)(N+1)/(9/2) = (10/9, 25/18).
    close(vq.counts, 1.0, 1.5)
    close(vq.sums, 0.5, 6.0)
    close(vq.codebook, 9 / 20, 108 / 25)
    vq(points(0.0))
    # n = (1, 0): N = (1, 3/4), m = (1/4, 3), Ñ = (7/4)(N+1)/(15/4) = (14/15, 49/60). Had the
    # smoothed count been stored, N would be (19/18, 25/36).
    close(vq.counts, 1.0, 0.75)
    close(vq.codebook, 15 / 56, 180 / 49)


def test_the_batch_is_quantised_with_the_codes_before_it():
    quantized, indices, _ = line()(points(1.0, 3.0, 5.0))
    close(quantized, 0.0, 4.0, 4.0)
    assert indices.tolist() == [0, 1, 1]


def test_only_commitment_is_a_loss_and_beta_scales_it():
    vq = EMAVQ(1, 2, commitment_weight=0.5)
    vq.codebook = torch.tensor([[0.0], [4.0]])
    x = points(1.0, 3.0).requires_grad_()
    _, _, loss, parts = vq(x, return_loss_breakdown=True)
    assert parts.commitment == 1.0 and loss == 0.5
    loss.backward()
    close(x.grad, 0.5, -0.5)  # 2β(z − e)/2
    assert list(vq.parameters()) == []


def test_a_long_run_is_the_recursion_in_double_precision():
    vq = EMAVQ(DIM, CODES, decay=0.9)
    counts, sums = torch.ones(CODES).double(), vq.sums[0].double()
    for _ in range(200):
        x = torch.randn(64, DIM)
        _, indices, _ = vq(x)
        chosen = torch.nn.functional.one_hot(indices, CODES).double()
        counts = 0.9 * counts + 0.1 * chosen.sum(0)
        sums = 0.9 * sums + 0.1 * chosen.T @ x.double()
    total = counts.sum()
    smoothed = total * (counts + 1e-5) / (total + CODES * 1e-5)
    torch.testing.assert_close(vq.counts[0].double(), counts, rtol=1e-5, atol=1e-6)
    wanted = sums / smoothed[:, None]
    torch.testing.assert_close(vq.codebook.double(), wanted, rtol=1e-5, atol=1e-5)


def test_codes_written_by_hand_stay_where_they_are_put():
    vq = EMAVQ(DIM, CODES)
    vq(torch.randn(50, DIM))
    with torch.no_grad():
        vq.codebook[3] = 100.0
    vq(torch.randn(50, DIM))
    torch.testing.assert_close(vq.codebook[3], torch.full((DIM,), 100.0), rtol=1e-3, atol=0)


def with_one_dead_code(threshold=0.5):
    """Seven codes with rows around them, and one where no row will come."""
    vq = EMAVQ(DIM, CODES, decay=0.5, threshold_ema_dead_code=threshold)
    vq.codebook[7] = 1e3
    return vq, vq.codebook[:7].repeat(10, 1) + 0.01 * torch.randn(70, DIM)


def test_a_dead_code_moves_to_a_latent_with_its_statistics():
    vq, x = with_one_dead_code()
    vq(x)  # N = ½: not yet below
    assert vq.codebook[7, 0] > 900
    vq(x)  # N = ¼
    assert (x == vq.codebook[7]).all(-1).any()
    assert vq.counts[0, 7] == 1.0  # twice the threshold
    torch.testing.assert_close(vq.sums[0, 7], vq.codebook[7], rtol=1e-4, atol=1e-4)


def test_dead_codes_that_find_no_latent_keep_their_statistics():
    vq, x = EMAVQ(DIM, CODES, decay=0.5, threshold_ema_dead_code=0.3), torch.randn(1, DIM)
    vq(x)
    vq(x)  # N = ¼ of seven codes, and one latent to move them to
    close(vq.counts[0].sort().values, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.6, 1.0)


def test_dead_codes_move_where_half_precision_cannot_square():
    vq = EMAVQ(DIM, CODES, threshold_ema_dead_code=5.0)
    vq.codebook = torch.zeros(CODES, DIM)
    vq.counts.zero_()
    x = 200 + torch.randn(2 * CODES, DIM)  # squared, and summed over D, beyond float16
    vq(x.half())
    assert vq.codebook.abs().amin() > 100


def test_the_next_step_does_not_undo_a_restart():
    vq = EMAVQ(1, 2, decay=0.5, threshold_ema_dead_code=0.3)
    vq.codebook = torch.tensor([[0.0], [1e3]])
    for _ in range(2):
        vq(points(0.0, 0.0, 10.0))  # only 10 is not where a code is
    close(vq.codebook[1], 10.0)
    vq(points(0.0, 0.0))  # no row for it
    torch.testing.assert_close(vq.codebook[1], torch.tensor([10.0]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("threshold", [0.5, 2.0, 5.0])
def test_codes_in_use_live_from_the_first_call_on(threshold):
    vq = EMAVQ(DIM, CODES, threshold_ema_dead_code=threshold)
    vq.codebook = torch.cat([10 * torch.eye(DIM), -10 * torch.eye(DIM)])
    before = vq.codebook.clone()
    for _ in range(3):
        vq(before.repeat(6, 1) + 0.01 * torch.randn(6 * CODES, DIM))
    torch.testing.assert_close(vq.codebook, before, rtol=0, atol=0.01)


def test_a_threshold_of_one_or_less_starts_from_counts_of_one():
    for threshold in (0.0, 0.3, 1.0):
        assert (EMAVQ(DIM, CODES, threshold_ema_dead_code=threshold).counts == 1).all()


def test_counts_stay_until_kmeans_has_rows():
    vq = EMAVQ(DIM, CODES, kmeans_init=True, threshold_ema_dead_code=5.0)
    before = vq.counts.clone()
    vq._initialise(torch.empty(0, DIM))
    assert torch.equal(vq.counts, before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("options", [{}, {"heads": 2, "separate_codebook_per_head": True}], ids=str)
def test_rows_that_are_not_finite_leave_no_trace(bad, options):
    vq = EMAVQ(DIM, CODES, decay=0.5, threshold_ema_dead_code=0.9, **options)
    x = torch.randn(20, DIM)
    x[::5, 1] = bad
    for _ in range(3):  # codes die, and there are finite rows to restart them at
        vq(x)
    assert vq.codebook.isfinite().all() and vq.counts.isfinite().all()
    assert vq(torch.randn(20, DIM))[2].isfinite()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_code_that_such_rows_chose_keeps_its_mean(bad):
    vq, x = EMAVQ(DIM, CODES, decay=0.5), torch.randn(20, DIM)
    x[::5, 1] = bad
    before = vq.codebook.clone()
    chosen = vq(x)[1][::5]
    torch.testing.assert_close(vq.codebook[chosen], before[chosen], rtol=1e-3, atol=0)


def test_without_memory_a_masked_batch_leaves_the_codes():
    vq = EMAVQ(DIM, CODES, decay=0.0)
    before, x = vq.codebook.clone(), torch.randn(2, 3, DIM)
    vq(x, mask=torch.zeros(2, 3, dtype=torch.bool))
    assert torch.equal(vq.codebook, before)


def test_a_frozen_codebook_stays_also_in_training():
    vq = EMAVQ(4, 8, freeze_codebook=True, threshold_ema_dead_code=2.0)
    before = {name: value.clone() for name, value in vq.state_dict().items()}
    vq.train()(torch.randn(50, 4))
    assert all(torch.equal(value, before[name]) for name, value in vq.state_dict().items())
    vq.freeze_codebook = False
    vq(torch.randn(50, 4))
    assert not torch.equal(vq.means, before["means"])


def test_no_threshold_no_restart():
    vq, x = with_one_dead_code(threshold=0.0)
    for _ in range(5):
        vq(x)
    assert vq.codebook[7, 0] > 900


def test_a_threshold_brings_every_code_to_use():
    x = torch.randn(512, DIM)
    used = {}
    for threshold in (0.0, 2.0):
        torch.manual_seed(3)
        vq = EMAVQ(DIM, 64, decay=0.9, threshold_ema_dead_code=threshold)
        vq.codebook = 5 + 0.01 * torch.randn(64, DIM)
        for _ in range(50):
            vq(x)
        used[threshold] = len(vq.eval()(x)[1].unique())
    assert used[0.0] < 20 and used[2.0] > 55


def test_training_finds_the_means():
    centres = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]])
    vq = EMAVQ(2, 3, kmeans_init=True, kmeans_iters=0, decay=0.9)
    for _ in range(60):
        x = centres.repeat(40, 1) + 0.1 * torch.randn(120, 2)
        vq(x)
    order = torch.cdist(centres, vq.codebook).argmin(-1)
    assert torch.allclose(vq.codebook[order], centres, atol=0.05)
    assert torch.allclose(vq.counts, torch.full((1, 3), 40.0), rtol=0.05)


def test_separate_heads_have_statistics_of_their_own():
    vq = EMAVQ(4, 3, heads=2, separate_codebook_per_head=True, decay=0.5)
    alone = [EMAVQ(2, 3, decay=0.5) for _ in range(2)]
    for head, one in enumerate(alone):
        one.codebook = vq.codebook[head]
    x = torch.randn(30, 4)
    vq(x)
    for head, one in enumerate(alone):
        one(x[:, 2 * head : 2 * head + 2])
        torch.testing.assert_close(vq.codebook[head], one.codebook)
        assert torch.equal(vq.counts[head], one.counts[0])


def test_cosine_statistics_are_those_of_directions():
    vq = EMAVQ(2, 2, use_cosine_sim=True, decay=0.5, eps=1e-9)
    vq.codebook = torch.eye(2)
    vq(torch.tensor([[3.0, 0.0], [0.6, 0.8], [1.2, 1.6], [0.0, 9.0]]))
    # Code 0 has (1, 0); code 1 has (.6, .8) twice and (0, 1). m = ½e + ½Σz.
    torch.testing.assert_close(vq.sums[0], torch.tensor([[1.0, 0.0], [0.6, 1.8]]))
    torch.testing.assert_close(vq.codebook, torch.nn.functional.normalize(vq.sums[0], dim=-1))


def test_statistics_do_not_follow_a_model_to_half_precision():
    vq = EMAVQ(DIM, CODES, codebook_dim=2)
    before = vq.codebook.clone()
    vq.bfloat16()
    assert vq.project_in.weight.dtype == torch.bfloat16
    assert torch.equal(vq.codebook, before) and vq.counts.dtype == torch.float32
    assert vq(torch.randn(20, DIM).bfloat16())[0].dtype == torch.bfloat16
    assert vq.double().codebook.dtype == torch.float64
    assert vq.float().counts.dtype == torch.float32


def test_the_backward_pass_survives_the_update():
    vq = EMAVQ(DIM, CODES, entropy_weight=1.0)
    quantized, _, loss = vq(torch.randn(20, DIM, requires_grad=True))
    (quantized.sum() + loss).backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, "decay must be a number from 0 up, below 1, got 1.0"),
        ({"decay": -0.1}, "decay must be .* got -0.1"),
        ({"eps": 0.0}, "eps must be a finite number above 0, got 0.0"),
        ({"threshold_ema_dead_code": -1}, "threshold_ema_dead_code must be .* got -1"),
        ({"commitment_weight": -1}, "commitment_weight must be .* got -1"),
    ],
    ids=str,
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        EMAVQ(DIM, CODES, **options)
