"""The speed commands on tiny sizes: their rows, and candidates that are missing or fail."""

import time
from types import SimpleNamespace

import pytest
import torch

from bench import candidates, check, hard, limits, measure, memory, op, step
from bench.candidates import Candidate, Outputs, Setting
from bench.results import COLUMNS

CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Arguments for a tiny run: no compilation, no process for memory, a check that has passed."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(op, "settings", lambda *_: SETTINGS)
    for module in (op, step, memory):
        monkeypatch.setattr(module, "peak_bytes", lambda *given: 10**6 + 1000 * given[-1].codes)
        monkeypatch.setattr(module, "require_green", lambda *_: True)
        monkeypatch.setattr(module, "free", lambda: None)
    monkeypatch.setattr(limits, "TURNS", 1)
    monkeypatch.setattr(op, "bounded_memory", lambda: None)
    monkeypatch.setattr(step, "bounded_memory", lambda: None)
    return ["--quick", "--device", "cpu", "--out", str(tmp_path)]


SETTINGS = [("soft", Setting(CPU, 64, 32, 64)), ("hard", Setting(CPU, 64, 32, 64))]


def test_op(quick, results, capsys):
    assert op.main(quick) == 0
    rows = results.read("op")
    assert tuple(rows[0]) == COLUMNS
    ours = {row["pass"]: row for row in rows if row["candidate"] == "softvq"}
    assert set(ours) == {"forward", "backward", "both"}
    whole = ours["both"]
    assert 0 < float(whole["p20"]) <= float(whole["p50"]) <= float(whole["p80"])
    assert float(whole["percent_matmul"]) > 0 and float(whole["percent_exp"]) > 0
    assert whole["extra_bytes"] == str(10**6 + 32_000 - 4 * 64 * (2 * 64 + 32))
    for name in ("device", "threads", "torch", "softvq", "date", "line", "version"):
        assert whole[name], name
    eager = next(r for r in rows if (r["candidate"], r["pass"]) == ("eager", "both"))
    assert float(eager["times_eager"]) == 1
    expected = float(eager["p50"]) / float(whole["p50"])
    assert float(whole["times_eager"]) == pytest.approx(expected, rel=0.01)
    printed = capsys.readouterr().out
    assert all(row["candidate"] in printed for row in rows)
    assert {row["metric"] for row in results.read("limits")} == {"matmul", "copy", "exp"}


def test_percent_of_a_limit_is_its_time_over_the_time_taken():
    setting = Setting(CPU, 100, 50, 10)
    rates = [
        {"metric": "matmul", "dtype": "float32", "p50": 1e6},
        {"metric": "matmul", "dtype": "bfloat16", "p50": 9e9},
        {"metric": "copy", "dtype": "", "p50": 2e5},
        {"metric": "exp", "dtype": "float32", "p50": 1e5},
    ]
    forward = limits.percents(setting, "forward", 0.5, rates)
    # 4·N·K·D = 200,000 operations; z, q and C are 4·10·(2·100 + 50) bytes; 5000 exponentials
    assert forward == {"percent_matmul": 40, "percent_copy": 10, "percent_exp": 10}
    assert limits.percents(setting, "backward", 0.5, rates)["percent_matmul"] == 100


def test_candidates_of_a_gpu(monkeypatch):
    processors = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: processors)
    setting = Setting(torch.device("cuda"), 65536, 4096, 16)
    names = {candidate.name for candidate in op.soft_candidates(setting)}
    for name in ("attention, flash", "attention, efficient", "attention, cudnn", "attention, math"):
        assert name in names
    assert {"max-autotune", "FlexAttention", "KeOps", "softvq streaming", "softvq triton"} <= names
    assert "softvq triton, medium" in names
    assert "softvq triton, medium" not in {
        candidate.name for candidate in op.soft_candidates(setting._replace(dtype=torch.bfloat16))
    }
    # 32 blocks of keys: 16 batch entries make two programs for each of the 132 processors
    assert candidates.batches(setting) == 16
    assert candidates.batches(setting._replace(codes=262144)) == 1
    assert candidates.batches(setting._replace(rows=100, codes=64)) == 4


def test_a_missing_peer_and_a_failing_one_are_rows(quick, results, monkeypatch):
    def missing(setting):
        import a_package_that_nobody_has  # noqa: F401

    def fails(setting):
        def run(z, codebook):
            raise RuntimeError("no kernel\nof this kind")

        return run

    def too_large(setting):
        return lambda z, codebook: Outputs(torch.empty(2**60))

    found = [
        Candidate("missing", missing, "q"),
        Candidate("failing", fails, "q"),
        Candidate("too large", too_large, "q"),
        Candidate("eager", candidates.plain(candidates.eager), "q"),
    ]
    monkeypatch.setitem(op.GROUPS, "soft", lambda _: found)
    assert op.main(quick) == 0
    status = {row["candidate"]: row["status"] for row in results.read("op")}
    assert status["missing"] == "not installed: a_package_that_nobody_has"
    assert status["failing"] == "failed: RuntimeError: no kernel"
    assert status["too large"] == "out of memory"
    assert status["eager"] == "ok"


def test_what_does_not_fit_beside_the_others_is_a_row(quick, results, monkeypatch):
    calls = []

    def alone(setting):
        def run(z, codebook):
            calls.append(run)
            if len(calls) > op.WARM_TURNS + 1:
                raise torch.OutOfMemoryError
            return candidates.eager(z, codebook, 1.0)

        return run

    found = [
        Candidate("fits alone", alone, "q"),
        Candidate("eager", candidates.plain(candidates.eager), "q"),
    ]
    monkeypatch.setitem(op.GROUPS, "soft", lambda _: found)
    assert op.main(quick) == 0
    rows = results.read("op")
    assert [r["status"] for r in rows if r["candidate"] == "fits alone"] == ["out of memory"]
    assert len(calls) == op.WARM_TURNS + 2
    assert {r["status"] for r in rows if r["candidate"] == "eager"} == {"ok"}


def test_no_time_left_is_a_row(quick, results):
    assert op.main([*quick, "--minutes", "0"]) == 0
    assert {row["status"] for row in results.read("op")} == {"not run: no time left"}


def test_past_the_deadline_only_the_least_turns_follow(quick, monkeypatch):
    calls = []

    def counted(setting):
        def run(z, codebook):
            calls.append(run)
            return candidates.eager(z, codebook, 1.0)

        return run

    monkeypatch.setattr(op, "time", SimpleNamespace(monotonic=lambda: len(calls)))
    rows = op.measure([Candidate("eager", counted, "q")], *SETTINGS[0], [], deadline=1)
    assert len(calls) == op.WARM_TURNS + op.LEAST_TURNS
    assert {row["status"] for row in rows} == {"ok"}
    assert not any("extra_bytes" in row for row in rows)


def test_memory_is_measured_in_another_process():
    setting = Setting(CPU, 4096, 1024, 16)
    eager = Candidate("eager", candidates.plain(candidates.eager), "q")
    matrix = 4 * 4096 * 1024
    assert 3 * matrix < op.extra_bytes(eager, "soft", setting)["extra_bytes"] < 8 * matrix


def test_the_largest_codebook():
    points = {1024: 1 * 10**8, 2048: 3 * 10**8}
    slope = 2e8 / 1024
    assert memory.slope_between_last(points) == slope
    found = {row["metric"]: row for row in memory.conclusions(points, slope)}
    assert found["bytes at K = 0"]["p50"] == pytest.approx(-1e8)
    one = found["largest K in 1 GB"]
    assert one["p50"] == int(1.1e9 / slope) and one["status"] == "extrapolated"
    assert found["largest K in 80 GB"]["p50"] == memory.MOST_CODES
    flat = {row["metric"]: row["p50"] for row in memory.conclusions(points, 0.0)}
    assert flat["largest K in 1 GB"] == memory.MOST_CODES


def test_few_rows_show_what_grows_with_the_codes(monkeypatch):
    asked = []

    def footprint(group, name, setting):
        asked.append((setting.rows, setting.codes))
        return 1500 * setting.codes + 8 * setting.rows

    monkeypatch.setattr(memory, "footprint", footprint)
    setting = Setting(CPU, 65536, 0, 64)
    assert memory.slope_of_few_rows("soft", "softvq", setting, {2048: 1, 4096: 2}) == 1500
    assert asked == [(1024, 4096), (1024, 262144)]
    assert memory.slope_of_few_rows("soft", "softvq", setting, {131072: 1, 262144: 2}) == 0


def test_memory(quick, results, monkeypatch, capsys):
    monkeypatch.setattr(memory, "MOST_CODES", 4096)
    assert memory.main(quick) == 0
    rows = [row for row in results.read("memory") if row["candidate"] == "softvq"]
    measured = {int(row["codes"]): row for row in rows if row["metric"] == "footprint"}
    assert set(measured) == {2048, 4096}
    inputs = 4 * 64 * (2 * 4096 + 2048)
    assert int(measured[2048]["p50"]) == inputs + 10**6 + 1000 * 2048
    assert "largest K in 8 GB" in capsys.readouterr().out


def test_step(quick, results):
    assert step.main([*quick, "--batch", "2", "--codes", "16"]) == 0
    rows = {row["candidate"]: row for row in results.read("step")}
    assert set(rows) == {"softvq", "eager", "vector-quantize-pytorch"}
    assert float(rows["softvq"]["p50"]) > 0 and rows["softvq"]["unit"] == "1/s"
    peer = rows["vector-quantize-pytorch"]
    assert peer["status"] == "ok" or peer["status"].startswith("not installed")


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_nets_differ_in_nothing_but_the_operator(weight):
    """Outputs, loss and gradients of the plain quantizer are ours."""
    kinds = (step.SoftVQ, step.EagerSoftVQ)
    # So warm that scores are of order 1: what a CPU rounds of them then shows in no gradient.
    options = {"temperature": step.DIM, "commitment_weight": weight}
    quantizers = [kind(step.DIM, 8, **options) for kind in kinds]
    quantizers[1].load_state_dict(quantizers[0].state_dict())
    x, grad = torch.randn(2, 2, 3, 4, step.DIM)
    results = []
    for quantizer in quantizers:
        latents = x.clone().requires_grad_()
        quantized, indices, loss = quantizer(latents)
        (loss + (grad * quantized).sum()).backward()
        codebook_grad = quantizer.codebook_parameter.grad
        results.append((quantized, indices, loss, latents.grad, codebook_grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_chunks_are_the_whole():
    setting = Setting(CPU, 70, 2**17, 2)  # three blocks of rows
    inputs = setting.draw(0)[:2]
    whole = candidates.eager_lean(*inputs, 1.0)
    blocks = candidates.chunked(*inputs, 1.0)
    torch.testing.assert_close(blocks, whole)


def test_hard_candidates_find_the_same_codes():
    setting = Setting(CPU, 50, 20, 8)
    z, codebook, _ = setting.draw(0)
    with torch.no_grad():
        expected = hard.cdist(setting)(z, codebook).indices
        assert torch.equal(hard.nearest(setting)(z, codebook).indices, expected)


def test_vector_quantize_pytorch():
    pytest.importorskip("vector_quantize_pytorch")
    setting = Setting(CPU, 50, 20, 8)
    z, codebook, _ = setting.draw(0)
    with torch.no_grad():
        outputs = hard.vector_quantize(setting)(z, codebook)
        assert torch.equal(outputs.indices, hard.cdist(setting)(z, codebook).indices)


@pytest.mark.gpu
def test_a_gpu_is_busy_until_the_work_is_queued():
    clock = measure.Clock(torch.device("cuda"))
    clock.settle()
    start = clock.mark()
    time.sleep(0.003)  # the host's part
    assert not start.query()
    assert clock.seconds(start, clock.mark()) < 1e-3


def test_the_default_backend_is_what_is_checked():
    assert check.default_backend(CPU) == "streaming"
    assert check.default_backend(torch.device("cuda")) == "triton"
