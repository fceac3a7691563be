"""What can be done with a finished run."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from softvq.data import DataError, load_data
from softvq.models import LEVEL, CodeLevel
from softvq.training.codes import SPLITS, read_codes
from softvq.training.commands import decode, encode, evaluate_run, reconstruct
from softvq.training.run_folder import RunError, RunFolder


@pytest.fixture
def run(tiny_run, tmp_path):
    return RunFolder(shutil.copytree(tiny_run, tmp_path / "run"))


@pytest.fixture
def codes(run, tmp_path):
    return encode(run, None, None, tmp_path / "codes.npz")


def pictures(folder, size=(8, 8), count=10, mode="L"):
    folder.mkdir(parents=True)
    for number in range(count):
        values = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(values).convert(mode).save(folder / f"{number}.png")
    return folder


def test_eval_measures_what_training_measured(run):
    values = evaluate_run(run, "test")
    assert values == pytest.approx(json.loads(run.summary.read_text())["test"], rel=1e-5)
    assert json.loads((run.path / "eval-test.json").read_text()) == values


def test_eval_of_another_split(run):
    assert evaluate_run(run, "validation") != evaluate_run(run, "test")
    assert (run.path / "eval-validation.json").is_file()


def test_encode_and_decode_go_round(run, codes, tmp_path):
    data, model = load_data("digits"), run.load_model(torch.device("cpu"))
    with np.load(codes) as file:
        assert {*SPLITS, *(f"{name}_labels" for name in SPLITS), "codebook_size"} == set(file)
        assert file["codebook_size"] == 8
        for name in SPLITS:
            split = getattr(data, name)
            assert file[name].shape == (len(split), 2, 2) and file[name].dtype == np.int32
            assert np.array_equal(file[f"{name}_labels"], split.labels)
        indices = torch.from_numpy(file["test"]).long()
    with torch.no_grad():
        assert torch.equal(model.encode_indices(data.test.images / 255)[LEVEL], indices)
        wanted = model.decode_indices({LEVEL: indices}).mul(255).round().byte()

    out = decode(run, codes, "test", tmp_path / "decoded")
    paths = sorted(out.iterdir())
    assert [path.name for path in paths] == [f"{n:05}.png" for n in range(len(indices))]
    for path, image in zip(paths, wanted, strict=True):
        with Image.open(path) as picture:
            assert picture.mode == "L"
            # Another batch size may round the other way.
            assert np.abs(np.array(picture, int) - image[0].numpy()).max() <= 1


def test_encode_other_images_of_the_same_shape(run, tmp_path):
    folder = pictures(tmp_path / "pictures")
    with np.load(encode(run, "folder", folder, tmp_path / "codes.npz")) as file:
        assert sum(len(file[name]) for name in SPLITS) == 10


@pytest.mark.parametrize(("size", "mode"), [((10, 8), "L"), ((8, 8), "RGB")])
def test_encode_images_of_another_shape(run, tmp_path, size, mode):
    folder = pictures(tmp_path / "pictures", size, mode=mode)
    with pytest.raises(DataError, match=r"folder: images of shape .* model is for \(1, 8, 8\)"):
        encode(run, "folder", folder, tmp_path / "codes.npz")
    assert not (tmp_path / "codes.npz").exists()


def test_reconstruct_pages_through_files_and_folders(run, tmp_path):
    folder = pictures(tmp_path / "pictures", count=14)
    single = pictures(tmp_path / "more", count=1, mode="RGB") / "0.png"  # made grey
    pages = reconstruct(run, [folder, single], tmp_path / "out")
    assert [page.name for page in pages] == ["reconstructions-0.png", "reconstructions-1.png"]
    for page in pages:
        Image.open(page).verify()


def test_reconstruct_names_an_image_of_another_size(run, tmp_path):
    folder = pictures(tmp_path / "pictures", (9, 8), count=1)
    with pytest.raises(DataError, match=r"0\.png: 9x8 pixels, expected 8x8"):
        reconstruct(run, [folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def save(**arrays):
    return lambda path: np.savez(path, **arrays)


def truncate(path):
    path.write_bytes(path.read_bytes()[:200])


def flip_bits(path):
    data = bytearray(path.read_bytes())
    data[100:160] = bytes(byte ^ 255 for byte in data[100:160])
    path.write_bytes(data)


def array_without_names(path):
    with path.open("wb") as file:
        np.save(file, np.zeros((2, 2, 2), int))


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip_bits,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"garbage" * 50),
        lambda path: path.unlink(),
        array_without_names,
        save(test=np.array([object()])),
        save(test=np.zeros((2, 2, 2))),
    ],
    ids=["truncated", "flipped", "empty", "garbage", "missing", "no names", "objects", "floats"],
)
def test_a_file_that_holds_no_codes(run, codes, damage, tmp_path):
    damage(codes)
    with pytest.raises(DataError) as caught:
        decode(run, codes, "train" if damage is flip_bits else "test", tmp_path / "out")
    assert str(caught.value).startswith(f"{codes}: cannot read codes (")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "grids",
    [
        np.full((2, 2, 2), 8),
        np.full((2, 2, 2), -1),
        np.zeros((2, 4), int),
        np.zeros((2, 3, 2), int),
        np.zeros((2, 2, 2, 1), int),
    ],
    ids=["too large", "negative", "flat", "another grid", "4-d"],
)
def test_codes_of_another_model(run, tmp_path, grids):
    np.savez(tmp_path / "codes.npz", test=grids)
    with pytest.raises(
        DataError, match=r"codes\.npz: 'test' is not code grids \(N, 2, 2\) in 0\.\.7"
    ):
        decode(run, tmp_path / "codes.npz", "test", tmp_path / "out")


def test_a_split_the_file_does_not_hold(run, codes):
    with pytest.raises(DataError, match=r"codes\.npz: holds no codes named 'holiday'"):
        read_codes(codes, "holiday", {LEVEL: CodeLevel((2, 2), 8)})


def test_an_unfinished_run_has_no_model(run):
    run.model.unlink()
    with pytest.raises(RunError, match=r"no model\.safetensors; the run has not finished"):
        evaluate_run(run, "test")


def test_a_model_of_other_settings(run):
    text = run.config.read_text()
    run.config.write_text(text.replace("codebook_size = 8", "codebook_size = 9"))
    with pytest.raises(RunError, match=r"does not fit the run's config\.toml"):
        evaluate_run(run, "test")
