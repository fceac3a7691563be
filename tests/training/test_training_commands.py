"""What can be done with a finished run."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from softvq.cli import main
from softvq.data import DataError, load_data
from softvq.models import LEVEL, CodeLevel
from softvq.training import commands
from softvq.training.codes import SPLITS, array_name, read_codes
from softvq.training.commands import (
    decode,
    encode,
    encode_pictures,
    evaluate_run,
    reconstruct,
    sample,
)
from softvq.training.config import TrainConfig
from softvq.training.run_folder import RunError, RunFolder
from softvq.training.trainer import train
from tests.pictures import plain
from tests.runs import metrics_of


@pytest.fixture
def copy_of(tiny_runs, tmp_path):
    """The folder of a finished run, to be changed at will; arguments as for tiny_runs."""

    def copy(*names):
        run = tiny_runs(*names)
        return RunFolder(shutil.copytree(run, tmp_path / "runs" / run.name))

    return copy


@pytest.fixture
def run(copy_of):
    return copy_of("soft-vqvae")


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
    values = evaluate_run(run, "validation")
    assert values != evaluate_run(run, "test")
    assert (run.path / "eval-validation.json").is_file()
    best = (json.loads(run.summary.read_text())["best_step"], "validation")
    (line,) = (line for line in metrics_of(run.path) if (line["step"], line["split"]) == best)
    assert values == pytest.approx({name: line[name] for name in values}, rel=1e-5)


@pytest.mark.parametrize(
    ("model", "suffixes"),
    [("soft-vqvae", {LEVEL: ""}), ("vqvae2", {"top": "_top", "bottom": "_bottom"})],
)
def test_encode_and_decode_go_round(copy_of, model, suffixes, tmp_path):
    run = copy_of(model)
    codes = encode(run, None, None, tmp_path / "codes.npz")
    data, model = load_data("digits"), run.load_model(torch.device("cpu"))
    grids = {"": (2, 2), "_top": (1, 1), "_bottom": (2, 2)}
    with np.load(codes) as file:
        names = {f"{split}{suffix}" for split in SPLITS for suffix in suffixes.values()}
        names |= {*(f"{split}_labels" for split in SPLITS), "codebook_size", "model", "class_names"}
        assert names == set(file)
        assert file["codebook_size"] == 8 and file["model"] == run.fingerprint()
        assert file["class_names"].tolist() == [str(digit) for digit in range(10)]
        for split in SPLITS:
            images = getattr(data, split)
            for suffix in suffixes.values():
                held = file[f"{split}{suffix}"]
                assert held.shape == (len(images), *grids[suffix]) and held.dtype == np.int32
            assert np.array_equal(file[f"{split}_labels"], images.labels)
        indices = {
            level: torch.from_numpy(file[f"test{suffix}"]).long()
            for level, suffix in suffixes.items()
        }
    with torch.no_grad():
        encoded = model.encode_indices(data.test.images / 255)
        assert encoded.keys() == indices.keys()
        assert all(torch.equal(encoded[level], indices[level]) for level in indices)
        wanted = model.decode_indices(indices).mul(255).round().byte()

    out = decode(run, codes, "test", tmp_path / "decoded")
    paths = sorted(out.iterdir())
    assert [path.name for path in paths] == [f"{n:05}.png" for n in range(len(wanted))]
    for path, image in zip(paths, wanted, strict=True):
        with Image.open(path) as picture:
            assert picture.mode == "L"
            # Another batch size may round the other way.
            difference = np.abs(np.array(picture, int) - image[0].numpy())
        assert difference.max() <= 1 and difference.mean() < 0.1


@pytest.mark.parametrize("model", ["soft-vqvae", "vqvae2"])
def test_pictures_are_encoded_as_the_images_of_a_data_set_are(
    copy_of, model, tmp_path, monkeypatch
):
    run, images = copy_of(model), load_data("digits").test.images[:5]
    monkeypatch.setattr(commands, "batch_size", lambda shape: 2)
    plain(tmp_path / "some", [(8, 8)] * 5)
    paths = [*sorted((tmp_path / "some").iterdir()), tmp_path / "colour.png"]
    for path, image in zip(paths, images[[*range(5), 0]], strict=True):
        mode = "RGB" if path.name == "colour.png" else "L"
        Image.fromarray(image[0].numpy()).convert(mode).save(path)

    sources, codes = [tmp_path / "some", paths[-1]], tmp_path / "new" / "codes.npz"
    assert main(["encode", *map(str, [run.path, *sources, "-o", codes])]) == 0
    with np.load(codes) as file:
        assert file["files"].tolist() == [str(path) for path in paths]
        assert file["pictures_labels"].tolist() == [-1] * 6 and "class_names" not in file
        held = {name: file[name] for name in file if file[name].ndim == 3}
    with torch.no_grad():
        encoded = run.load_model(torch.device("cpu")).encode_indices(images / 255)
    assert held.keys() == {array_name("pictures", level) for level in encoded}
    for level, indices in encoded.items():
        wanted = torch.cat([indices, indices[:1]]).numpy()
        assert np.array_equal(held[array_name("pictures", level)], wanted)
    assert len(list(decode(run, codes, "pictures", tmp_path / "decoded").iterdir())) == 6


def test_pictures_are_fitted_where_those_of_the_training_were(tmp_path):
    plain(tmp_path / "pictures", [(12, 10)] * 10)
    config = TrainConfig(
        model="vqvae",
        data="folder",
        data_dir=tmp_path / "pictures",
        image_size="8x8",
        codebook_size=4,
        batch_size=4,
        steps=1,
        device="cpu",
    )
    run = RunFolder(tmp_path / "run")
    assert train(config, run.path, quiet=True)
    with np.load(encode_pictures(run, [tmp_path / "pictures"], tmp_path / "codes.npz")) as file:
        assert len(file["pictures"]) == 10


def test_a_file_without_one_of_the_levels(copy_of, run, codes, tmp_path):
    with pytest.raises(DataError, match=r"codes\.npz: holds no codes named 'test_top', but .*test"):
        decode(copy_of("vqvae2"), codes, "test", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", ["ae", "vae", "cvae", "pixelcnn"])
def test_a_model_without_codes_of_images_neither_encodes_nor_decodes(tiny_runs, model, tmp_path):
    run = RunFolder(tiny_runs(model))
    message = f"{model}.*: a run of model {model}, which makes no codes of images"
    with pytest.raises(RunError, match=message):
        encode(run, None, None, tmp_path / "codes.npz")
    with pytest.raises(RunError, match=message):
        decode(run, tmp_path / "codes.npz", "test", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_encode_other_images_of_the_same_shape(run, tmp_path):
    folder = pictures(tmp_path / "pictures")
    with np.load(encode(run, "folder", folder, tmp_path / "codes.npz")) as file:
        assert sum(len(file[name]) for name in SPLITS) == 10


def test_encode_other_data_than_the_folder_of_the_run(run, codes, tmp_path):
    text = run.config.read_text()
    of_folder = 'data = "folder"\ndata_dir = "gone"\nworkers = 1'
    run.config.write_text(text.replace('data = "digits"', of_folder))
    again = encode(run, "digits", None, tmp_path / "again.npz")
    with np.load(again) as found, np.load(codes) as file:
        assert all(np.array_equal(found[name], file[name]) for name in file)


def test_encode_grey_images_with_a_model_of_colour(tmp_path):
    settings = {"data": "folder", "steps": 1, "batch_size": 4, "width": 2, "workers": 0}
    config = TrainConfig(data_dir=pictures(tmp_path / "colour", mode="RGB"), **settings)
    assert train(config, tmp_path / "run", quiet=True)
    run, grey = RunFolder(tmp_path / "run"), pictures(tmp_path / "grey")
    with np.load(encode(run, "folder", grey, tmp_path / "codes.npz")) as file:
        codes = torch.from_numpy(file["train"])
    images = load_data("folder", grey).train.images.expand(-1, 3, -1, -1) / 255
    wanted = run.load_model(torch.device("cpu")).encode_indices(images)[LEVEL]
    assert torch.equal(codes, wanted.int())


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


@pytest.mark.parametrize(
    ("model", "shown"),
    [
        ("soft-vqvae", ["input", "reconstruction", "soft codes", "nearest codes"]),
        ("vqvae", ["input", "reconstruction"]),  # which is that of the nearest codes
        ("vqvae2", ["input", "reconstruction"]),
        ("vae", ["input", "reconstruction"]),
    ],
)
def test_reconstruct_shows_what_the_model_can_make(tiny_runs, saved_rows, model, shown, tmp_path):
    folder = pictures(tmp_path / "pictures", count=3)
    run = RunFolder(tiny_runs(model))
    reconstruct(run, [folder], tmp_path / "out")
    assert [label for label, _ in saved_rows] == shown
    assert all(images.shape == (3, 1, 8, 8) for _, images in saved_rows)
    outputs = run.load_model(torch.device("cpu")).evaluate(saved_rows[0][1]).outputs
    assert torch.equal(saved_rows[1][1], outputs["reconstruction_error"])


@pytest.mark.parametrize(
    ("model", "message"),
    [("cvae", "a cvae needs the class of each image"), ("pixelcnn", "a pixelcnn needs codes")],
)
def test_reconstruct_of_a_model_that_needs_more_than_images(tiny_runs, model, message, tmp_path):
    folder = pictures(tmp_path / "pictures", count=1)
    with pytest.raises(RunError, match=message):
        reconstruct(RunFolder(tiny_runs(model)), [folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_reconstruct_names_an_image_of_another_size(run, tmp_path):
    folder = pictures(tmp_path / "pictures", (9, 8), count=1)
    with pytest.raises(DataError, match=r"0\.png: 9x8 pixels, expected 8x8"):
        reconstruct(run, [folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_reconstruct_fits_images_as_training_did(saved_rows, tmp_path):
    folder = pictures(tmp_path / "pictures", (12, 17), mode="RGB")
    config = TrainConfig(
        data="folder", data_dir=folder, image_size="8", steps=1, batch_size=4, width=2, workers=0
    )
    assert train(config, tmp_path / "run", quiet=True)
    paths = sorted(folder.iterdir())
    reconstruct(RunFolder(tmp_path / "run"), paths, tmp_path / "out")
    ((_, inputs), *_) = saved_rows
    splits = load_data("folder", folder, image_size=(8, 8))
    trained = torch.cat([split.images for split in splits[:3]])
    assert len(inputs) == len(trained) == 10
    found = {tuple(image.flatten().tolist()) for image in inputs.mul(255).round().byte()}
    assert found == {tuple(image.flatten().tolist()) for image in trained}


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


def test_codes_of_a_model_that_has_changed_since(run, codes, tmp_path):
    with safe_open(run.model, "pt") as file:
        shape = file.metadata()
    save_file({name: x + 1 for name, x in load_file(run.model).items()}, run.model, shape)
    with pytest.raises(DataError, match=r"codes\.npz: codes of another model"):
        decode(run, codes, "test", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_pictures_of_more_codes(run, codes, tmp_path):
    """Ones that stay would be taken for these."""
    out = decode(run, codes, "test", tmp_path / "out")
    assert decode(run, codes, "test", out) == out  # the same again
    with pytest.raises(DataError, match=r"out: holds 00144\.png, .* choose an empty or a new"):
        decode(run, codes, "validation", out)
    several = [out / f"{n:05}.png" for n in range(commands.PER_ROW + 1)]
    pages = reconstruct(run, several, tmp_path / "pages")
    assert reconstruct(run, several, tmp_path / "pages") == pages and len(pages) == 2
    with pytest.raises(DataError, match=r"pages: holds reconstructions-1\.png, .*empty"):
        reconstruct(run, [out / "00000.png"], tmp_path / "pages")


def test_a_split_the_file_does_not_hold(run, codes):
    with pytest.raises(DataError, match=r"codes\.npz: holds no codes named 'holiday'"):
        read_codes(codes, "holiday", {LEVEL: CodeLevel((2, 2), 8)}, run.fingerprint())


def test_an_unfinished_run_has_no_model(run):
    run.model.unlink()
    with pytest.raises(RunError, match=r"no model\.safetensors; the run has not finished"):
        evaluate_run(run, "test")


def test_a_model_of_other_settings(run):
    text = run.config.read_text()
    run.config.write_text(text.replace("codebook_size = 8", "codebook_size = 9"))
    with pytest.raises(RunError, match=r"does not fit the run's config\.toml"):
        evaluate_run(run, "test")


def test_a_configuration_without_what_followed_from_the_images(run):
    before = evaluate_run(run, "test")
    kept = [line for line in run.config.read_text().splitlines() if "latent_grid" not in line]
    run.config.write_text("\n".join(kept))
    assert evaluate_run(run, "test") == before


@pytest.mark.parametrize(
    ("place", "named"), [("file/codes.png", "file"), ("folder.png", "folder.png")]
)
def test_a_place_that_cannot_be_written_is_known_before_the_work(
    tiny_runs, tmp_path, monkeypatch, place, named
):
    for work in ("build_data", "sampled_rows"):
        monkeypatch.setattr(commands, work, lambda *_: pytest.fail("began"))
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    out = tmp_path / place
    with pytest.raises(OSError, match=f"{tmp_path / named}'$"):
        encode(RunFolder(tiny_runs("vqvae")), None, None, out)
    with pytest.raises(OSError, match=f"{tmp_path / named}'$"):
        sample(RunFolder(tiny_runs("vae")), None, 2, None, temperature=None, seed=0, out=out)
    assert {path.name for path in tmp_path.rglob("*")} == {"file", "folder.png"}
