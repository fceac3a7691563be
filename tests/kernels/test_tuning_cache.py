"""The file that remembers tuned tiles: damaged, not to be written, of other versions, shared."""

import json
import warnings

import pytest
import torch

from softvq.kernels import tuning
from tests.kernels.card import OTHER, SHIPPED, choose, new_process


@pytest.mark.parametrize("content", ["{", "[]", "\xff", ""])
def test_a_damaged_file_is_ignored_with_one_warning(card, cache, content):
    cache.parent.mkdir()
    cache.write_bytes(content.encode("latin-1"))
    with pytest.warns(UserWarning, match=r"tiles.json is ignored") as caught:
        assert choose() == SHIPPED
    assert len(caught) == 1
    assert card.timed
    new_process()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose() == SHIPPED  # the file has been replaced


@pytest.mark.parametrize("nonsense", ["fast", 7, [64, 128], [4096, 128, 4, 2], None])
def test_a_tile_that_is_no_candidate_is_ignored(card, cache, nonsense):
    card.times[OTHER] = 0.5
    choose()
    key = next(iter(json.loads(cache.read_text())))
    cache.write_text(json.dumps({key: nonsense}))
    new_process()
    card.times.clear()
    assert choose() == SHIPPED


def test_a_folder_that_cannot_be_written_warns_once(card, cache, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError("read-only")

    monkeypatch.setattr(tuning.tempfile, "NamedTemporaryFile", refuse)
    card.times[OTHER] = 0.5
    with pytest.warns(UserWarning, match="not kept: read-only") as caught:
        assert choose() == OTHER
        assert choose(dim=32) == OTHER
    assert len(caught) == 1
    card.timed.clear()
    assert choose() == OTHER and not card.timed


def test_other_versions_have_their_own_entries(card, cache, monkeypatch):
    card.times[OTHER] = 0.5
    assert choose() == OTHER
    monkeypatch.setattr(tuning, "environment", lambda device: "a card, triton 2, softvq 2")
    card.times.clear()
    new_process()
    assert choose() == SHIPPED
    assert len(json.loads(cache.read_text())) == 2  # the older one is left to its owner


def test_the_environment_names_card_versions_and_source(monkeypatch):
    triton = pytest.importorskip("triton", reason="it names triton's version")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    tuning.environment.cache_clear()
    found = tuning.environment(torch.device("cuda"))
    tuning.environment.cache_clear()
    assert found.startswith(f"a card, triton {triton.__version__}, softvq ")
    assert len(found.split()[-1]) == 8


def test_processes_add_to_the_same_file(card, cache):
    a, b = tuning.Cache(cache), tuning.Cache(cache)
    a.put("one", SHIPPED, keep=True)
    b.put("two", OTHER, keep=True)
    a.put("two", SHIPPED, keep=True)  # the last writer wins
    b.put("one", OTHER, keep=True)
    a.put("three", SHIPPED, keep=True)  # and brings nothing older back
    after = tuning.Cache(cache)
    assert after.get("one", [SHIPPED, OTHER]) == OTHER
    assert after.get("two", [SHIPPED, OTHER]) == SHIPPED
    assert b.get("two", [SHIPPED, OTHER]) == OTHER  # which a process does not change under way


def test_the_cache_folder(monkeypatch, tmp_path):
    for variables, folder in (
        ({"SOFTVQ_CACHE": "a", "XDG_CACHE_HOME": "b"}, tmp_path / "a"),
        ({"XDG_CACHE_HOME": "b"}, tmp_path / "b"),
        ({}, tmp_path / ".cache"),
    ):
        for name in ("SOFTVQ_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        for name, value in variables.items():
            monkeypatch.setenv(name, str(tmp_path / value))
        new_process()
        assert tuning._cache()._path == folder / "softvq" / "tiles.json"
    new_process()
