"""`bench check` is green for what works and red for what does not."""

import pytest
import torch

from bench import accuracy, check, op
from bench.candidates import Setting
from softvq.kernels import streaming

CPU = torch.device("cpu")


@pytest.fixture
def few(monkeypatch):
    """Two small cases, and no comparison of the candidates."""
    small = {"dim": 8, "codes": 20, "rows": 30}
    cases = [check.Case(**small), check.Case(torch.bfloat16, **small)]
    monkeypatch.setattr(check, "cases", lambda *_, **__: cases)
    monkeypatch.setattr(accuracy, "TEMPERATURES", (1.0,))


def run(tmp_path) -> int:
    return check.main(["--quick", "--device", "cpu", "--out", str(tmp_path)])


def test_green(few, tmp_path, results, capsys):
    assert run(tmp_path) == 0
    rows = results.current("check")
    assert len(rows) == 2 * 7 and {row["status"] for row in rows} == {"ok"}
    assert all(float(row["p50"]) <= float(row["allowed"]) for row in rows)
    assert {row["metric"] for row in rows} >= {"quantized", "usage", "grad temperature"}
    assert "14 bounds, 0 broken" in capsys.readouterr().out


def test_the_fused_kernels_have_the_same_bounds(few, tmp_path, results):
    pytest.importorskip("triton")
    arguments = ["--quick", "--device", "cpu", "--backend", "triton", "--out", str(tmp_path)]
    assert check.main(arguments) == 0
    rows = results.current("check")
    assert {row["candidate"] for row in rows} == {"softvq triton"}
    assert len(rows) == 2 * 7 and {row["status"] for row in rows} == {"ok"}


@pytest.mark.parametrize("spoilt", [lambda x: x * 1.001, lambda x: x * torch.nan])
def test_a_broken_operator_is_red_and_stops_the_speed_commands(
    few, tmp_path, results, capsys, monkeypatch, spoilt
):
    right = streaming.soft_backward

    def wrong(*args, **options):
        z, codebook, temperature = right(*args, **options)
        return z, spoilt(codebook), temperature

    monkeypatch.setattr(streaming, "soft_backward", wrong)
    assert run(tmp_path) == 1
    broken = {row["metric"] for row in results.read("check") if row["status"] == "broken"}
    assert broken == {"grad codebook"}
    assert op.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "red" in capsys.readouterr().out
    assert not results.read("op")


def test_speed_needs_a_check_of_this_very_code(few, results, monkeypatch):
    assert check.require_green(results, CPU)
    (first, *_) = results.read("check")
    assert first["softvq"] == results.environment["softvq"]
    monkeypatch.setitem(results.environment, "softvq", "changed")
    assert not results.current("check")
    assert check.require_green(results, CPU)
    assert results.current("check")


def test_what_the_tests_do_not_bound_is_shown_but_not_judged():
    assert not check.bounded(check.Case(torch.bfloat16, offset=10.0))
    assert check.bounded(check.Case(offset=10.0)) and check.bounded(check.Case(torch.bfloat16))
    assert check.judged(1.0, None) == {"status": "no bound"}


def test_accuracy_of_every_candidate_that_runs_here(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    rows = accuracy.compare(Setting(CPU, 64, 32, 8, temperature=0.1), quick=False)
    found = {}
    for row in rows:
        found.setdefault(row["candidate"], {})[row.get("metric")] = row.get("p50")
    for name in ("eager", "eager, chunked", "attention, flash", "attention, math", "softvq"):
        for metric in ("quantized", "grad z", "grad codebook"):
            assert 0 < found[name][f"error of {metric}"] < 1e-4, (name, metric)
    assert found["softvq"]["wrong indices"] == found["cdist"]["wrong indices"] == 0
    assert found["softvq"]["error of log-partition"] < 1e-4


def test_attention_in_16_bits_needs_its_split_bias(monkeypatch):
    from bench import peers

    setting = Setting(CPU, 64, 32, 16, torch.bfloat16, 0.1)

    def error() -> float:
        rows = accuracy.compare(setting, quick=False)
        return next(
            row["p50"]
            for row in rows
            if (row["candidate"], row.get("metric")) == ("attention, math", "error of quantized")
        )

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    split = error()
    whole = peers.split_bias
    monkeypatch.setattr(
        peers,
        "split_bias",
        lambda codebook, columns: torch.cat(
            [whole(codebook, 1), codebook.new_zeros(len(codebook), columns - 1)], 1
        ),
    )
    assert split < 0.02 < error()
