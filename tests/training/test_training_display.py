"""What a person sees."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from softvq.training import display
from softvq.training.checkpoint import Progress
from softvq.training.config import TrainConfig


@pytest.mark.parametrize("terminal", [False, True])
def test_a_bar_over_long_work(terminal, monkeypatch, capsys):
    monkeypatch.setattr(
        display, "Console", lambda stderr: Console(stderr=stderr, force_terminal=terminal)
    )
    assert list(display.with_bar(iter("abc"), 3, "looking at pictures")) == ["a", "b", "c"]
    out, error = capsys.readouterr()
    assert out == "" and ("looking at pictures" in error) == terminal


@pytest.mark.parametrize("width", [40, 80])
def test_losses_push_nothing_off_a_narrow_terminal(width, monkeypatch):
    screen = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    monkeypatch.setattr(display, "_Console", lambda **options: screen)
    shown = display.Display(TrainConfig(steps=20_000), quiet=False)
    losses = {f"a_long_name_{number}": torch.tensor(1.0) for number in range(9)}
    shown.step(1055, Progress(step=1055, seconds=10.0), losses)
    screen.print(shown.bar.get_renderable())
    line = screen.file.getvalue()
    assert "1055/20000 -:--:--" in line and "⠋ ╸" in line and line.count("\n") == 1
    assert ("105.5 steps/s" in line) == (width == 80)


def test_how_to_go_on_can_be_pasted(capsys):
    shown = display.Display(TrainConfig(steps=20), quiet=False)
    shown.stopped(3, Path("my runs/a"), saved=True)
    assert "softvq train --out 'my runs/a' --resume" in capsys.readouterr().out
