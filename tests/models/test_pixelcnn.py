"""The autoregressive prior: what it sees, that it is a distribution, that samples follow it."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from softvq.models import CodeLevel, CodePrior, PixelCNN
from softvq.models.masked import GatedLayer
from softvq.models.pixelcnn import CoarseCodes

GRIDS = [(1, 1), (1, 5), (5, 1), (7, 7), (4, 6)]


def lively(network):
    """Random weights everywhere, so that everything the network can see changes its logits."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.4)
    return network.double().eval()


def tiny(**options):
    return lively(PixelCNN(2, width=4, layers=2, **options))


def all_codes(grid, codebook_size=2):
    """Every grid of codes there is, (K^(hw), h, w)."""
    values = itertools.product(range(codebook_size), repeat=math.prod(grid))
    return torch.tensor(list(values)).view(-1, *grid)


def positions_seen(network, grid):
    """(h·w, h·w) bool: whether the logits of a row's position have a gradient on a column's."""
    embedded = []
    network.embedding.register_forward_hook(
        lambda module, inputs, output: embedded.append(output.requires_grad_()) or output
    )
    logits = network(torch.randint(network.codebook_size, (1, *grid)))
    seen = []
    for position in logits.flatten(0, 2):
        gradients = torch.autograd.grad(position.square().sum(), embedded, retain_graph=True)
        seen.append(gradients[0].abs().sum(-1).flatten() > 0)
    return torch.stack(seen)


@pytest.mark.parametrize("grid", GRIDS)
def test_sees_every_code_before_and_none_after(grid):
    # The shift and five layers of kernel 3 reach six rows down, a sixth the sixth column too.
    network = lively(PixelCNN(5, width=6, layers=6))
    before = torch.ones(math.prod(grid), math.prod(grid)).tril(-1).bool()
    assert torch.equal(positions_seen(network, grid), before)


def test_one_layer_of_kernel_5_sees_its_neighbourhood():
    seen = positions_seen(lively(PixelCNN(5, width=6, layers=1, kernel=5)), (7, 7))
    neighbourhood = torch.zeros(7, 7, dtype=torch.bool)
    neighbourhood[1:4, 1:6] = True  # the shifted row above and two more, two columns to each side
    neighbourhood[4, 0:3] = True  # the shifted column to the left and two more
    assert torch.equal(seen.view(7, 7, 7, 7)[4, 3], neighbourhood)


@pytest.mark.parametrize("kernel", [3, 5])
def test_gated_layer_is_equation_4_with_masked_kernels(kernel):
    """tanh(W_f ∗ x + V_f h) ⊙ σ(W_g ∗ x + V_g h), W being whole kernels with zeros below."""
    layer = lively(GatedLayer(3, kernel, context=True, dropout=0.5))
    middle = kernel // 2
    vertical, horizontal = torch.zeros(2, 6, 3, kernel, kernel, dtype=torch.float64)
    vertical[:, :, : middle + 1] = layer.vertical.weight.detach()
    horizontal[:, :, middle, : middle + 1] = layer.horizontal.weight.detach()[:, :, 0]
    x, y, context = torch.randn(3, 2, 3, 4, 5, dtype=torch.float64)
    projected = torch.einsum("oc,bchw->bohw", layer.context.weight.detach()[..., 0, 0], context)

    def gates(features):
        return features[:, :3].tanh() * features[:, 3:].sigmoid()

    seen = F.conv2d(x, vertical, layer.vertical.bias, padding=middle)
    new_x, above = layer.down(x, context)
    torch.testing.assert_close(new_x, gates(seen + projected[:, :6]))
    row = F.conv2d(y, horizontal, layer.horizontal.bias, padding=middle)
    output = layer.residual[1](gates(row + layer.across(seen) + projected[:, 6:]))
    torch.testing.assert_close(layer.right(y, above), y + output)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("codebook_size", [1, 5])
def test_shapes(grid, codebook_size):
    network = PixelCNN(codebook_size, classes=3, condition_size=4, width=4, layers=2)
    labels, condition = torch.tensor([0, -1]), torch.randint(4, (2, 2, 3))
    codes = network.sample(2, grid, labels, condition)
    assert codes.shape == (2, *grid) and codes.dtype == torch.int64
    assert network(codes, labels, condition).shape == (2, *grid, codebook_size)
    assert network.log_likelihood(codes, labels, condition).shape == (2,)


def test_untrained_prior_is_uniform():
    prior = CodePrior({"codes": CodeLevel((3, 2), 8)}, classes=2, width=4, layers=2)
    codes = {"codes": torch.randint(8, (5, 3, 2))}
    losses = prior(codes, torch.tensor([0, 1, -1, 0, 1]))
    assert set(losses) == {"loss", "bits_per_latent"}
    assert losses["bits_per_latent"].item() == pytest.approx(3)
    assert losses["loss"].item() == pytest.approx(math.log(8))
    expected = torch.full((5,), -6 * math.log(8))
    torch.testing.assert_close(prior.log_likelihood(codes), expected)


def test_every_level_has_the_options_of_the_prior():
    levels = {"top": CodeLevel((1, 2), 3), "bottom": CodeLevel((2, 4), 5)}
    prior = CodePrior(levels, classes=4, width=6, layers=2, kernel=5, dropout=0.3)
    for network in prior.networks.values():
        assert network.classes.weight.shape == (4 + 1, 6) and len(network.layers) == 2
        for layer in network.layers:
            assert layer.vertical.kernel_size == (3, 5) and layer.residual[0].p == 0.3


@pytest.mark.parametrize("label", [None, -1, 0, 1])
def test_probabilities_of_all_grids_sum_to_one(label):
    codes = all_codes((2, 2))
    labels = None if label is None else torch.full((16,), label)
    log_likelihood = tiny(classes=2).log_likelihood(codes, labels)
    assert log_likelihood.exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert log_likelihood.std() > 0.1


def test_probabilities_of_all_grids_of_both_levels_sum_to_one():
    prior = lively(CodePrior({"top": CodeLevel((1, 2), 2), "bottom": CodeLevel((2, 2), 2)}))
    top, bottom = all_codes((1, 2)), all_codes((2, 2))
    codes = {"top": top.repeat_interleave(16, 0), "bottom": bottom.repeat(4, 1, 1)}
    log_likelihood = prior.log_likelihood(codes)
    assert log_likelihood.exp().sum().item() == pytest.approx(1, abs=1e-12)
    losses = prior(codes)
    torch.testing.assert_close(losses["loss"], -log_likelihood.mean() / 6)
    mean_bits = (2 * losses["bits_per_latent_top"] + 4 * losses["bits_per_latent_bottom"]) / 6
    torch.testing.assert_close(losses["bits_per_latent"], mean_bits)


def test_class_changes_the_logits_and_none_is_unknown():
    network = lively(PixelCNN(3, classes=2, width=16, layers=1))
    nn.init.zeros_(network.classes.weight[0])
    codes = torch.randint(3, (1, 3, 3))
    unknown, first, second = (network(codes, torch.tensor([label])) for label in (-1, 0, 1))
    assert torch.equal(network(codes), unknown)
    assert (first != second).all() and (first != unknown).all()


def test_unknown_class_keeps_its_zero_embedding():
    network = PixelCNN(3, classes=2, width=4, layers=1)
    nn.init.normal_(network.head[-1].weight)
    codes = torch.randint(3, (4, 3, 3))
    network.log_likelihood(codes, torch.tensor([-1, 0, -1, 1])).sum().backward()
    assert network.classes.weight[0].count_nonzero() == 0
    assert network.classes.weight.grad.abs().sum(1).gt(0).tolist() == [False, True, True]


@pytest.mark.parametrize("grid", [(4, 4), (5, 3)])
def test_coarse_codes_are_seen_from_everywhere(grid):
    network = lively(PixelCNN(3, condition_size=4, width=6, layers=1))
    embedded = []
    network.condition.embedding.register_forward_hook(
        lambda module, inputs, output: embedded.append(output)
    )
    logits = network(torch.randint(3, (1, *grid)), condition=torch.randint(4, (1, 2, 2)))
    for position in logits.flatten(0, 2):
        gradient = torch.autograd.grad(position.sum(), embedded, retain_graph=True)[0]
        assert (gradient.abs().sum(-1) > 0).all()


def test_coarse_codes_reach_the_positions_they_cover():
    coarse = CoarseCodes(5, width=4)
    for block in coarse.blocks:
        nn.init.zeros_(block[-1].weight)
        nn.init.zeros_(block[-1].bias)
    indices = torch.tensor([[[0, 1, 2], [3, 4, 0]]])
    expected = coarse.embedding(indices.repeat_interleave(2, 1).repeat_interleave(3, 2))
    torch.testing.assert_close(coarse(indices, (4, 9)).permute(0, 2, 3, 1), expected)


def test_condition_that_is_missing_or_too_much():
    codes = torch.zeros(1, 2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="needs condition"):
        PixelCNN(3, condition_size=4, width=4, layers=1)(codes)
    with pytest.raises(ValueError, match="takes no condition"):
        PixelCNN(3, width=4, layers=1)(codes, condition=codes)


@pytest.mark.parametrize(
    ("condition", "error", "message"),
    [
        (torch.full((1, 1, 1), 4), ValueError, r"condition must lie in \[0, 4\)"),
        (torch.zeros(1, 1, 1), TypeError, "condition must be a tensor of torch.int64"),
        (torch.zeros(2, 1, 1, dtype=torch.int64), ValueError, r"must be \(1, h', w'\), got"),
        (torch.zeros(1, 1, dtype=torch.int64), ValueError, r"must be \(1, h', w'\), got"),
    ],
    ids=str,
)
def test_condition_that_is_none(condition, error, message):
    codes = torch.zeros(1, 2, 2, dtype=torch.int64)
    with pytest.raises(error, match=message):
        PixelCNN(3, condition_size=4, width=4, layers=1)(codes, condition=condition)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_codes_of_any_integers(dtype):
    prior = CodePrior({"codes": CodeLevel((2, 2), 3)}, width=4, layers=1)
    codes = torch.randint(3, (4, 2, 2))
    assert torch.equal(prior({"codes": codes.to(dtype)})["loss"], prior({"codes": codes})["loss"])


def test_codes_of_several_heads_are_refused():
    prior = CodePrior({"codes": CodeLevel((2, 2), 3)}, width=4, layers=1)
    with pytest.raises(ValueError, match=r"\(B, h, w\), of one head, got \(1, 2, 2, 5\)"):
        prior({"codes": torch.zeros(1, 2, 2, 5, dtype=torch.int64)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_converted_prior_rounds_no_likelihood(dtype):
    """A sum over many codes would lose more than the network's own rounding."""
    prior = PixelCNN(16, width=8).to(dtype)  # untrained: uniform, and exactly so
    codes = torch.randint(16, (2, 15, 15))
    likelihood = prior.log_likelihood(codes)
    torch.testing.assert_close(likelihood, torch.full((2,), -225 * math.log(16)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codebook_size": 0}, "codebook_size must be at least 1, got 0"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"layers": -1}, "layers must be at least 0, got -1"),
        ({"classes": -1}, "classes must be at least 0, got -1"),
        ({"condition_size": -1}, "condition_size must be at least 0, got -1"),
    ],
    ids=str,
)
def test_sizes_of_no_prior_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PixelCNN(**{"codebook_size": 3} | options)


@pytest.mark.parametrize("kernel", [1, 4, -3])
def test_kernel_that_has_no_middle(kernel):
    with pytest.raises(ValueError, match=f"odd and at least 3, got {kernel}"):
        PixelCNN(3, kernel=kernel)


@pytest.mark.parametrize("temperature", [0, -1, math.inf, math.nan])
def test_temperature_that_is_none(temperature):
    with pytest.raises(ValueError, match="above 0"):
        PixelCNN(3, width=4, layers=1).sample(1, (2, 2), temperature=temperature)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_probabilities(temperature):
    """χ² of 4,000 samples over the 2⁴ grids; 15 degrees of freedom pass 37.7 once in a thousand."""
    network, count = tiny(classes=2), 4000
    labels = torch.ones(count, dtype=torch.int64)
    codes = all_codes((2, 2))
    samples = network.sample(
        count,
        (2, 2),
        labels,
        temperature=temperature,
        generator=torch.Generator().manual_seed(0),
    )
    logits = network(codes, labels[:16]) / temperature
    chosen = logits.log_softmax(-1).gather(-1, codes[..., None]).sum((1, 2, 3))
    expected = chosen.exp() * count
    weights = torch.tensor([[8, 4], [2, 1]])
    observed = (samples * weights).sum((1, 2)).bincount(minlength=16)
    assert ((observed - expected).square() / expected).sum() < 37.7
    assert expected.std() > 30  # far from uniform, where any χ² would pass


@pytest.mark.parametrize("grid", GRIDS)
def test_row_by_row_samples_are_those_of_the_whole_network(grid):
    """The same draws from logits of the whole grid, position by position, with all context."""
    network = lively(PixelCNN(5, classes=3, condition_size=4, width=6, layers=3))
    labels, condition = torch.tensor([0, 2, -1]), torch.randint(4, (3, 3, 2))
    sampled = network.sample(3, grid, labels, condition, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    codes = torch.zeros_like(sampled)
    for i, j in itertools.product(*map(range, grid)):
        probabilities = network(codes, labels, condition)[:, i, j].softmax(-1)
        codes[:, i, j] = probabilities.multinomial(1, generator=generator)[:, 0]
    assert torch.equal(sampled, codes)


def test_hierarchy_samples_each_level_given_the_one_before():
    levels = {"top": CodeLevel((2, 2), 3), "middle": CodeLevel((3, 3), 4)}
    prior = lively(CodePrior(levels | {"bottom": CodeLevel((5, 4), 6)}, width=4, layers=2))

    def draw(seed):
        return prior.sample(7, generator=torch.Generator().manual_seed(seed))

    codes = draw(0)
    assert {name: grid.shape for name, grid in codes.items()} == {
        "top": (7, 2, 2),
        "middle": (7, 3, 3),
        "bottom": (7, 5, 4),
    }
    assert all(torch.equal(codes[name], draw(0)[name]) for name in codes)
    assert not torch.equal(codes["bottom"], draw(1)["bottom"])
    total = sum(
        prior.networks[name].log_likelihood(codes[name], condition=condition)
        for name, condition in (
            ("top", None),
            ("middle", codes["top"]),
            ("bottom", codes["middle"]),
        )
    )
    torch.testing.assert_close(prior.log_likelihood(codes), total)


def train_prior(prior, codes, labels=None, steps=150, batch_size=64):
    optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    prior.train()
    for _ in range(steps):
        rows = torch.randint(len(codes), (batch_size,))
        loss = prior({"codes": codes[rows]}, None if labels is None else labels[rows])["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    prior.eval()


def test_learns_a_markov_chain_to_its_entropy_rate():
    """Each code repeats the one above it with probability 0.9, else one of the 3 others."""
    count, rows, columns, size = 4000, 5, 3, 4
    codes = torch.randint(size, (count, rows, columns))
    for i in range(1, rows):
        jump = torch.randint(1, size, (count, columns))
        stays = torch.rand(count, columns) < 0.9
        codes[:, i] = (codes[:, i - 1] + jump.masked_fill(stays, 0)) % size
    rate = -0.9 * math.log2(0.9) - 0.1 * math.log2(0.1 / 3)
    entropy = (columns * 2 + (rows - 1) * columns * rate) / (rows * columns)
    prior = CodePrior({"codes": CodeLevel((rows, columns), size)}, width=16, layers=2, dropout=0)
    train_prior(prior, codes[:3000])
    with torch.no_grad():
        bits = prior({"codes": codes[3000:]})["bits_per_latent"].item()
    # The standard error of the mean of 15,000 positions is 0.01 bits.
    assert entropy - 0.03 < bits < entropy + 0.06


def test_learns_the_class():
    """Codes that are the label and nothing else: known, they cost nothing."""
    labels = torch.arange(200) % 4
    codes = labels[:, None, None].expand(-1, 1, 1)
    prior = CodePrior({"codes": CodeLevel((1, 1), 4)}, classes=4, width=8, layers=1, dropout=0)
    train_prior(prior, codes, labels)
    with torch.no_grad():
        assert prior({"codes": codes}, labels)["bits_per_latent"] < 0.05
        assert prior({"codes": codes})["bits_per_latent"] > 1.9
    assert torch.equal(prior.sample(200, labels, temperature=0.5)["codes"], codes)
