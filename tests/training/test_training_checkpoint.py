"""Checkpoints: exact, whole, few, and honest about damage."""

import random
import re

import pytest
import torch

from softvq.training import checkpoint
from softvq.training.checkpoint import (
    MANIFEST,
    STATE,
    TENSORS,
    DamagedError,
    Progress,
    load_checkpoint,
    read_checkpoint,
    remove_checkpoints_after,
    save_checkpoint,
)
from softvq.training.run_folder import RunError
from softvq.training.state_file import from_bytes, to_bytes

FILES = (STATE, TENSORS, MANIFEST)


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
    progress = Progress(step=3, best_error=0.25, best_step=2, seconds=1.5, warnings=["careful"])
    save_checkpoint(tmp_path, progress, one)
    step(one)
    torch.manual_seed(99)
    assert load_checkpoint(tmp_path, other) == (progress, [])
    step(other)  # the same random numbers again
    for a, b in zip(one["model"].parameters(), other["model"].parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_state_and_back():
    state = {
        "empty": {},
        "numbers": [1, 0.1, float("inf"), None, True, "text"],
        "by number": {0: {"step": torch.tensor(3.0)}, 7: torch.arange(4)[::2]},
        "flags": torch.tensor([True, False]),
        "nested": [[torch.zeros(0, 2, dtype=torch.float64)]],
    }
    assert str(from_bytes(*to_bytes(state))) == str(state)


def test_nothing_in_it_is_run(tmp_path):
    """A pickle could; these files start as JSON and as safetensors do."""
    save_checkpoint(tmp_path, Progress(step=3), parts())
    assert names(tmp_path / "step-3") == sorted(FILES)
    tensors = (tmp_path / "step-3" / TENSORS).read_bytes()
    assert tensors[8:9] == b"{"


def test_the_newest_two_are_kept_and_the_best_of_each(tmp_path):
    kept = []
    for number, best in (
        (0, 0),
        (1, 0),
        (2, 2),
        (4, 4),
        (6, 4),
        (8, 4),
        (10, 10),
        (12, 10),
        (14, 10),
        (16, 16),
    ):
        save_checkpoint(tmp_path, Progress(step=number, best_step=best), parts())
        kept.append(sorted(int(name.removeprefix("step-")) for name in names(tmp_path)))
    assert kept == [
        [0],
        [0, 1],
        [1, 2],
        [2, 4],
        [4, 6],
        [4, 6, 8],
        [4, 8, 10],
        [10, 12],
        [10, 12, 14],
        [10, 14, 16],
    ]


def test_the_newest_is_restored_by_number(tmp_path):
    save_checkpoint(tmp_path, Progress(step=9, best_step=9), parts())
    save_checkpoint(tmp_path, Progress(step=10, best_step=9), parts())
    assert load_checkpoint(tmp_path, parts())[0].step == 10


def test_a_step_can_be_saved_again(tmp_path):
    for seconds in (1.0, 2.0):
        save_checkpoint(tmp_path, Progress(step=3, seconds=seconds), parts())
    assert names(tmp_path) == ["step-3"]
    assert load_checkpoint(tmp_path, parts())[0].seconds == 2.0


def test_no_checkpoint(tmp_path):
    assert load_checkpoint(tmp_path / "checkpoints", parts()) == (None, [])


def flip(path, position, bit=0):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def other_shapes(folder):
    other = {"model": torch.nn.Linear(7, 7), "optimizer": parts()["optimizer"]}
    save_checkpoint(folder.parent, Progress(step=4), other)


DAMAGES = {
    "truncated": (
        lambda folder: (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-100]),
        r"tensors.safetensors has \d+ bytes, not \d+",
    ),
    "empty": (lambda folder: (folder / STATE).write_bytes(b""), r"state.json has 0 bytes, not "),
    "flipped": (
        lambda folder: flip(folder / TENSORS, -50),
        "tensors.safetensors has changed: its sha256 is another",
    ),
    "flipped number": (
        lambda folder: flip(folder / STATE, 30),
        "state.json has changed: its sha256 is another",
    ),
    "no tensors": (
        lambda folder: (folder / TENSORS).unlink(),
        "tensors.safetensors: No such file or directory",
    ),
    "no manifest": (
        lambda folder: (folder / MANIFEST).unlink(),
        "manifest.json: No such file or directory",
    ),
    "empty manifest": (
        lambda folder: (folder / MANIFEST).write_bytes(b""),
        "manifest.json cannot be read",
    ),
    "manifest of nothing": (
        lambda folder: (folder / MANIFEST).write_bytes(b"{}"),
        "manifest.json cannot be read",
    ),
    "other shapes": (other_shapes, "it does not fit the run's config.toml"),
}


@pytest.mark.parametrize(("damage", "what"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_one_is_named_and_the_one_before_is_used(tmp_path, damage, what):
    good, restored = parts(), parts()
    save_checkpoint(tmp_path, Progress(step=3), good)
    save_checkpoint(tmp_path, Progress(step=4), parts())
    damage(tmp_path / "step-4")
    progress, (line,) = load_checkpoint(tmp_path, restored)
    assert progress.step == 3
    assert torch.equal(restored["model"].weight, good["model"].weight)
    assert re.fullmatch(rf"{tmp_path}/step-4: damaged checkpoint \({what}.*\)", line)


def test_later_ones_can_be_removed(tmp_path):
    """So that keeping the newest two keeps good ones."""
    for number in (3, 4, 5):
        save_checkpoint(tmp_path, Progress(step=number, best_step=3), parts())
    remove_checkpoints_after(tmp_path, 4)
    assert names(tmp_path) == ["step-3", "step-4"]


@pytest.mark.parametrize("file", FILES)
def test_no_flipped_bit_goes_unseen(tmp_path, file):
    save_checkpoint(tmp_path, Progress(step=3), parts())
    path = tmp_path / "step-3" / file
    whole, unharmed = path.read_bytes(), read_checkpoint(tmp_path, 3)
    draw, seen = random.Random(0), 0
    positions = draw.sample(range(len(whole)), min(200, len(whole)))
    for position in positions:
        flip(path, position, draw.randrange(8))
        try:
            harmless = read_checkpoint(tmp_path, 3)
        except DamagedError:
            seen += 1
        else:  # white space of the manifest
            assert file == MANIFEST and str(harmless) == str(unharmed)
        path.write_bytes(whole)
    assert seen > 0.9 * len(positions)


def test_all_of_them_damaged(tmp_path):
    for number in (3, 4):
        save_checkpoint(tmp_path, Progress(step=number), parts())
        (tmp_path / f"step-{number}" / TENSORS).unlink()
    with pytest.raises(RunError) as caught:
        load_checkpoint(tmp_path, parts())
    assert str(caught.value) == (
        f"{tmp_path}/step-4: damaged checkpoint (tensors.safetensors: No such file or directory)"
        ", and so are 1 older ones; start with --overwrite"
    )
    assert names(tmp_path) == ["step-3", "step-4"]


def test_a_save_that_fails_midway_leaves_the_last_ones(tmp_path, monkeypatch):
    for number in (2, 3):
        save_checkpoint(tmp_path, Progress(step=number), parts())

    def fail(path):
        if path.name == MANIFEST:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "sync", fail)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(tmp_path, Progress(step=4, best_step=4), parts())
    assert names(tmp_path) == ["step-2", "step-3"]
    assert load_checkpoint(tmp_path, parts())[0].step == 3
    save_checkpoint(tmp_path, Progress(step=4, best_step=4), parts())
    assert names(tmp_path) == ["step-3", "step-4"]


def test_everything_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    synced = []

    def note(path):
        synced.append((path.relative_to(tmp_path).as_posix(), names(tmp_path)))

    monkeypatch.setattr(checkpoint, "sync", note)
    save_checkpoint(tmp_path, Progress(step=3), parts())
    before, after = [".step-3.tmp"], ["step-3"]
    assert synced == [
        *((f".step-3.tmp/{name}", before) for name in FILES),
        (".step-3.tmp", before),
        (".", after),
    ]
