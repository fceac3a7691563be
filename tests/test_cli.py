"""The command line: what it runs, its help, and the program itself."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import softvq
from softvq.cli import main
from softvq.training.config import TrainConfig
from tests.pictures import plain

ROOT = Path(__file__).parent.parent
COMMANDS = ("train", "eval", "reconstruct", "encode", "decode", "sample", "report")
FAST = ("--steps", "2", "--width", "2", "--quiet")
pytestmark = pytest.mark.usefixtures("elsewhere")


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


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_a_configuration_file_is_utf8_whatever_the_locale():
    Path("c.toml").write_bytes("# größer\nsteps = 0\n".encode())
    command = [sys.executable, ROOT / "train.py", "--config", "c.toml"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ASCII)
    assert "c.toml: steps: 0 is not allowed" in done.stderr


def test_a_path_in_utf8_whatever_the_locale(tmp_path):
    plain(tmp_path / "größer", [(8, 8)] * 20)
    command = [sys.executable, ROOT / "train.py", "--data", "folder", "--data-dir", "größer"]
    subprocess.run([*command, "--out", "run", *FAST], check=True, env=os.environ | ASCII)
    assert main(["train", "--out", "run", "--resume", "--quiet"]) == 0
    command = [sys.executable, "-m", "softvq", "eval", tmp_path / "run"]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | ASCII)


def test_a_run_folder_whose_name_is_no_text(run):
    odd = run.rename(os.fsdecode(b"run\xff"))
    for command, *options in (["train", "--resume", "--out"], ["eval"], ["report"]):
        assert main([command, *options, str(odd)]) == 0


def test_resume_may_repeat_the_settings(tmp_path):
    plain(tmp_path / "images", [(8, 8)] * 20)
    same = ("--data", "folder", "--data-dir", "images", "--out", "run", *FAST)
    assert main(["train", *same, "--image-size", "8x8"]) == 0
    changed = ("--image-size", "8", "--device", "cpu", "--on-nan", "skip")
    assert main(["train", "--resume", *changed, *same]) == 0


def test_resume_compares_values_and_not_their_spelling(tmp_path):
    first = ("--temperature", ".5", "--temperature-ratio", "0.1", "--latent-grid", "2x2")
    again = ("--temperature", "0.50", "--temperature-ratio", ".1", "--latent-grid", "2")
    more = ("--batch-size", "5000", "--out", "run", *FAST)  # more than the 1,293 there are
    assert main(["train", *first, *more]) == 0
    assert main(["train", *again, *more, "--resume"]) == 0


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
