"""Checkpoints: exact, whole, few, and honest about damage."""

import pytest
import torch

from softvq.training.checkpoint import FILE, Progress, load_checkpoint, save_checkpoint
from softvq.training.run_folder import RunError


def parts():
    model = torch.nn.Linear(3, 2)
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}


def step(parts):
    parts["model"](torch.randn(4, 3)).square().mean().backward()
    parts["optimizer"].step()
    parts["optimizer"].zero_grad()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_restored_run_goes_on_exactly(tmp_path):
    one, other = parts(), parts()
    step(one)
    progress = Progress(step=3, best_error=0.25, best_step=2, seconds=1.5)
    save_checkpoint(tmp_path, progress, one)
    step(one)
    torch.manual_seed(99)
    assert load_checkpoint(tmp_path, other) == progress
    step(other)  # the same random numbers again
    for a, b in zip(one["model"].parameters(), other["model"].parameters(), strict=True):
        assert torch.equal(a, b)


def test_only_the_newest_and_the_best_are_kept(tmp_path):
    kept = []
    for number, best in ((2, 2), (4, 4), (6, 4), (8, 4), (10, 10), (12, 10)):
        save_checkpoint(tmp_path, Progress(step=number, best_step=best), parts())
        kept.append(names(tmp_path))
    assert kept == [
        ["step-2"],
        ["step-4"],
        ["step-4", "step-6"],
        ["step-4", "step-8"],
        ["step-10"],
        ["step-10", "step-12"],
    ]


def test_the_newest_is_restored_by_number(tmp_path):
    save_checkpoint(tmp_path, Progress(step=9, best_step=9), parts())
    save_checkpoint(tmp_path, Progress(step=10, best_step=9), parts())
    assert load_checkpoint(tmp_path, parts()).step == 10


def test_a_step_can_be_saved_again(tmp_path):
    for seconds in (1.0, 2.0):
        save_checkpoint(tmp_path, Progress(step=3, seconds=seconds), parts())
    assert names(tmp_path) == ["step-3"]
    assert load_checkpoint(tmp_path, parts()).seconds == 2.0


def test_no_checkpoint(tmp_path):
    with pytest.raises(RunError, match="no checkpoint to resume from"):
        load_checkpoint(tmp_path / "checkpoints", parts())


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def without_optimizer(path):
    torch.save({"model": parts()["model"].state_dict()}, path)


def other_shapes(path):
    state = torch.load(path)
    state["model"]["weight"] = torch.zeros(7, 7)
    torch.save(state, path)


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"garbage" * 100),
        lambda path: path.unlink(),
        without_optimizer,
        other_shapes,
    ],
    ids=["truncated", "empty", "garbage", "missing", "incomplete", "other shapes"],
)
def test_a_damaged_file_is_named_in_one_line(tmp_path, damage):
    save_checkpoint(tmp_path, Progress(step=3), parts())
    path = tmp_path / "step-3" / FILE
    damage(path)
    with pytest.raises(RunError) as caught:
        load_checkpoint(tmp_path, parts())
    assert str(caught.value).startswith(f"{path}: damaged checkpoint")
    assert "\n" not in str(caught.value)


def test_a_save_that_fails_midway_leaves_the_last_one(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, Progress(step=3), parts())

    def fill_the_disk(state, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fill_the_disk)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(tmp_path, Progress(step=4, best_step=4), parts())
    assert load_checkpoint(tmp_path, parts()).step == 3
    save_checkpoint(tmp_path, Progress(step=4, best_step=4), parts())
    assert names(tmp_path) == ["step-4"]
