"""The trainer's loop beside a plain one, on tiny sizes."""

import pytest
import torch

from bench import trainer
from bench.trainer import GRID, Setting, configuration, ours, plain
from softvq.training.build import build_data
from softvq.training.images import ImageTask


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(trainer, "BATCH", 8)
    monkeypatch.setattr(trainer, "CODES", 16)


def test_its_rows(tmp_path, results, capsys):
    assert trainer.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    rows = results.read("trainer")
    loops = {row["candidate"]: row for row in rows if not row["pass"]}
    assert set(loops) == {"softvq train", "plain PyTorch"}
    assert float(loops["plain PyTorch"]["times_eager"]) == 1
    ours = loops["softvq train"]
    ratio = float(ours["p50"]) / float(loops["plain PyTorch"]["p50"])
    assert float(ours["times_eager"]) == pytest.approx(ratio, rel=1e-2)
    parts = {row["pass"]: float(row["p50"]) for row in rows if row["pass"]}
    assert set(parts) == {"net", "quantizer", "rest"}
    whole = 8 / float(ours["p50"])
    assert sum(parts.values()) == pytest.approx(whole, rel=1e-2)
    assert "softvq train" in capsys.readouterr().out


def test_both_loops_train_the_same_net():
    """From the same weights; the plain one with the N×K matrix."""
    config = configuration(Setting(torch.device("cpu"), "digits", None, 1, 1))
    data = build_data(config)
    config = config.resolved(len(data.train), data.image_shape)
    assert config.latent_grid == str(GRID)
    tasks = []
    for build in (ours, plain):
        torch.manual_seed(0)
        tasks.append(ImageTask(config, data, torch.device("cpu")))
        first = {name: p.clone() for name, p in tasks[-1].model.named_parameters()}
        build(config, tasks[-1])(2)
        moved = [name for name, p in tasks[-1].model.named_parameters() if p.ne(first[name]).any()]
        assert len(moved) == len(first)
    one, other = (dict(task.model.named_parameters()) for task in tasks)
    assert {name: p.shape for name, p in one.items()} == {n: p.shape for n, p in other.items()}
    assert type(tasks[1].model.quantizer) is trainer.EagerSoftVQ


def test_each_forward_of_a_part_makes_its_own_copies_of_the_weights(monkeypatch):
    """Those of bfloat16 that autocast keeps, which a CUDA graph must not have from another."""
    made = []

    class Watched(torch.autocast):
        def __init__(self, device_type, dtype=None, enabled=True):
            super().__init__(device_type, dtype, enabled)
            if dtype is not None:  # the operator switches it off and gives none
                made.append(dtype)

    config = configuration(Setting(torch.device("cpu"), "digits", None, 1, 1))
    data = build_data(config)
    config = config.resolved(len(data.train), data.image_shape)
    monkeypatch.setattr(torch, "autocast", Watched)
    for run in trainer.parts(config, ImageTask(config, data, torch.device("cpu"))).values():
        made.clear()
        run(3)
        assert made == 3 * [torch.bfloat16]
