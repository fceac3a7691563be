"""Autotuning without a card: times are made up, and nothing runs but in the last tests."""

import json
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the fused kernels are written in Triton")

from triton.errors import TritonError

import softvq
from bench.bounds import check, make
from softvq.kernels import fused, tiles, tuning
from softvq.kernels.arithmetic import arithmetic
from softvq.kernels.tuning import agree
from tests.kernels.card import OTHER, SHARED_MEMORY, SHIPPED, choose, new_process

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_off_unless_asked(monkeypatch):
    cuda = torch.device("cuda")
    for value, on in ((None, False), ("0", False), ("1", True)):
        tuning._on.cache_clear()
        monkeypatch.delenv("SOFTVQ_AUTOTUNE", raising=False)
        if value:
            monkeypatch.setenv("SOFTVQ_AUTOTUNE", value)
        assert tuning.applies(cuda) == on
        assert not tuning.applies(torch.device("cpu"))
    monkeypatch.delenv("SOFTVQ_AUTOTUNE")
    assert tuning.applies(cuda)  # read once
    tuning._on.cache_clear()


def test_off_asks_for_nothing(card, cache, monkeypatch):
    monkeypatch.setattr(tuning, "applies", lambda device: False)
    card.times[OTHER] = 0.1
    assert choose() == SHIPPED
    assert not card.timed and not cache.exists()


def test_no_rows_are_not_timed(card):
    assert choose(rows=0) == SHIPPED and not card.timed


def test_the_fastest_is_remembered_in_the_process_and_on_disk(card, cache):
    card.times[OTHER] = 0.5
    assert choose() == OTHER
    assert len(set(card.timed)) > 4
    card.timed.clear()
    cache.rename(cache.with_suffix(".away"))
    assert choose() == OTHER and not card.timed  # in the process
    cache.with_suffix(".away").rename(cache)
    new_process()
    card.times.clear()
    assert choose() == OTHER and not card.timed  # on disk
    assert list(json.loads(cache.read_text()).values()) == [list(OTHER)]
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]  # nothing left aside


def test_noise_keeps_the_shipped_tile(card, cache):
    card.times[OTHER] = 0.98
    assert choose() == SHIPPED
    assert list(json.loads(cache.read_text()).values()) == [list(SHIPPED)]  # remembered too
    card.timed.clear()
    assert choose() == SHIPPED and not card.timed
    card.times[OTHER] = 0.96
    assert choose(dim=48) == OTHER


def test_a_tile_that_computes_something_else_is_not_chosen(card):
    second = SHIPPED._replace(codes=SHIPPED.codes // 2)
    card.times |= {OTHER: 0.5, second: 0.6}
    card.wrong.append(OTHER)
    assert choose() == second
    card.wrong.append(second)
    assert choose(dim=48) == SHIPPED


def test_what_agrees():
    q, indices = torch.randn(40, 8), torch.arange(40)
    near, tie, other, nan = q + 1e-3, indices.clone(), q.roll(1, 0), q.clone()
    tie[3], nan[3, 3] = 0, math.nan

    def agrees(found) -> bool:
        memory = q.clone(), None, indices.clone()  # which both runs fill

        def run(tile):
            values = found if tile is OTHER else (q, None, indices)
            for into, value in zip(memory, values, strict=True):
                if into is not None:
                    into.copy_(value)
            return [], memory

        return agree(run, OTHER, SHIPPED)

    assert agrees((q, None, indices)) and agrees((near, None, tie))
    assert not agrees((other, None, indices)) and not agrees((nan, None, indices))
    assert not agrees((q, None, indices.flip(0)))


def test_a_cold_start_keeps_the_shipped_tile(card, monkeypatch):
    """The first of all runs, the shipped tile's, is slow: the card's clock was low."""

    def milliseconds(run, tile):
        card.timed.append(tile)
        return 2.0 if len(card.timed) == 1 else 1.0

    monkeypatch.setattr(tuning, "milliseconds", milliseconds)
    assert choose() == SHIPPED


def test_sizes_share_a_choice_by_buckets(card):
    def times_it(**call) -> bool:
        card.timed.clear()
        choose(**call)
        return bool(card.timed)

    assert times_it(rows=1000)
    assert not times_it(rows=1001)
    assert times_it(rows=1024)
    assert not times_it(rows=16383)
    assert times_it(rows=16384)
    assert not times_it(rows=10**9)
    assert not times_it(rows=8192, heads=2)
    assert times_it(rows=8192, heads=2, dim=16)  # as 16,384: programs are what fills a card
    assert not times_it(rows=16384, dim=16)
    assert times_it(rows=8192, dim=16)
    assert times_it(codes=128)
    assert not times_it(codes=896)  # with 1024
    assert times_it(codes=1152)
    # What is compiled differently is timed by itself.
    assert times_it(dim=48)
    assert times_it(variant=False)
    assert times_it(kernel="row_gradients")
    assert times_it(dtype=torch.float16, how=arithmetic(torch.float16, torch.float16, "highest"))
    assert times_it(how=arithmetic(torch.bfloat16, torch.float32, "highest"))


def test_a_capture_is_never_timed(card, cache):
    card.times[OTHER], card.capturing = 0.5, True
    assert choose() == SHIPPED
    assert not card.timed and not cache.exists()
    card.capturing = False
    assert choose() == OTHER
    card.timed.clear()
    card.capturing = True
    assert choose() == OTHER and not card.timed


def test_nothing_that_runs_leaves_the_shipped_tile(card, cache):
    card.times = {tile: math.inf for tile in tiles.neighbours("forward", "bfloat16", 64, SHIPPED,
                                                              SHARED_MEMORY)}  # fmt: skip
    assert choose() == SHIPPED
    assert not cache.exists()  # memory may only have been short


def test_what_spills_or_fails_takes_forever(monkeypatch):
    monkeypatch.setattr("triton.testing.do_bench", lambda run, **_: run() and 0.25)

    def run(tile, spills=0, error=None):
        if error:
            raise error
        return [SimpleNamespace(n_spills=0), SimpleNamespace(n_spills=spills)], "result"

    assert tuning.milliseconds(run, SHIPPED) == 0.25
    assert tuning.milliseconds(partial(run, spills=8), SHIPPED) == math.inf
    for error in (TritonError(), RuntimeError("PassManager::run failed"),
                  torch.OutOfMemoryError()):  # fmt: skip
        assert tuning.milliseconds(partial(run, error=error), SHIPPED) == math.inf


@pytest.fixture
def smallest(card, monkeypatch):
    """The smallest tile wins; every candidate runs."""

    def milliseconds(run, tile):
        assert torch._guards.detect_fake_mode() is None and not torch.compiler.is_compiling()
        run(tile)
        return tile.rows * tile.codes

    monkeypatch.setattr(tuning, "milliseconds", milliseconds)
    monkeypatch.setattr(tuning, "agree", agree)


def test_results_do_not_depend_on_what_was_timed(smallest, cache):
    check(fused, lambda: make(1, 40, 40, 12, device=DEVICE), draws=1)
    z, codebook, _ = make(1, 40, 40, 12, device=DEVICE)
    nearest = torch.cdist(z.double(), codebook.double()).argmin(2)
    assert torch.equal(fused.nearest(z, codebook), nearest)
    tuned = json.loads(cache.read_text())
    for kernel in ("forward", "row_gradients, all", "code_sweep, all", "nearest"):
        assert any(f": {kernel} D=12" in key for key in tuned), kernel


def test_tracing_times_nothing(smallest):
    """The operators are opaque to torch.compile: what it traces is not what runs."""

    def loss(z, codebook):
        out = softvq.soft_quantize(z, codebook, 0.5, backend="triton")
        return out.quantized.square().sum() + out.entropy.sum()

    results = []
    for function in (torch.compile(loss, fullgraph=True, backend="aot_eager"), loss):
        torch.manual_seed(0)
        z = torch.randn(40, 12, device=DEVICE, requires_grad=True)
        codebook = torch.randn(30, 12, device=DEVICE, requires_grad=True)
        value = function(z, codebook)
        results.append((value, *torch.autograd.grad(value, (z, codebook))))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
