"""`python -m bench quality`: what each quantizer reaches in one net."""

import sys

import torch

from bench.quality import ENTRIES, METRICS, measure

SETTINGS = {"data": "digits", "data_dir": None, "steps": 2, "seed": 0, "codebook_size": 16}
CPU = torch.device("cpu")


def test_a_row_for_each_metric():
    rows = measure("softvq SoftVQ", SETTINGS, CPU)
    assert [(row["metric"], row["status"]) for row in rows] == [(name, "ok") for name in METRICS]
    assert all((row["rows"], row["codes"], row["dim"]) == (2, 16, 16) for row in rows)
    error, perplexity = (row["p50"] for row in rows)
    assert 0 < error < 1 and 1 <= perplexity <= 16


def test_a_missing_peer_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    name = next(name for name, entry in ENTRIES.items() if entry.peer)
    rows = measure(name, SETTINGS, CPU)
    assert {row["status"] for row in rows} == {"needs vector_quantize_pytorch"}
    assert {row["p50"] for row in rows} == {""}
