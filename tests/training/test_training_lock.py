"""One trainer to a run folder, and only where it can be written."""

import errno
import multiprocessing
import os
import time

import pytest

from softvq.training.lock import locked
from softvq.training.run_folder import RunError
from tests.refusals import refused


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


def hold(folder, is_held):
    with locked(folder):
        is_held.set()
        time.sleep(600)


@pytest.fixture
def holder(folder):
    """Another process that holds the folder."""
    context = multiprocessing.get_context("fork")
    is_held = context.Event()
    process = context.Process(target=hold, args=(folder, is_held))
    process.start()
    assert is_held.wait(60)
    yield process
    process.kill()
    process.join()


def test_the_second_of_two_trainers_refuses_until_the_first_is_killed(
    holder, folder, tiny_run, capsys
):
    (folder / "config.toml").write_bytes((tiny_run / "config.toml").read_bytes())
    for option in ("--resume", "--overwrite"):
        line = refused(capsys, "train", option, "--out", folder, "--quiet")
        assert line.startswith(f"{folder}: process {holder.pid} on ")
        assert "is training there" in line
    assert (folder / "config.toml").read_bytes() == (tiny_run / "config.toml").read_bytes()
    holder.kill()
    holder.join()
    with locked(folder):  # what it left does not matter
        assert (folder / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_nothing_is_left_of_a_lock(folder):
    mine = f"process {os.getpid()} on "
    with locked(folder), pytest.raises(RunError, match=mine), locked(folder):
        pass
    assert not folder.exists()
    folder.mkdir()
    with locked(folder):
        pass
    assert list(folder.iterdir()) == []


def test_a_lock_whose_file_was_removed_by_its_owner(folder, monkeypatch):
    """Opened just before the owner is done: another process may make the file again."""
    folder.mkdir()
    path, opened, open_file = folder / ".lock", [], os.open

    def open_and_lose(name, *flags):
        descriptor = open_file(name, *flags)
        if not opened:
            path.unlink()
        opened.append(descriptor)
        return descriptor

    monkeypatch.setattr(os, "open", open_and_lose)
    with locked(folder):
        assert len(opened) == 2 and path.exists()


@pytest.mark.parametrize("options", [(), ("--resume",), ("--overwrite",)], ids=str)
def test_a_read_only_run_folder(options, folder, tiny_run, capsys, monkeypatch):
    folder.mkdir()
    if options:
        (folder / "config.toml").write_bytes((tiny_run / "config.toml").read_bytes())
    before, open_file = sorted(folder.iterdir()), os.open

    def refuse_to_write(path, flags, *mode):
        if flags & (os.O_WRONLY | os.O_RDWR) and str(path).startswith(str(folder)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return open_file(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse_to_write)
    line = refused(capsys, "train", *options, "--out", folder, "--quiet")
    assert line == (
        f"{folder}: cannot write a run there (Read-only file system); choose another folder with "
        "--out"
    )
    assert sorted(folder.iterdir()) == before
