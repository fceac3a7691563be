import os
from pathlib import Path

import pytest
import torch

from softvq.kernels import tiles, tuning
from tests.kernels.card import SHARED_MEMORY, Card, new_process


@pytest.fixture(autouse=True)
def as_on_a_gpu():
    """With SOFTVQ_EMULATE=90 in the environment, or another architecture, the kernels run compiled,
    in bench's emulator of that GPU. A test then takes up to a minute.
    """
    architecture = os.environ.get("SOFTVQ_EMULATE")
    if architecture is None:
        yield
        return
    from bench.emulator import emulated

    with emulated(int(architecture)):
        yield


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    """Where the tiles are kept."""
    monkeypatch.setenv("SOFTVQ_CACHE", str(tmp_path))
    new_process()
    yield tmp_path / "softvq" / "tiles.json"
    new_process()


@pytest.fixture
def card(monkeypatch, cache) -> Card:
    card = Card(times={}, timed=[], wrong=[], capturing=False)
    monkeypatch.setattr(tuning, "applies", lambda device: True)
    monkeypatch.setattr(tuning, "environment", lambda device: "a card, triton 1, softvq 2")
    monkeypatch.setattr(tuning, "milliseconds", card.milliseconds)
    monkeypatch.setattr(tuning, "agree", card.agree)
    monkeypatch.setattr(tiles, "shared_memory", lambda device: SHARED_MEMORY)
    monkeypatch.setattr(tiles, "architecture", lambda device: "hopper")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: card.capturing)
    return card
