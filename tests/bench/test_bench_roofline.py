"""The roofline by numbers worked out by hand."""

import pytest

from bench import roofline
from bench.roofline import CARDS, Card, Work, kernel_work, times

CARD = Card("toy", 90, operations=1e3, exponentials=10, instructions=100, bytes=50)


def test_times():
    work = Work(pairs=200, operations=20, exponentials=1, instructions=8, bytes=300)
    found = times(CARD, work)
    assert found == (4.0, 20.0, 16.0, 6.0)
    assert found.bound == "exp"


def test_h200():
    """132 multiprocessors at 1.98 GHz: 16 exponentials and 128 instructions a clock each."""
    card = CARDS["H200"]
    assert card.exponentials == pytest.approx(4.18e12, rel=1e-3)
    assert card.instructions == pytest.approx(33.45e12, rel=1e-3)
    assert card.operations == pytest.approx(132 * 4096 * 1.83e9, rel=1e-3)
    # float32 rates of the data sheets, two operations a clock and core
    for name, cores, rate in (
        *(("A100", 64, 19.5e12), ("H100", 128, 67e12), ("B200", 128, 75e12)),
        *(("RTX 3090", 128, 35.6e12), ("RTX 4090", 128, 82.6e12), ("RTX 5090", 128, 104.8e12)),
    ):
        clocks = CARDS[name].instructions / roofline.ISSUE_PER_CLOCK
        assert 2 * cores * clocks == pytest.approx(rate, rel=0.01)


def test_forward_of_a_million_latents():
    """N = 2²⁰, K = 1024, D = 64, bf16: 4·N·K·D operations at 989.5e12 a second are 0.278 ms."""
    work = kernel_work("forward", "bf16", 2**20, 1024, 64, 10.0)
    assert work.pairs == 2**30
    assert work.operations == 4 * 64
    found = times(CARDS["H200"], work)
    assert found.tensor == pytest.approx(0.2778e-3, rel=1e-3)
    assert found.exp == pytest.approx(2**30 / (132 * 1.98e9 * 16), rel=1e-3)
    assert found.issue == pytest.approx(0.321e-3, rel=1e-2)
    assert found.memory == pytest.approx(2 * 64 * (2 * 2**20 + 1024) / 4.8e12, rel=1e-3)
    assert found.bound == "issue"


@pytest.mark.parametrize(
    ("kernel", "inputs", "products"),
    [
        ("row_gradients", "bf16", 3),
        ("code_sweep", "fp16", 4),
        ("usage", "bf16", 1),
        ("forward", "bf16/fp32", 3),
        ("forward", "fp32 highest", 6),
        ("forward", "fp32 high", 4),
        ("nearest", "fp32 highest", 3),
    ],
)
def test_products(kernel, inputs, products):
    work = kernel_work(kernel, inputs, 100, 100, 64, 1.0)
    assert work.operations == 2 * 64 * products
    assert work.exponentials == (kernel != "nearest")


def test_a_part_has_whole_scores_and_its_share_of_the_output():
    for kernel, products in (("forward", 4.5), ("row_gradients", 7.5), ("code_sweep", 9)):
        work = kernel_work(kernel, "fp32 highest", 1, 1, 256, 1.0, parts=2)
        assert work.operations == 2 * 256 * products


def test_dimensions_are_padded():
    assert kernel_work("forward", "bf16", 1, 1, 5, 1.0).operations == 4 * 16
    assert kernel_work("forward", "bf16", 1, 1, 65, 1.0).operations == 4 * 128
