"""What the commands for finished runs refuse: one clear line and exit status 2."""

import re

import pytest

from tests.pictures import plain
from tests.refusals import refused

pytestmark = pytest.mark.usefixtures("elsewhere")


AFTERWARDS = {
    "eval": (),
    "reconstruct": ("gone.png",),
    "encode": ("-o", "codes.npz"),
    "decode": ("codes.npz", "-o", "decoded"),
    "sample": ("-o", "drawn.png"),
    "report": (),
}


@pytest.mark.parametrize("command", AFTERWARDS)
def test_a_run_that_is_not_there(command, capsys):
    line = refused(capsys, command, "gone", *AFTERWARDS[command])
    assert line == "gone: no run there (no config.toml)"


@pytest.mark.parametrize("command", AFTERWARDS)
def test_a_run_with_a_broken_configuration(command, run, capsys):
    (run / "config.toml").write_bytes(b"\xff\xfe")
    line = refused(capsys, command, run, *AFTERWARDS[command])
    assert line.startswith(f"{run}/config.toml: not valid TOML")


@pytest.mark.parametrize("command", ["eval", "reconstruct", "encode", "decode", "sample"])
@pytest.mark.parametrize("length", [0, 5, 300, -1], ids=str)
def test_a_damaged_model(command, length, run, capsys):
    model = run / "model.safetensors"
    model.write_bytes(model.read_bytes()[:length])
    line = refused(capsys, command, run, *AFTERWARDS[command])
    assert line.startswith(f"{model}: damaged (")


def test_a_model_file_of_something_else(run, capsys):
    from safetensors.torch import save_file

    save_file({}, run / "model.safetensors")
    assert refused(capsys, "eval", run).startswith(f"{run}/model.safetensors: damaged (")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval", "RUN", "--split", "holiday"), "argument --split: invalid choice: 'holiday'"),
        (("eval", "RUN", "--splt", "test"), "unknown option --splt, did you mean --split?"),
        (("eval",), "the following arguments are required: run"),
        (("reconstruct", "RUN", "gone.png"), "gone.png: no such picture or folder"),
        (("reconstruct", "RUN", "text.png"), "text.png: cannot read this image ("),
        (("reconstruct", "RUN", "9x8"), "9x8/0.png: 8x9 pixels, expected 8x8"),
        (("reconstruct", "RUN", "8x8", "-o", "text.png"), "text.png: File exists"),
        (("encode", "RUN"), "the following arguments are required: -o/--out"),
        (("encode", "RUN", "-o", "text.png/codes.npz"), "text.png: File exists"),
        (("encode", "RUN", "gone.png", "-o", "codes.npz"), "gone.png: no such picture or folder"),
        (("encode", "RUN", "9x8", "-o", "codes.npz"), "9x8/0.png: 8x9 pixels, expected 8x8"),
        (("encode", "RUN", "two\nlines.png", "-o", "codes.npz"), "two\\nlines.png: no such"),
        (
            ("encode", "RUN", "8x8", "--data", "digits", "-o", "codes.npz"),
            "data: digits does not go with images that are named one by one",
        ),
        (
            ("encode", "RUN", "8x8", "--data-dir", "9x8", "-o", "codes.npz"),
            "data_dir: 9x8 does not go with images that are named one by one",
        ),
        (
            ("encode", "RUN", "--data", "folder", "--data-dir", "9x8", "-o", "codes.npz"),
            "folder: images of shape (1, 8, 9), but the model is for (1, 8, 8)",
        ),
        (
            ("encode", "RUN", "--data-dir", "8x8", "-o", "codes.npz"),
            "data_dir: 8x8 does not apply to data digits",
        ),
        (("eval", "RUN", "--data-dir", "8x8"), "data_dir: 8x8 does not apply to data digits"),
        (("decode", "RUN", "gone.npz", "-o", "decoded"), "gone.npz: cannot read codes ("),
        (("decode", "RUN", "text.png", "-o", "decoded"), "text.png: cannot read codes ("),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_the_other_commands_refuse(arguments, message, run, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no picture")
    plain(tmp_path / "8x8", [(8, 8)])
    plain(tmp_path / "9x8", [(9, 8)] * 10)
    arguments = [str(run) if argument == "RUN" else argument for argument in arguments]
    assert refused(capsys, *arguments).startswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("sample", "{vqvae2}", "-o", "d.png"),
            "{vqvae2}: its codes need a prior; train one with ",
        ),
        (
            ("sample", "{vqvae2}", "--prior", "{vae}", "-o", "d.png"),
            "{vae}: not a pixelcnn for the codes of {vqvae2}",
        ),
        (("sample", "{vqvae2}", "--prior", "gone", "-o", "d.png"), "gone: no run there ("),
        (
            ("sample", "{vae}", "--prior", "{pixelcnn}", "-o", "d.png"),
            "{vae}: model vae has no codes for a prior",
        ),
        (
            ("sample", "{pixelcnn}", "-o", "d.png"),
            "{pixelcnn}: a run of a pixelcnn; give the model it decodes with, and this run as",
        ),
        (
            ("sample", "{cvae}", "--class", "ten", "-o", "d.png"),
            "class: 'ten' is not one of 0, 1, ",
        ),
        (("sample", "{vae}", "--class", "7", "-o", "d.png"), "class: '7' is not known: the model"),
        (("sample", "{vae}", "--count", "0", "-o", "d.png"), "count: 0 is not allowed; it must be"),
        (("sample", "{vae}", "--count", "x", "-o", "d.png"), "argument --count: invalid int value"),
        (
            ("sample", "{vae}", "--temperature", "0", "-o", "d.png"),
            "temperature: 0.0 is not allowed; it must be from 1e-10 to 1e10",
        ),
        (("sample", "{vae}"), "the following arguments are required: -o/--out"),
        (("sample", "{vae}", "-o", "d.jpg"), "out: d.jpg is not allowed; it must end in .png"),
        (
            ("reconstruct", "{cvae}", "d.png"),
            "{cvae}: a cvae needs the class of each image; it cannot",
        ),
        (
            ("reconstruct", "{pixelcnn}", "d.png"),
            "{pixelcnn}: a pixelcnn needs codes, not images; it",
        ),
        (("encode", "{ae}", "-o", "codes.npz"), "{ae}: a run of model ae, which makes no codes of"),
        (
            ("decode", "{pixelcnn}", "codes.npz", "-o", "decoded"),
            "{pixelcnn}: a run of model pixelcnn, which makes no codes of images",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_a_model_cannot_do(arguments, message, tiny_runs, tmp_path, capsys):
    """{model} stands for its run."""

    def filled(text):
        return re.sub("{(.+?)}", lambda found: str(tiny_runs(found[1])), text)

    message, *arguments = map(filled, (message, *arguments))
    assert refused(capsys, *arguments).startswith(message)
    assert not list(tmp_path.iterdir())


def test_a_report_needs_metrics(run, capsys):
    (run / "metrics.jsonl").unlink()
    assert refused(capsys, "report", run).startswith(f"{run}: no metrics.jsonl there")
