"""The start by k-means, and the draws behind it and behind restarts."""

import pytest
import torch

from softvq.quantizers import EMAVQ, VQ, GumbelVQ, SoftVQ
from softvq.quantizers.draw import draw_latents
from softvq.quantizers.kmeans import kmeans, seed_codes

CENTRES = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0], [9.0, 9.0]])
each = pytest.mark.parametrize("kind", [SoftVQ, VQ, EMAVQ, GumbelVQ])


def clusters(rows=50):
    return CENTRES.repeat(rows, 1) + 0.3 * torch.randn(4 * rows, 2)


def is_at_the_centres(codes, tolerance=0.2):
    order = torch.cdist(CENTRES, codes).argmin(-1)
    return torch.allclose(codes[order], CENTRES, atol=tolerance)


def test_centres_are_found_and_are_means():
    latents = clusters()
    codes = kmeans(latents, 4, 10)
    assert is_at_the_centres(codes)
    nearest = torch.cdist(latents, codes).argmin(-1)
    for k in range(4):
        torch.testing.assert_close(codes[k], latents[nearest == k].mean(0))


def test_one_step_by_hand():
    torch.manual_seed(0)
    latents = torch.tensor([[0.0], [1.0], [10.0], [13.0]])
    codes = kmeans(latents, 2, 5)
    assert sorted(codes.flatten().tolist()) == [0.5, 11.5]


def test_seeds_are_far_apart_latents():
    for seed in range(10):
        torch.manual_seed(seed)
        latents = torch.cat([clusters(500), torch.tensor([[100.0, 100.0]])])
        codes = seed_codes(latents, 5)
        assert all((latents == code).all(-1).any() for code in codes)
        assert (codes == 100).all(-1).any()  # squared distance: it is nearly sure to be drawn


def test_spherical_centres_have_length_one():
    latents = torch.nn.functional.normalize(torch.randn(200, 3), dim=-1)
    codes = kmeans(latents, 5, 10, spherical=True)
    torch.testing.assert_close(codes.norm(dim=-1), torch.ones(5))


@pytest.mark.parametrize("spherical", [False, True])
def test_fewer_latents_than_codes(spherical):
    """The others lie around them, each in a place of its own: equal codes would stay equal."""
    latents = torch.tensor([[0.0, 10.0], [30.0, 0.0]])
    latents = torch.nn.functional.normalize(latents, dim=-1) if spherical else latents
    codes = kmeans(latents, 50, 3, spherical=spherical)
    assert len(codes.unique(dim=0)) == 50
    assert all((codes == latent).all(-1).any() for latent in latents)
    nearest = torch.cdist(latents, codes).argmin(1)
    assert torch.equal(codes[nearest], latents)
    near = torch.cdist(codes, latents).amin(1) / latents.std(0).mean()
    assert near.max() < 0.7
    if spherical:
        torch.testing.assert_close(codes.norm(dim=-1), torch.ones(50))


def test_no_latents_or_all_alike():
    latents = torch.ones(4, 2)
    assert kmeans(latents[:0], 5, 3) is None and kmeans(latents, 5, 3) is None
    assert torch.equal(kmeans(latents, 1, 3), latents[:1])


@each
def test_placement_waits_for_latents_that_differ(kind):
    vq = kind(2, 8, kmeans_init=True)
    vq(torch.ones(20, 2))
    assert not vq.initialised
    vq(clusters())
    assert vq.initialised and len(vq.codebook.unique(dim=0)) == 8


@each
def test_the_first_training_batch_places_the_codes(kind):
    vq = kind(2, 4, kmeans_init=True)
    vq.eval()
    vq(clusters())
    assert not vq.initialised and not is_at_the_centres(vq.codebook)
    vq.train()
    quantized, indices, _ = vq(clusters())
    assert vq.initialised and is_at_the_centres(vq.codebook)
    assert len(indices.unique()) == 4
    if kind is VQ:
        assert torch.equal(quantized, vq.codebook[indices])
    placed = vq.codebook.clone()
    vq(clusters() + 100)
    if kind is not EMAVQ:
        assert torch.equal(vq.codebook, placed)
    assert vq.codebook.max() < 50


@each
def test_a_loaded_checkpoint_is_not_placed_again(kind):
    vq, other = kind(2, 4, kmeans_init=True), kind(2, 4, kmeans_init=True)
    vq(clusters())
    other.load_state_dict(vq.state_dict())
    other.train()(clusters() + 100)
    assert other.codebook.max() < 50
    unplaced = kind(2, 4, kmeans_init=True).state_dict()
    for again in (kind(2, 4, kmeans_init=True), other):
        again.load_state_dict(unplaced)
        again(clusters())
        assert is_at_the_centres(again.codebook)


def test_each_head_has_its_own_start():
    vq = VQ(4, 4, heads=2, separate_codebook_per_head=True, kmeans_init=True)
    vq(torch.cat([clusters(), clusters() - 20], -1))
    assert is_at_the_centres(vq.codebook[0]) and is_at_the_centres(vq.codebook[1] + 20)


def test_running_means_start_with_the_counts_of_their_clusters():
    vq = EMAVQ(2, 4, kmeans_init=True, decay=0.5)
    vq(clusters())
    torch.testing.assert_close(vq.counts, torch.full((1, 4), 50.0))
    spare = EMAVQ(2, 6, kmeans_init=True, decay=0.5)
    spare(clusters(1))
    assert spare.counts.min() == 0.5  # of two codes that nothing chose, which start with 1


def test_draws_are_proportional_to_weights():
    latents, weights = torch.arange(3.0)[:, None], torch.tensor([1.0, 0.0, 3.0])
    drawn = torch.cat([draw_latents(latents, weights, 1)[0] for _ in range(4000)])
    counts = torch.bincount(drawn[:, 0].long(), minlength=3)
    assert counts[1] == 0 and abs(counts[2] - 3000) < 4 * (4000 * 0.25 * 0.75) ** 0.5


def test_draws_are_without_replacement_and_say_when_nothing_is_left():
    latents = torch.arange(3.0)[:, None]
    drawn, exists = draw_latents(latents, torch.tensor([5.0, 0.0, 1.0]), 5)
    assert exists.tolist() == [True, True, True, False, False]
    assert sorted(drawn[:3, 0].tolist()) == [0.0, 1.0, 2.0] and drawn[2, 0] == 1.0
    drawn, exists = draw_latents(latents[:0], torch.zeros(0), 2)
    assert drawn.shape == (2, 1) and not exists.any()
