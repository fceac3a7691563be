"""The command line: what it runs, and one clear line and exit status 2 for what it cannot."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import softvq
from softvq.cli import main
from softvq.training.config import TrainConfig

ROOT = Path(__file__).parent.parent
COMMANDS = ("train", "eval", "reconstruct", "encode", "decode", "sample", "report")
FAST = ("--steps", "2", "--width", "2", "--quiet")
pytestmark = pytest.mark.usefixtures("elsewhere")


def refused(capsys, *arguments):
    """What stderr says of a bad call, without the "softvq COMMAND: error: " before it."""
    capsys.readouterr()  # what a run made for the test had to say
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert caught.value.code == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1 and printed.err.endswith("\n")
    prefix, line = printed.err.strip().split(" error: ")
    assert prefix == f"softvq {arguments[0]}:"
    return line


def pictures(folder, sizes):
    folder.mkdir()
    for number, size in enumerate(sizes):
        Image.new("L", size).save(folder / f"{number}.png")
    return folder


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_train_needs_nothing_but_steps(tmp_path, capsys):
    assert main(["train", *FAST]) == 0
    assert (tmp_path / "runs" / "digits-soft-vqvae" / "summary.json").is_file()
    assert capsys.readouterr().out == ""


def test_options_override_the_configuration_file(tmp_path):
    Path("c.toml").write_text("steps = 50\nwidth = 2\nlr = 0.5\n")
    assert main(["train", "--config", "c.toml", "--steps", "2", "--out", "run", "--quiet"]) == 0
    text = (tmp_path / "run" / "config.toml").read_text()
    assert "steps = 2\n" in text and "width = 2\n" in text and "lr = 0.5\n" in text


def test_every_command_on_a_finished_run(run, capsys):
    assert main(["eval", str(run)]) == 0
    error = json.loads((run / "summary.json").read_text())["test"]["reconstruction_hard_error"]
    lines = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert float(lines["reconstruction_hard_error"]) == pytest.approx(error, rel=1e-4)

    assert main(["encode", str(run), "-o", "codes.npz"]) == 0
    assert main(["decode", str(run), "codes.npz", "--split", "validation", "-o", "decoded"]) == 0
    assert main(["reconstruct", str(run), "decoded", "-o", "pages"]) == 0
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").is_file()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"usage: softvq {command}" in capsys.readouterr().out


def test_help_says_what_a_run_is_and_where_pictures_go(capsys):
    with pytest.raises(SystemExit):
        main(["reconstruct", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "run run folder of `softvq train`" in text
    assert "folder; default: reconstructions" in text


def test_help_where_the_terminal_knows_ascii_alone(monkeypatch):
    page = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(page, encoding="ascii"))
    with pytest.raises(SystemExit) as caught:
        main(["train", "--help"])
    sys.stdout.flush()
    assert caught.value.code == 0
    assert rb"weight of \u2016X" in page.getvalue()


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n    {command}" in text for command in COMMANDS)


def test_help_of_train_shows_every_setting_and_its_default(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    config = TrainConfig()
    for name in vars(config):
        assert f"--{name.replace('_', '-')} " in text
    for default in ("128", "0.002", "exponential", "256,64", "free_energy"):
        assert f"default: {default}" in text


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("reconstruction-weight", "default: 10.0, 10000.0 for soft-vqvae, 1.0 for ae"),
        ("temperature", "only for soft-vqvae, vqvae-gumbel; default: auto, 1 for vqvae-gumbel"),
        ("decay", "only for vqvae-ema, vqvae2; default: 0.95"),
        ("codebook-size", "not for ae, vae, cvae, pixelcnn; default: 128"),
        ("width", "default: 32, 64 for pixelcnn"),
        ("tokenizer", "only for pixelcnn"),
        ("lr", "default: 0.002"),
    ],
)
def test_help_of_train_shows_the_defaults_by_model(option, said, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    _, _, options = text.partition(" model: ")  # after the usage
    _, _, rest = options.partition(f" --{option} ")
    assert said in rest.partition(" --")[0]


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"softvq {softvq.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["trian"]], ids=["no command", "unknown command"])
def test_the_command_itself(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith("softvq: error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--codebok-size", "8"), "unknown option --codebok-size, did you mean --codebook-size?"),
        (("--codebok-size=8",), "unknown option --codebok-size=8, did you mean --codebook-size?"),
        (("--xyzzy",), "unknown option --xyzzy"),
        (("--step", "3"), "unknown option --step, did you mean --steps?"),
        (("--model", "gan"), "argument --model: invalid choice: 'gan' (choose from "),
        (("--data", "digit"), "argument --data: invalid choice: 'digit' (choose from "),
        (("--steps", "0"), "steps: 0 is not allowed; it must be from 1 to 2^48"),
        (("--steps", "many"), "argument --steps: invalid int value: 'many'"),
        (("--steps",), "argument --steps: expected one argument"),
        (("--temperature", "0"), "temperature: 0 is not allowed; it must be auto or a number"),
        (("--temperature", "-1"), "temperature: -1 is not allowed"),
        (("--temperature", "nan"), "temperature: nan is not allowed"),
        (("--codebook-size", "0"), "codebook_size: 0 is not allowed"),
        (("--lr", "nan"), "lr: nan is not allowed"),
        (("--batch-size", "1"), "batch_size: 1 is not allowed"),
        (("--seed", "99999999999999999999"), "seed: 99999999999999999999 is not allowed"),
        (("--latent-grid", "9x2"), "latent_grid: latent grid 9x2 must lie between 1x1 and "),
        (("--data", "folder"), "folder: needs the folder of the images; give it with --data-dir"),
        (("--data", "folder", "--data-dir", "gone"), "gone: no such folder"),
        (
            ("--data-dir", "pictures"),
            "data_dir: pictures does not apply to data digits, which have no folder; give --data ",
        ),
        (("--config", "gone.toml"), "gone.toml: cannot read the configuration"),
        (("--resume",), "--resume needs the run folder: --out RUN"),
        (("--resume", "--out", "gone"), "gone: no run there (no config.toml)"),
        (
            ("--model", "vae", "--codebook-size", "8"),
            "codebook_size: 8 does not apply to model vae, only to soft-vqvae, vqvae, ",
        ),
        (("--decay", "0.9"), "decay: 0.9 does not apply to model soft-vqvae, only to vqvae-ema"),
        (
            ("--model", "vqvae", "--tokenizer", "run"),
            "tokenizer: run does not apply to model vqvae, only to pixelcnn",
        ),
        (
            ("--model", "pixelcnn", "--tokenizer", "run", "--data", "digits"),
            "data: digits does not apply to model pixelcnn, only to ",
        ),
        (("--model", "pixelcnn"), "tokenizer: a pixelcnn learns the codes of a trained model"),
        (("--model", "pixelcnn", "--tokenizer", "gone"), "gone: no run there (no config.toml)"),
        (("--resume", "--overwrite"), "argument --overwrite: not allowed with argument --resume"),
        (("--out", "/proc/x"), "/proc/x: cannot write a run there ("),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_train_refuses(arguments, message, capsys, tmp_path):
    line = refused(capsys, "train", *arguments)
    assert line.startswith(message)
    assert ("did you mean" in line) == ("did you mean" in message)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_images(tmp_path, capsys):
    folder = pictures(tmp_path / "empty", [])
    line = refused(capsys, "train", "--data", "folder", "--data-dir", folder)
    assert line.startswith(f"{folder}: no images there")


def test_images_of_several_sizes(tmp_path, capsys):
    folder = pictures(tmp_path / "mixed", [(8, 8)] * 9 + [(9, 8)])
    line = refused(capsys, "train", "--data", "folder", "--data-dir", folder)
    assert "9.png: 8x9 pixels, but" in line and "--image-size" in line


def test_a_truncated_idx_file(tmp_path, capsys):
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (tmp_path / f"{name}-ubyte").write_bytes(b"\0\0\x08\x03\0\0\0\x05\0\0\0\x1c")
    line = refused(capsys, "train", "--data", "mnist", "--data-dir", tmp_path)
    assert line.startswith(f"{tmp_path}/train-images-idx3-ubyte: is not an idx file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = = 2", "c.toml: not valid TOML ("),
        ("stepz = 2", "c.toml: unknown setting 'stepz', did you mean steps?"),
        ("steps = 'two'", "c.toml: steps: 'two' is not a whole number"),
        ("data_dir = 3", "c.toml: data_dir: 3 is not a path"),
        ("steps = 0", "c.toml: steps: 0 is not allowed; it must be from 1 to 2^48"),
        ("dropout = 0.5", "c.toml: dropout: 0.5 does not apply to model soft-vqvae, only to"),
    ],
)
def test_a_bad_configuration_file(text, message, capsys):
    Path("c.toml").write_text(text)
    assert refused(capsys, "train", "--config", "c.toml").startswith(message)


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_a_configuration_file_is_utf8_whatever_the_locale():
    Path("c.toml").write_bytes("# größer\nsteps = 0\n".encode())
    command = [sys.executable, ROOT / "train.py", "--config", "c.toml"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ASCII)
    assert "c.toml: steps: 0 is not allowed" in done.stderr


def test_a_run_is_not_overwritten_unasked(run, capsys):
    before = files(run)
    line = refused(capsys, "train", "--out", run)
    assert line.startswith(f"{run}: already holds a run; continue it with --resume")
    assert files(run) == before


def test_overwriting_with_bad_data_loses_nothing(run, capsys):
    before = files(run)
    arguments = ("--overwrite", "--out", run, "--data", "folder", "--data-dir", "gone")
    assert refused(capsys, "train", *arguments).startswith("gone: no such folder")
    assert refused(capsys, "train", "--overwrite", "--out", run, "--latent-grid", "99")
    assert files(run) == before


def test_a_path_in_utf8_whatever_the_locale(tmp_path):
    pictures(tmp_path / "größer", [(8, 8)] * 20)
    command = [sys.executable, ROOT / "train.py", "--data", "folder", "--data-dir", "größer"]
    subprocess.run([*command, "--out", "run", *FAST], check=True, env=os.environ | ASCII)
    assert main(["train", "--out", "run", "--resume", "--quiet"]) == 0
    command = [sys.executable, "-m", "softvq", "eval", tmp_path / "run"]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | ASCII)


def test_a_run_folder_whose_name_is_no_text(run):
    odd = run.rename(os.fsdecode(b"run\xff"))
    for command, *options in (["train", "--resume", "--out"], ["eval"], ["report"]):
        assert main([command, *options, str(odd)]) == 0


@pytest.mark.parametrize("below", ["", "run"])
def test_a_run_folder_that_cannot_be_made(below, tmp_path, capsys):
    (tmp_path / "file").write_text("here already")
    out = tmp_path / "file" / below
    line = refused(capsys, "train", "--out", out)
    assert line.startswith(f"{out}: cannot write a run there (")


def test_resume_keeps_the_settings(run, capsys):
    before = files(run)
    line = refused(capsys, "train", "--resume", "--out", run, "--lr", "0.5")
    assert line.startswith("lr: 0.5 differs from the run's 0.002")
    Path("c.toml").write_text("lr = 0.5")
    assert refused(capsys, "train", "--resume", "--out", run, "--config", "c.toml") == line
    assert files(run) == before


def test_resume_may_repeat_the_settings(tmp_path):
    pictures(tmp_path / "images", [(8, 8)] * 20)
    same = ("--data", "folder", "--data-dir", "images", "--out", "run", *FAST)
    assert main(["train", *same]) == 0
    assert main(["train", "--resume", "--device", "cpu", "--on-nan", "skip", *same]) == 0


def test_resume_compares_values_and_not_their_spelling(tmp_path):
    first = ("--temperature", ".5", "--temperature-ratio", "0.1", "--latent-grid", "2x2")
    again = ("--temperature", "0.50", "--temperature-ratio", ".1", "--latent-grid", "2")
    more = ("--batch-size", "5000", "--out", "run", *FAST)  # more than the 1,293 there are
    assert main(["train", *first, *more]) == 0
    assert main(["train", *again, *more, "--resume"]) == 0


@pytest.mark.parametrize(
    ("option", "value"), [("temperature", "0.5"), ("latent-grid", "2x1"), ("latent-grid", "two")]
)
def test_resume_refuses_other_values_as_text(option, value, run, capsys):
    line = refused(capsys, "train", "--resume", "--out", run, f"--{option}", value)
    assert line.startswith(f"{option.replace('-', '_')}: {value} differs from the run's ")


def test_resume_without_a_usable_checkpoint(run, capsys):
    states = sorted((run / "checkpoints").rglob("tensors.safetensors"))
    for state in states:
        state.write_bytes(b"garbage" * 10)
    line = refused(capsys, "train", "--resume", "--out", run, "--quiet")
    assert line.startswith(f"{run}/checkpoints/step-12: damaged checkpoint (tensors.safetensors ")
    shutil.rmtree(run / "checkpoints")
    line = refused(capsys, "train", "--resume", "--out", run, "--quiet")
    assert line.startswith(f"{run}: no checkpoint to resume from")


def test_a_prior_from_the_training_to_the_picture(capsys, tmp_path):
    assert main(["train", "--model", "vqvae", *FAST, "--out", "runs/codes"]) == 0
    prior = ["train", "--model", "pixelcnn", "--tokenizer", "runs/codes", "--layers", "1", *FAST]
    assert main(prior) == 0
    run = tmp_path / "runs" / "codes-pixelcnn"  # named after the codes
    assert (run / "summary.json").is_file()
    # Where it is run from later does not matter.
    assert f'tokenizer = "{tmp_path}/runs/codes"\n' in (run / "config.toml").read_text()
    assert main([*prior, "--resume", "--out", str(run)]) == 0

    assert main(["eval", str(run)]) == 0
    lines = dict(line.split() for line in capsys.readouterr().out.splitlines())
    tested = json.loads((run / "summary.json").read_text())["test"]
    assert float(lines["bits_per_dim"]) == pytest.approx(tested["bits_per_dim"], rel=1e-4)
    drawing = ["sample", "runs/codes", "--prior", str(run), "--count", "3", "--class", "4"]
    assert main([*drawing, "--temperature", "0.5", "--seed", "1", "-o", "drawn.png"]) == 0
    Image.open("drawn.png").verify()
    assert capsys.readouterr().out == "drawn.png\n"


@pytest.mark.parametrize(("given", "drawn"), [((), 64), (("--count", "7"), 7)])
def test_sample_draws_64_or_as_many_as_asked(given, drawn, tiny_runs, monkeypatch):
    seen = []
    monkeypatch.setattr("softvq.training.commands.save_rows", lambda path, rows: seen.extend(rows))
    assert main(["sample", str(tiny_runs("vae")), *given, "-o", "drawn.png"]) == 0
    assert sum(len(images) for _, images in seen) == drawn


def test_sample_follows_the_seed(tiny_runs):
    drawn = []
    for seed in ("1", "1", "2"):
        assert main(["sample", str(tiny_runs("vae")), "--seed", seed, "-o", "drawn.png"]) == 0
        drawn.append(Path("drawn.png").read_bytes())
    assert drawn[0] == drawn[1] != drawn[2]


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
        (("encode", "RUN", "-o", "text.png/codes.npz"), "text.png/codes.npz: Not a directory"),
        (("encode", "RUN", "-o", "gone/codes.npz"), "gone/codes.npz: No such file"),
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
    pictures(tmp_path / "8x8", [(8, 8)])
    pictures(tmp_path / "9x8", [(9, 8)] * 10)
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
        (("sample", "{vae}", "-o", "gone/d.png"), "gone/d.png: No such file or directory"),
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


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ("--stepz", "3"),
            "softvq train: error: unknown option --stepz, did you mean --steps?\n",
        ),
        (
            ("--data", "folder", "--data-dir", "gone"),
            "softvq train: error: gone: no such folder; give --data-dir a folder of images\n",
        ),
    ],
    ids=["option", "data"],
)
def test_the_real_program(arguments, line):
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *arguments], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)
