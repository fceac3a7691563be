"""The PNG files of a run: what is in them, and that none is ever left half-written."""

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from softvq.training import pictures
from softvq.training.pictures import (
    GAP,
    MARGIN,
    replacing,
    save_codebook_usage,
    save_rows,
)


def pixels(path: Path) -> np.ndarray:
    """(H, W, 3) uint8."""
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.fixture
def titles(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The titles of the codebook pictures that the test draws."""
    seen: list[str] = []
    original = pictures.Axes.set_title

    def spy(axes: pictures.Axes, text: str, **options: object) -> object:
        seen.append(text)
        return original(axes, text, **options)

    monkeypatch.setattr(pictures.Axes, "set_title", spy)
    return seen


@pytest.mark.parametrize(("size", "factor"), [(8, 8), (28, 2), (32, 2), (64, 1), (100, 1)])
def test_images_stand_enlarged_by_whole_pixels_at_the_right_end(
    tmp_path: Path, size: int, factor: int
) -> None:
    rows = [(name, torch.rand(3, 1, size, size)) for name in ("input", "soft codes")]
    save_rows(tmp_path / "r.png", rows)
    picture = pixels(tmp_path / "r.png")
    side = size * factor
    right = picture.shape[1] - MARGIN
    for row, (_, images) in enumerate(rows):
        top = MARGIN + row * (side + GAP)
        block = picture[top : top + side, right - side : right]
        last = (images[-1, 0] * 255).round().byte().numpy()
        expected = last.repeat(factor, 0).repeat(factor, 1)
        assert (block == expected[..., None]).all()
        assert (picture[top : top + side, right - side - GAP : right - side] == 255).all()
    assert picture.shape[0] == 2 * MARGIN + 2 * side + GAP


def test_labels_are_not_only_latin(tmp_path: Path) -> None:
    """Letters that a font does not have all look the same."""
    drawn = []
    for label in "ЖЯα":
        save_rows(tmp_path / "x.png", [(label, torch.zeros(1, 1, 8, 8))])
        drawn.append(pixels(tmp_path / "x.png").tobytes())
    assert len({*drawn}) == 3


def test_each_row_has_a_label_at_its_left(tmp_path: Path) -> None:
    images = torch.ones(1, 3, 8, 8)  # as white as the page: only the labels are dark
    save_rows(tmp_path / "r.png", [("input", images), ("", images), ("codes", images)])
    picture = pixels(tmp_path / "r.png")
    dark = [
        (picture[top : top + 64] < 128).any() for top in (MARGIN + i * (64 + GAP) for i in range(3))
    ]
    assert dark == [True, False, True]


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_any_number_of_channels_is_shown(tmp_path: Path, channels: int) -> None:
    images = torch.rand(1, channels, 64, 64)
    save_rows(tmp_path / "r.png", [("x", images)])
    shown = pixels(tmp_path / "r.png")[MARGIN:-MARGIN, -MARGIN - 64 : -MARGIN]
    colours = images[0, :3] if channels >= 3 else images[0, :1].expand(3, -1, -1)
    assert (shown == (colours * 255).round().byte().permute(1, 2, 0).numpy()).all()


def test_values_outside_the_unit_interval_are_clamped_and_gradients_do_not_matter(
    tmp_path: Path,
) -> None:
    images = torch.tensor([-0.5, 1.5]).view(1, 1, 1, 2).bfloat16().requires_grad_()
    save_rows(tmp_path / "r.png", [("x", images)], image_size=2)
    row = pixels(tmp_path / "r.png")[:, -MARGIN - 2 : -MARGIN].reshape(-1, 2, 3)
    assert (row.min(0) == [[0] * 3, [255] * 3]).all()


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        (torch.full((512,), 7), ("512 of 512 codes", "0 unused", "perplexity 512.0")),
        (torch.tensor([0, 4, 0, 4]), ("2 of 4 codes used (50.00%)", "2 unused", "perplexity 2.0")),
        (torch.tensor([9]), ("1 of 1 codes", "0 unused", "perplexity 1.0")),
        (torch.arange(262_144) // 64, ("262,080 of 262,144 codes", "64 unused")),
    ],
    ids=["even", "half", "one code", "very many codes"],
)
def test_codebook_title_counts_what_is_used(
    tmp_path: Path, titles: list[str], counts: Tensor, expected: tuple[str, ...]
) -> None:
    save_codebook_usage(tmp_path / "u.png", counts)
    assert all(text in titles[0] for text in expected)
    assert matplotlib.image.imread(tmp_path / "u.png").std() > 0.05


def test_the_height_of_the_steps_follows_the_sorted_counts(tmp_path: Path) -> None:
    save_codebook_usage(tmp_path / "u.png", torch.tensor([0, 2, 8, 4]))
    blue = (pixels(tmp_path / "u.png") == [0x3B, 0x6F, 0xB6]).all(-1).sum(0)
    columns = np.flatnonzero(blue)
    width = (columns[-1] - columns[0]) / 3  # the unused code has no step
    middles = [blue[int(columns[0] + width * (i + 0.5))] for i in range(3)]
    # The dashed line may hide a few pixels of a step.
    assert middles[1:] == pytest.approx([middles[0] / 2, middles[0] / 4], abs=4)


def test_a_few_used_codes_among_very_many_still_fill_a_good_part(tmp_path: Path) -> None:
    counts = torch.zeros(262_144).long()
    counts[1000:1030] = 50
    save_codebook_usage(tmp_path / "u.png", counts)
    blue = (pixels(tmp_path / "u.png") == [0x3B, 0x6F, 0xB6]).all(-1)
    assert blue.any(0).mean() > 0.2


def test_a_failure_leaves_the_old_picture_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.png"
    save_rows(path, [("x", torch.rand(1, 1, 8, 8))])
    before = path.read_bytes()

    def half_written(image: Image.Image, target: Path, **options: object) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", half_written)
    with pytest.raises(OSError, match="disk full"):
        save_rows(path, [("x", torch.rand(1, 1, 8, 8))])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_target_appears_only_when_the_block_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
        inode = temporary.stat().st_ino
    assert path.read_text() == "whole"
    assert path.stat().st_ino == inode  # renamed, not copied
    assert list(tmp_path.iterdir()) == [path]


def test_a_label_of_several_lines_is_one(tmp_path):
    """As a class of a folder may be called, which Pillow cannot measure."""
    image = torch.zeros(1, 1, 8, 8)
    for name, label in (("one", "a b"), ("two", "a\nb")):
        save_rows(tmp_path / name, [(label, image)])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
