"""`python -m bench quality`: what each quantizer reaches in one net."""

import pytest
import torch

from bench import quality

SETTINGS = {"data": "digits", "data_dir": None, "steps": 2, "codebook_size": 16}


def test_a_row_for_each_metric_with_its_spread_over_seeds():
    found = [
        quality.measure("softvq SoftVQ", SETTINGS, seed, torch.device("cpu")) for seed in (0, 1)
    ]
    rows = quality.summary("softvq SoftVQ", SETTINGS, found)
    assert [(row["metric"], row["status"]) for row in rows] == [(x, "ok") for x in quality.METRICS]
    assert all((row["rows"], row["codes"], row["dim"]) == (2, 16, 16) for row in rows)
    for row in rows:
        low, high = sorted(of[row["metric"]] for of in found)
        assert row["p50"] == pytest.approx((low + high) / 2)
        assert low < row["p20"] < row["p50"] < row["p80"] < high
    error, perplexity = (row["p50"] for row in rows)
    assert 0 < error < 1 and 1 <= perplexity <= 16


def test_a_missing_peer_is_named(monkeypatch):
    monkeypatch.setattr(quality, "version", lambda package: "")
    name = next(name for name, entry in quality.ENTRIES.items() if entry.peer)
    rows = quality.summary(
        name, SETTINGS, [quality.measure(name, SETTINGS, 0, torch.device("cpu"))]
    )
    assert {row["status"] for row in rows} == {"not installed"}
    assert all("p50" not in row for row in rows)
