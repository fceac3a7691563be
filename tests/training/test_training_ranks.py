"""Training on two ranks: what one would have done, the same bits on both, stopped and resumed."""

import itertools
from pathlib import Path

import pytest
import torch

from softvq.training import ranks
from softvq.training.families import MODELS
from softvq.training.settings import ConfigError
from softvq.training.trainer import batches
from tests.launch import RANKS, launch
from tests.runs import metrics_of
from tests.training.rank_worker import (
    BUSY,
    EQUAL,
    LONG,
    OTHERS,
    STOPPED_AT,
    after_step,
    precisely,
    state_of,
    stop,
    trained,
)

GROUPS = len(EQUAL) + len(LONG) + len(OTHERS) + 8


@pytest.fixture(scope="module")
def pair(tiny_run, tmp_path_factory):
    """The folder that two ranks left, the results of each, and how they ended."""
    folder = tmp_path_factory.mktemp("pair")
    with after_step(STOPPED_AT, stop):
        trained(BUSY, folder / "alone")
    worker = Path(__file__).with_name("rank_worker.py")
    done = launch(worker, folder, tiny_run, groups=GROUPS)
    results = [folder / f"{rank}.pt" for rank in range(RANKS)]
    assert all(path.exists() for path in results), [process.stderr for process in done]
    return folder, [torch.load(path) for path in results], done


def tensors(state, path=()):
    """Every number and tensor of a nested state, with where it is."""
    if isinstance(state, dict):
        for name, value in state.items():
            yield from tensors(value, (*path, name))
    elif isinstance(state, list | tuple):
        yield from tensors(dict(enumerate(state)), path)
    else:
        yield path, state


def same(one, other):
    return all(
        a == b and (torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y)
        for (a, x), (b, y) in zip(tensors(one), tensors(other), strict=True)
    )


@pytest.mark.parametrize("name", EQUAL)
def test_two_ranks_train_as_one(pair, name, tmp_path):
    folder, (results, _), _ = pair
    # In float64: biases before a batch norm have no gradient but rounding errors, and AdamW makes
    # whole steps of those of float32.
    with precisely():
        alone = state_of(trained(EQUAL[name], tmp_path / "one"))
    for key, value in alone["model"].items():
        torch.testing.assert_close(results[name]["model"][key], value, rtol=1e-5, atol=1e-6)
    ours, theirs = metrics_of(folder / name), metrics_of(tmp_path / "one")
    for line, other in zip(ours, theirs, strict=True):
        assert (line.pop("step"), line.pop("split")) == (other.pop("step"), other.pop("split"))
        assert line == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("name", [*EQUAL, *LONG, *OTHERS, "pixelcnn", "whole", "resumed"])
def test_both_ranks_hold_the_same_bits(pair, name):
    _, (one, other), _ = pair
    assert same(one[name], other[name])


def test_every_model_was_tried():
    tried = {config.model for config in (EQUAL | LONG | OTHERS).values()} | {"pixelcnn"}
    assert tried == set(MODELS)


@pytest.mark.parametrize("name", LONG)
def test_codes_were_restarted_on_the_way(pair, name):
    _, (results, _), _ = pair
    assert results[name]["step"] == 200 and results[name]["restarted"] > 0


def test_metrics_of_a_split_are_the_bits_of_one_process(pair):
    _, results, _ = pair
    for found in results:
        assert same(found["together"], found["alone"])


def test_a_signal_to_one_rank_stops_both_and_resume_goes_on_exactly(pair):
    folder, (one, other), _ = pair
    assert one["stopped"]["step"] == other["stopped"]["step"] == STOPPED_AT
    assert same(one["resumed"] | {"restarted": one["whole"]["restarted"]}, one["whole"])
    parts, whole = folder / "parts", folder / "whole"
    assert metrics_of(parts) == metrics_of(whole)
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_resume_with_another_number_of_ranks(pair):
    folder, (results, _), _ = pair
    assert results["more ranks"]["step"] == 12
    fewer = trained(BUSY, folder / "fewer", resume=True)
    assert fewer.progress.step == 12
    for path in (folder / "alone", folder / "fewer"):
        steps = [(line["step"], line["split"]) for line in metrics_of(path)]
        assert steps == list(itertools.product((10, 12), ("train", "validation")))


def test_only_the_first_rank_writes(pair):
    folder, _, done = pair
    for name in EQUAL:
        lines = metrics_of(folder / name)
        assert len(lines) == 6
    assert not any(process.stdout for process in done)


def test_a_batch_that_cannot_be_shared_is_an_error(pair):
    folder, results, _ = pair
    for found in results:
        assert found["error"] == "batch_size: 33 images are not divisible by 2 processes"
    assert not (folder / "odd" / "config.toml").exists()


def test_an_error_in_one_rank_ends_both(pair):
    _, _, (first, second) = pair
    assert first.returncode != 0 and second.returncode != 0
    assert "the disk of this rank is on fire" in second.stderr


def test_parts_make_up_the_batches_of_one_process(monkeypatch):
    monkeypatch.setattr(ranks, "count", lambda: 3)
    whole = itertools.islice(batches(images=40, batch_size=12, seed=1, start=0), 5)
    for batch in whole:
        parts = []
        for number in range(3):
            monkeypatch.setattr(ranks, "rank", lambda number=number: number)
            parts.append(ranks.part_of(batch))
        assert [len(part) for part in parts] == [4, 4, 4]
        assert torch.equal(torch.cat(parts), batch)


def test_random_numbers_of_a_step_are_a_ranks_own(monkeypatch):
    drawn = []
    for number, seed, step in itertools.product((1, 2), (0, 1), (0, 1)):
        monkeypatch.setattr(ranks, "rank", lambda number=number: number)
        ranks.seed_step(seed, step, torch.device("cpu"))
        drawn.append(torch.rand(3))
    assert len(torch.stack(drawn).unique(dim=0)) == 8
    monkeypatch.setattr(ranks, "rank", lambda: 0)
    state = torch.get_rng_state()
    ranks.seed_step(0, 0, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)


def test_alone_nothing_is_shared():
    assert (ranks.count(), ranks.rank()) == (1, 0)
    assert ranks.any_rank(True) and not ranks.any_rank(False)
    assert ranks.share_of([1, 2, 3]) == [1, 2, 3]
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
    ranks.start_alike(model)
    assert type(model[0]) is torch.nn.BatchNorm1d
    ranks.check_batch_size(33)


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="process 2 has no GPU, there are 2"):
        ranks._own_gpu()
