"""The HTML page of a run: whole, escaped, self-contained, and honest about what is missing."""

import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from softvq.training.history import read_history
from softvq.training.pictures import save_codebook_usage, save_rows
from softvq.training.report import write_report
from softvq.training.run_folder import RunError, RunFolder

VOID = {"meta", "link", "img", "path"}
TEST = {
    "reconstruction_error": 0.0055,
    "quantizing_error": 1.234e-5,
    "reconstruction_quantizing_error": 0.00702,
    "reconstruction_hard_error": 0.00834,
    "codebook_usage": 0.881,
    "perplexity": 241.3,
    "psnr_hard": 20.79,
    "brand_new_metric": 33.25,
}
CONFIG = """
seed = 7
model = "soft-vqvae"
codebook_size = 512
data = "fashion-mnist"
data_dir = "<script>alert(1)</script>&"
"""


class Page(HTMLParser):
    """The text, tags and attributes of a page; complains about tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.text = " ".join(self.text.split())
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data + " "


def train_line(step: int) -> dict[str, object]:
    return {
        "step": step,
        "split": "train",
        "loss": 0.1 / (1 + step),
        "reconstruction_error": 0.05,
        "temperature": 10 * 0.999**step,
        "images_per_second": 1234.0,
    }


def validation_line(step: int) -> dict[str, object]:
    return {
        "step": step,
        "split": "validation",
        "reconstruction_quantizing_error": 0.02,
        "reconstruction_hard_error": 0.02 + 1 / (10 + step),
        "perplexity": 40.0,
    }


def write_run(
    run: Path, lines: list[dict[str, object]], *, tail: str = "", config: str = CONFIG
) -> Path:
    (run / "config.toml").write_text(config)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(text + tail)
    return run


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    lines = [train_line(step) for step in range(0, 2001, 2)]
    write_run(tmp_path, [*lines, *(validation_line(step) for step in range(0, 2001, 500))])
    save_rows(tmp_path / "reconstructions.png", [("input", torch.rand(2, 1, 8, 8))])
    save_codebook_usage(tmp_path / "codebook_usage.png", torch.arange(512))
    summary = {
        "test": TEST,
        "images_per_second": 10412.3,
        "device": "NVIDIA H200",
        "versions": {"torch": "2.15.0"},
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    return tmp_path


def report(run: Path) -> Page:
    path = write_report(RunFolder(run))
    assert path == run / "report.html"
    return Page(path.read_text("utf-8"))


def test_a_finished_run_shows_its_numbers(finished: Path) -> None:
    page = report(finished)
    assert page.text.startswith("soft-vqvae on fashion-mnist · softvq")
    for text in (
        "Hard error 0.00834",
        "Hard PSNR 20.79 dB",
        "Soft-hard gap 0.00132 +19% on the soft error",
        "Codebook usage 88.1%",
        "Perplexity 241.3 of 512 codes",
        "Images / second 10,412 NVIDIA H200",
        "quantizing_error 1.23e-5 ↓ lower",
        "brand_new_metric 33.25",
        "seed 7",
        "versions.torch 2.15.0",
    ):
        assert text in page.text
    assert "no summary.json" not in page.text


def test_the_page_is_one_file_with_its_pictures_in_it(finished: Path) -> None:
    html = write_report(RunFolder(finished)).read_text("utf-8")
    page = Page(html)
    pictures = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(pictures) == 2
    assert all(p["src"].startswith("data:image/png;base64,") and p["alt"] for p in pictures)
    assert not [tag for tag, _ in page.tags if tag in ("script", "iframe", "object")]
    links = [v for _, a in page.tags for k, v in a.items() if k in ("src", "href")]
    assert all(link.startswith("data:") for link in links)
    assert not re.search(r"https?:|@import|url\(", html)
    assert len(html) - sum(len(p["src"]) for p in pictures) < 400_000
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in (
        page.tags
    )


def test_what_the_configuration_says_is_only_ever_text(finished: Path) -> None:
    page = report(finished)
    assert "<script>alert(1)</script>&" in page.text


def test_the_gap_has_a_curve_beside_both_errors(finished: Path) -> None:
    page = report(finished)
    charts = [a["aria-label"] for tag, a in page.tags if tag == "svg" and "aria-label" in a]
    assert charts[0] == (
        "Soft against hard (validation). hard: from 0.12 at step 0 to 0.0205 at step 2,000. "
        "soft: from 0.02 at step 0 to 0.02 at step 2,000. "
        "gap: from 0.1 at step 0 to 4.98e-4 at step 2,000."
    )
    assert [chart.split(".")[0] for chart in charts[1:]] == [
        "Reconstruction error",
        "Temperature",
        "Perplexity",
        "Training loss",
    ]
    assert "Not recorded" not in page.text  # by a run that has finished


def test_the_axis_that_is_logarithmic_is_named(finished: Path) -> None:
    assert report(finished).text.count("step · vertical scale logarithmic") == 3


def charts_of(page: Page) -> list[str]:
    labels = [a["aria-label"] for tag, a in page.tags if tag == "svg" and "aria-label" in a]
    return [label.split(".")[0] for label in labels]


def headings_of_pictures(page: Page) -> list[str]:
    groups = [a["aria-label"] for tag, a in page.tags if a.get("role") == "group"]
    return [label.removesuffix(", scrollable") for label in groups]


def write_finished_run(run: Path, model: str, test: dict[str, float], pictures: list[str]) -> Path:
    train = {"step": 5, "split": "train", "loss": 0.5}
    lines = [train, {"step": 5, "split": "validation"} | test, {"step": 5, "split": "test"} | test]
    source = 'tokenizer = "/runs/codes"' if model == "pixelcnn" else 'data = "digits"'
    size = "codebook_size = 64\n" if model == "vqvae2" else ""
    write_run(run, lines, config=f'model = "{model}"\n{size}{source}\n')
    for name in pictures:
        save_rows(run / f"{name}.png", [("x", torch.rand(2, 1, 8, 8))])
    (run / "summary.json").write_text(json.dumps({"test": test}))
    return run


def test_a_model_without_codes_has_an_error_instead_of_a_hard_one(tmp_path: Path) -> None:
    test = {"reconstruction_error": 0.0123, "psnr": 19.1, "kl": 12.5}
    page = report(write_finished_run(tmp_path, "vae", test, ["reconstructions", "samples"]))
    assert page.text.startswith("vae on digits · softvq")
    assert "Error 0.0123 per pixel" in page.text and "PSNR 19.10 dB" in page.text
    assert "kl 12.5" in page.text
    for absent in ("Hard", "gap 0", "Perplexity 1", "Codebook usage 1", "Bits"):
        assert absent not in page.text.partition("Pictures")[0]
    assert headings_of_pictures(page) == ["Reconstructions", "Samples"]
    assert charts_of(page) == ["Reconstruction error", "Training loss"]


def test_two_levels_of_codes_stand_side_by_side(tmp_path: Path) -> None:
    test = {
        "reconstruction_error": 0.01,
        "reconstruction_hard_error": 0.01,
        "psnr": 20.0,
        "psnr_hard": 20.0,
        "codebook_usage_top": 0.5,
        "perplexity_top": 21.5,
        "codebook_usage_bottom": 0.875,
        "perplexity_bottom": 43.25,
    }
    pictures = ["codebook_usage_bottom", "codebook_usage_top", "samples", "reconstructions"]
    page = report(write_finished_run(tmp_path, "vqvae2", test, pictures))
    for text in (
        "Codebook usage top 50.0%",
        "Perplexity top 21.5 of 64 codes",
        "Codebook usage bottom 87.5%",
        "Perplexity bottom 43.25 of 64 codes",
        "perplexity_bottom 43.25",
    ):
        assert text in page.text
    assert "Hard error 0.01 " in page.text and "Error 0.01 " not in page.text  # the same twice
    assert headings_of_pictures(page) == [
        "Reconstructions",
        "Samples",
        "Use of the top codebook",
        "Use of the bottom codebook",
    ]
    labels = [a.get("aria-label", "") for tag, a in page.tags if tag == "svg"]
    (perplexity,) = (label for label in labels if label and label.startswith("Perplexity."))
    assert "validation top: from 21.5" in perplexity
    assert "validation bottom: from 43.25" in perplexity
    assert {"Codes used, top", "Codes used, bottom"} < set(charts_of(page))


def test_a_prior_is_judged_in_bits(tmp_path: Path) -> None:
    test = {
        "bits_per_latent": 3.25,
        "order0_bits_per_latent": 4.5,
        "uniform_bits_per_latent": 6.0,
        "bits_per_dim": 2.125,
        "bits_per_dim_of_codes": 0.25,
    }
    page = report(write_finished_run(tmp_path, "pixelcnn", test, ["samples"]))
    assert page.text.startswith("pixelcnn on /runs/codes · softvq")
    for text in (
        "Bits per latent 3.25",
        "Bits per dimension 2.125",
        "order0_bits_per_latent 4.5",
        "uniform_bits_per_latent 6",
        "bits_per_dim_of_codes 0.25",
    ):
        assert text in page.text
    assert "Error" not in page.text.partition("Pictures")[0]
    assert headings_of_pictures(page) == ["Samples"]
    assert charts_of(page) == ["Bits per latent", "Training loss"]


@pytest.mark.parametrize("model", ["soft-vqvae", "vqvae", "vqvae2", "ae", "cvae", "pixelcnn"])
def test_the_report_of_a_real_run_shows_all_its_pictures_and_metrics(model, tiny_runs) -> None:
    run = tiny_runs(model)
    page = Page((run / "report.html").read_text("utf-8"))
    assert len(headings_of_pictures(page)) == len(list(run.glob("*.png")))
    test = json.loads((run / "summary.json").read_text())["test"]
    rows = page.text.partition("Meaning")[2].partition("Configuration")[0].split()
    assert set(test) <= set(rows)
    assert "This run has not finished" not in page.text


def test_an_unfinished_run_says_so_and_shows_what_there_is(tmp_path: Path) -> None:
    lines = [train_line(10), validation_line(10), train_line(20)]
    page = report(write_run(tmp_path, lines, tail='{"step": 30, "split": "tr'))
    for text in (
        "This run has not finished",
        "step 20 · numbers from validation at step 10",
        "1 torn line of metrics.jsonl left out",
        "There are no pictures yet.",
        "Soft-hard gap 0.05 +250% on the soft error",
        "Images / second 1,234 in training",
    ):
        assert text in page.text


def test_a_gap_of_nothing_has_no_sign_of_less(tmp_path: Path) -> None:
    """Nearest codes may do better than the mixture by less than can be shown."""
    line = validation_line(10) | {"reconstruction_hard_error": 0.02 - 1e-7}
    assert "+0% on the soft error" in report(write_run(tmp_path, [line])).text


def test_a_run_without_any_number_still_has_a_page(tmp_path: Path) -> None:
    page = report(write_run(tmp_path, []))
    assert "metrics.jsonl holds no numbers yet" in page.text
    assert "Not recorded in this run: Soft against hard" in page.text


def test_a_configuration_that_says_nothing_still_has_a_page(tmp_path: Path) -> None:
    assert "soft-vqvae on digits" in report(write_run(tmp_path, [], config="")).text


def test_a_run_folder_whose_name_is_no_text_has_a_page(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"gr\xfcn")
    folder.mkdir()
    assert "Run gr?n" in report(write_run(folder, [])).text


def test_soft_errors_alone_are_not_called_soft_against_hard(tmp_path: Path) -> None:
    line = {"step": 1, "split": "train", "reconstruction_quantizing_error": 0.01}
    page = report(write_run(tmp_path, [line]))
    assert "Not recorded in this run: Soft against hard (train); " in page.text


def test_a_diverged_run_is_reported(tmp_path: Path) -> None:
    lines = [train_line(1), train_line(2) | {"loss": math.nan}, train_line(3) | {"loss": None}]
    page = report(write_run(tmp_path, lines))
    assert "2 values in metrics.jsonl are infinite or not a number" in page.text
    assert "loss nan" in page.text


@pytest.mark.parametrize(
    ("name", "said"),
    [("config.toml", r"no run there \(no config.toml\)"), ("metrics.jsonl", "no metrics.jsonl")],
)
def test_a_folder_that_is_no_run_is_named(finished: Path, name: str, said: str) -> None:
    (finished / name).unlink()
    with pytest.raises(RunError, match=f"^{re.escape(str(finished))}: {said}"):
        write_report(RunFolder(finished))


def test_a_resumed_run_keeps_the_later_value_of_a_step(tmp_path: Path) -> None:
    lines = [{"step": 5, "split": "train", "loss": loss} for loss in (1.0, 2.0)]
    write_run(tmp_path, lines, tail='{"step\n{"step": 6, "split": "train", "loss": 3}\n')
    history, unreadable = read_history(tmp_path / "metrics.jsonl")
    assert history == {"train": {5: {"loss": 2.0}, 6: {"loss": 3}}}
    assert unreadable == 1


TORN = ['{"step', "", "7", "null", '["step"]', '{"loss": 1}', '{"step": 1, "split": 2}', "\\xff",
        '{"step": 1, "split": "train", "loss": "abc"}']  # fmt: skip


def test_lines_that_are_no_metrics_are_counted(tmp_path: Path) -> None:
    line = {"step": 5, "split": "train", "loss": 1.0}
    write_run(tmp_path, [line], tail="\n".join(TORN) + "\n")
    history, unreadable = read_history(tmp_path / "metrics.jsonl")
    assert (history, unreadable) == ({"train": {5: {"loss": 1.0}}}, len(TORN))
    write_report(RunFolder(tmp_path))


@pytest.mark.parametrize("text", ['{"test": ', "[]", '{"test": null}', '{"test": {"psnr": "x"}}'])
def test_a_damaged_summary_is_named(finished: Path, text: str) -> None:
    (finished / "summary.json").write_text(text)
    with pytest.raises(RunError, match=f"^{re.escape(str(finished))}/summary.json: cannot be"):
        write_report(RunFolder(finished))
