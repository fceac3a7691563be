"""What several tests of training need."""

import pytest

from softvq.training import commands
from softvq.training.pictures import save_rows


@pytest.fixture
def saved_rows(monkeypatch):
    """The labelled rows of the last picture that a command wrote."""
    rows = []

    def save(path, given):
        rows[:] = given
        save_rows(path, given)

    monkeypatch.setattr(commands, "save_rows", save)
    return rows
