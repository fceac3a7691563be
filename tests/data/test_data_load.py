"""load_data as a whole: arguments, digits, splitting and resizing."""

import shutil

import pytest
import torch

from softvq.data import DATASETS, DataError, DataSplits, ImageSet, Reading, load_data
from softvq.data.fingerprint import fingerprint
from softvq.data.resize import fit
from softvq.data.splits import split_off
from tests.pictures import packed, paint, picture


@pytest.fixture(scope="module")
def digits() -> DataSplits:
    return load_data("digits")


def test_digits_have_the_documented_form(digits):
    assert digits.image_shape == (1, 8, 8)
    assert [len(part) for part in digits[:3]] == [1293, 144, 360]
    assert digits.class_names == tuple("0123456789")
    for part in digits[:3]:
        assert part.images.dtype == torch.uint8
        assert part.labels.dtype == torch.int64
        assert part.labels.shape == (len(part),)


def test_digits_are_scaled_and_all_there_once(digits):
    from sklearn.datasets import load_digits

    raw = torch.from_numpy(load_digits().images)
    expected = (raw * 255 / 16).round().long().flatten(1).tolist()
    got = [row for part in digits[:3] for row in part.images.flatten(1).tolist()]
    assert sorted(got) == sorted(expected)


def test_digits_test_split_is_stratified(digits):
    counts = digits.test.labels.bincount(minlength=10)
    everything = torch.cat([part.labels for part in digits[:3]]).bincount(minlength=10)
    assert (counts - 0.2 * everything).abs().max() <= 1


def test_same_seed_same_splits(digits):
    for one, other in zip(digits[:3], load_data("digits", seed=0)[:3], strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


def test_another_seed_changes_validation_and_never_test(digits):
    other = load_data("digits", seed=1)
    assert not torch.equal(digits.validation.images, other.validation.images)
    assert torch.equal(digits.test.images, other.test.images)
    assert torch.equal(digits.test.labels, other.test.labels)


def test_what_is_split_off_and_the_rest_keep_their_order():
    whole = ImageSet(torch.zeros(23, 1, 2, 2, dtype=torch.uint8), torch.arange(23))
    rest, part = (images.labels for images in split_off(whole, 0.3, 5, "test", ""))
    assert len(part) == 7 and torch.equal(torch.cat([rest, part]).sort().values, whole.labels)
    for labels in (rest, part):
        assert torch.equal(labels, labels.sort().values)


def test_loading_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    load_data("digits", seed=3)
    assert torch.equal(torch.rand(1), expected)


def test_validation_fraction_counts(digits):
    half = load_data("digits", validation_fraction=0.5)
    assert abs(len(half.train) - len(half.validation)) <= 1


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_validation_fraction_outside_0_1(fraction):
    with pytest.raises(DataError, match=f"validation_fraction: {fraction} "):
        load_data("digits", validation_fraction=fraction)


@pytest.mark.parametrize("fraction", [0.0001, 0.9999])
def test_no_split_may_be_empty(fraction):
    message = f"validation split of {fraction} from 1437 images .* another --validation-fraction"
    with pytest.raises(DataError, match=message):
        load_data("digits", validation_fraction=fraction)


@pytest.mark.parametrize(
    ("name", "nearest"), [("fashion_mnist", "fashion-mnist"), ("FOLDER", "folder"), ("x", "")]
)
def test_unknown_name(name, nearest):
    with pytest.raises(DataError) as caught:
        load_data(name)
    assert str(caught.value).startswith(f"{name}: no such data set, did you mean {nearest}")
    assert ", ".join(DATASETS) in str(caught.value)


def test_image_size_resizes_every_split():
    splits = load_data("digits", image_size=(4, 6))
    assert splits.image_shape == (1, 4, 6)
    assert all(part.images.shape[1:] == (1, 4, 6) for part in splits[:3])
    assert splits.test.images.dtype == torch.uint8


def test_image_size_must_be_positive():
    with pytest.raises(DataError, match=r"image_size: \(0, 8\)"):
        load_data("digits", image_size=(0, 8))


def test_fit_crops_the_centre():
    # Columns 0, 0, 255, 255, 0, 0: the square middle of the picture is its two bright columns.
    images = torch.tensor([0, 0, 255, 255, 0, 0], dtype=torch.uint8).expand(3, 1, 2, 6)
    assert torch.equal(fit(images, (4, 4)), torch.full((3, 1, 4, 4), 255, dtype=torch.uint8))
    tall = fit(images.transpose(2, 3), (4, 4))
    assert torch.equal(tall, torch.full((3, 1, 4, 4), 255, dtype=torch.uint8))


def test_fit_is_antialiased():
    # One column in eight is bright: 255 / 8 = 31.9 on average, 0 where the samples would fall.
    stripes = torch.tensor([255] + [0] * 7, dtype=torch.uint8).repeat(8).expand(1, 1, 64, 64)
    assert (fit(stripes, (8, 8))[..., 1:-1] == 32).all()


def test_fit_keeps_order_across_batches():
    values = (torch.arange(1100) % 251).byte()
    resized = fit(values[:, None, None, None].expand(-1, 1, 2, 2), (3, 3))
    assert torch.equal(resized, values[:, None, None, None].expand(-1, 1, 3, 3))


def test_a_fingerprint_tells_data_apart_wherever_they_lie(tmp_path):
    def of(folder, **options):
        return load_data("folder", folder, **options).fingerprint

    paint(tmp_path / "one", 20)
    one = of(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert of(tmp_path / "two") == one
    assert of(packed(tmp_path / "one", tmp_path / "shards", 7)) == one
    assert of(tmp_path / "one", reading=Reading(stream_above=-1)) == one
    assert of(tmp_path / "one", seed=1) != one  # other splits

    (tmp_path / "two" / "ant" / "000.png").rename(tmp_path / "two" / "ant" / "new.png")
    renamed = of(tmp_path / "two")
    (tmp_path / "two" / "bee").rename(tmp_path / "two" / "wasp")
    reclassed = of(tmp_path / "two")
    (tmp_path / "two" / "ant" / "001.png").write_bytes(picture(1, (7, 9)))
    resized = of(tmp_path / "two", image_size=(6, 6))
    assert len({one, renamed, reclassed, resized}) == 4


def test_a_fingerprint_tells_data_sets_apart(digits):
    assert load_data("digits").fingerprint == digits.fingerprint
    assert load_data("digits", seed=1).fingerprint != digits.fingerprint
    names = digits.class_names
    assert fingerprint(digits[:3], names) == digits.fingerprint
    assert fingerprint(digits[:3], [*names[:-1], "neuf"]) != digits.fingerprint
