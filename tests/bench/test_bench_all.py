"""Results that replace themselves, `all` that goes on where it stopped, figures."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import all as everything
from bench import figures
from bench.results import COLUMNS, Results, environment, print_table

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def test_a_command_replaces_its_own_rows_only(results):
    results.replace("op", [{"candidate": "old", "p50": 1 / 3}])
    results.replace("check", [{"candidate": "kept"}])
    results.replace("op", [{"candidate": "new", "p50": 1 / 3}])
    assert [row["candidate"] for row in results.read()] == ["kept", "new"]
    (row,) = results.read("op")
    assert tuple(row) == COLUMNS
    assert row["p50"] == "0.3333" and row["p20"] == "" and row["softvq"].count("+") == 1


def test_the_folder_says_which_device(results):
    threads = torch.get_num_threads()
    assert results.folder.name.endswith(f"-{threads}-threads")


def test_table(capsys):
    print_table(["name", "ms"], [["a", "1.5"], ["longer", "10"]])
    assert capsys.readouterr().out.splitlines() == ["name     ms", "a       1.5", "longer   10"]


@pytest.fixture
def calls(monkeypatch):
    """The commands that `all` starts; those named in `failing` fail."""
    calls, failing = [], set()

    def run(command):
        calls.append(" ".join(command[2:]))
        return SimpleNamespace(returncode=int(any(name in calls[-1] for name in failing)))

    monkeypatch.setattr(subprocess, "run", run)
    return SimpleNamespace(names=calls, failing=failing)


def all_of_them(tmp_path) -> int:
    return everything.main(["--device", "cpu", "--out", str(tmp_path)])


def test_all_runs_each_command_once(calls, tmp_path, capsys):
    assert all_of_them(tmp_path) == 0
    names = [name.split()[1] for name in calls.names]
    assert names == ["check", "compile", "step", "memory", "op"]
    assert all_of_them(tmp_path) == 0
    assert len(calls.names) == 5
    assert capsys.readouterr().out.count("step --quick") >= 2


def test_all_repeats_what_failed_and_what_has_changed(calls, tmp_path, monkeypatch):
    calls.failing.add("bench op")
    assert all_of_them(tmp_path) == 1
    calls.failing.clear()
    calls.names.clear()
    assert all_of_them(tmp_path) == 0
    assert [name.split()[1] for name in calls.names] == ["op"]
    calls.names.clear()
    monkeypatch.setattr("bench.results.source_digest", lambda: "another")
    assert all_of_them(tmp_path) == 0
    assert len(calls.names) == 5


def test_a_gpu_has_its_own_kernels_compiled_and_the_operator_in_the_time_that_is_left(
    calls, tmp_path, monkeypatch
):
    monkeypatch.setattr(Results, "__init__", fake_results)
    monkeypatch.setattr(everything.tiles, "architecture", lambda device: "ampere")
    arguments = ["--device", "cuda", "--out", str(tmp_path)]
    assert everything.main(arguments) == 0
    names = [name.split()[1] for name in calls.names]
    assert names == ["check", "compile", "step", "memory", "op"]
    assert "--architecture 80" in calls.names[1]
    assert calls.names[-1].endswith(f"--minutes {everything.MINUTES:.1f}")
    assert everything.main(arguments) == 0
    assert len(calls.names) == 5


def fake_results(self, out, device):
    """As of a GPU, without one."""
    self.environment = environment(CPU) | {"device": "card", "threads": ""}
    self.folder, self.path = out / "card", out / "card" / "results.csv"


def test_unknown_command():
    process = subprocess.run(
        [sys.executable, "-m", "bench", "nonsense"], cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 2 and "check" in process.stderr


def test_figures(tmp_path):
    results = Results(tmp_path, CPU)
    sizes = {"rows": 64, "dim": 64, "dtype": "float32", "status": "ok"}
    results.replace(
        "op",
        [
            sizes | {"candidate": name, "codes": codes, "pass": "both", "p50": codes * scale}
            for name, scale in (("softvq", 1e-5), ("eager", 3e-5))
            for codes in (64, 512)
        ],
    )
    point = sizes | {"candidate": "softvq", "metric": "footprint"}
    line = sizes | {"candidate": "softvq", "codes": ""}
    results.replace(
        "memory",
        [
            point | {"codes": 1024, "p50": 10**8},
            point | {"codes": 2048, "p50": 2 * 10**8},
            line | {"metric": "bytes at K = 0", "p50": 0.0},
            line | {"metric": "bytes per code", "p50": 97656.25},
        ],
    )
    error = sizes | {"candidate": "softvq", "metric": "error of quantized", "p50": 1e-6}
    results.replace(
        "accuracy", [error | {"temperature": t, "offset": o} for t in (0.1, 1.0) for o in (0, 10)]
    )
    assert figures.main(["--out", str(tmp_path)]) == 0
    for name in ("time", "memory", "accuracy"):
        assert (results.folder / f"{name}.png").stat().st_size > 5000
        assert "softvq" in (results.folder / f"{name}.svg").read_text()
    first = (results.folder / "time.svg").read_bytes()
    figures.main(["--out", str(tmp_path)])
    assert (results.folder / "time.svg").read_bytes() == first


def test_names_move_only_as_far_as_they_must():
    assert figures.apart([0.0, 5.0], 1.0) == [0.0, 5.0]
    assert figures.apart([0.0, 5.0, 5.0, 9.0], 1.0) == [0.0, 4.5, 5.5, 9.0]
    assert figures.apart([1.0, 1.0, 1.0], 2.0) == [-1.0, 1.0, 3.0]


def test_no_figure_without_rows(tmp_path):
    results = Results(tmp_path, CPU)
    results.replace("check", [{"candidate": "softvq"}])
    figures.main(["--out", str(tmp_path)])
    assert [path.name for path in results.folder.iterdir()] == ["results.csv"]
