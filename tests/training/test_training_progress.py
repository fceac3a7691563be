"""What a person sees."""

import pytest
from rich.console import Console

from softvq.training import progress


@pytest.mark.parametrize("terminal", [False, True])
def test_a_bar_over_long_work(terminal, monkeypatch, capsys):
    monkeypatch.setattr(
        progress, "Console", lambda stderr: Console(stderr=stderr, force_terminal=terminal)
    )
    assert list(progress.with_bar(iter("abc"), 3, "looking at pictures")) == ["a", "b", "c"]
    out, error = capsys.readouterr()
    assert out == "" and ("looking at pictures" in error) == terminal
