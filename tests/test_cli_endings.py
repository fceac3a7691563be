"""How a command ends that cannot go on, or is told not to."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from softvq import cli
from softvq.cli import main
from softvq.training import commands
from softvq.training.images import ImageTask
from softvq.training.run_folder import RunFolder

ROOT = Path(__file__).parent.parent
FAST = ("--steps", "2", "--width", "2", "--quiet")
pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), OSError("broken")], ids=str)
def test_an_error_of_no_file_names_none(error, run, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(RunFolder, "load_model", fail)
    with pytest.raises(SystemExit) as caught:
        main(["eval", str(run)])
    assert caught.value.code == 2
    said = ("Input/output error", "broken")
    assert capsys.readouterr().err in [f"softvq eval: error: {words}\n" for words in said]


def test_eval_tells_what_it_cannot_write(run, monkeypatch, capsys):
    def fail(path, text):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(commands, "write_text", fail)
    assert main(["eval", str(run)]) == 0
    printed = capsys.readouterr()
    assert "reconstruction_hard_error" in printed.out
    assert printed.err == (
        f"warning: {run}/eval-test.json: cannot be written (Read-only file system)\n"
    )


@pytest.mark.parametrize("command", ["train", "eval", "sample", "report"])
def test_control_c_is_one_line(command, run, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "train", stop)
    monkeypatch.setattr(RunFolder, "read_config", stop)
    options = {"train": ["--out", "new"], "sample": [str(run), "-o", "drawn.png"]}
    assert main([command, *options.get(command, [str(run)])]) == 130
    assert capsys.readouterr().err == f"softvq {command}: stopped\n"


def test_control_c_after_the_last_step_says_how_to_complete_the_run(tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ImageTask, "finish", stop)
        assert main(["train", "--out", "run", *FAST]) == 130
    error = capsys.readouterr().err
    assert error.startswith("softvq train: stopped before the end of the test split; complete")
    assert error.endswith(": softvq train --out run --resume\n")
    assert main(["train", "--out", "run", "--resume", "--quiet"]) == 0
    assert (tmp_path / "run" / "summary.json").is_file()


def test_a_path_is_printed_as_it_is(capsys):
    assert main(["train", "--out", "a[/b]:smile:", "--steps", "1", "--width", "2"]) == 0
    assert "report: a[/b]:smile:/report.html\n" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["report", "train"])
def test_a_reader_that_leaves_is_no_error(run, command, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    arguments = {"report": [run], "train": ["--out", str(tmp_path / "new"), *FAST[:-1]]}[command]
    command = [sys.executable, "-m", "softvq", command, *arguments]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_nobody_reads_at_all(run, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["report", str(run)]) == 0
