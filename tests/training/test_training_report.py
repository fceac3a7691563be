"""The HTML page of a run: whole, escaped, self-contained, and honest about what is missing."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from softvq.training.pictures import save_codebook_usage, save_rows
from softvq.training.report import read_history, write_report

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


def write_run(run: Path, lines: list[dict[str, object]], *, tail: str = "") -> Path:
    (run / "config.toml").write_text(CONFIG)
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
    path = write_report(run)
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
    html = write_report(finished).read_text("utf-8")
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
    assert "Not recorded in this run: Codebook usage; Bits per latent." in page.text


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


def test_a_run_without_any_number_still_has_a_page(tmp_path: Path) -> None:
    page = report(write_run(tmp_path, []))
    assert "metrics.jsonl holds no numbers yet" in page.text
    assert "Not recorded in this run: Soft against hard" in page.text


def test_soft_errors_alone_are_not_called_soft_against_hard(tmp_path: Path) -> None:
    line = {"step": 1, "split": "train", "reconstruction_quantizing_error": 0.01}
    page = report(write_run(tmp_path, [line]))
    assert "Not recorded in this run: Soft against hard (train); " in page.text


def test_a_diverged_run_is_reported(tmp_path: Path) -> None:
    lines = [train_line(1), train_line(2) | {"loss": math.nan}, train_line(3) | {"loss": None}]
    page = report(write_run(tmp_path, lines))
    assert "2 values in metrics.jsonl are infinite or not a number" in page.text
    assert "loss nan" in page.text


@pytest.mark.parametrize("name", ["config.toml", "metrics.jsonl"])
def test_a_folder_that_is_no_run_is_named(finished: Path, name: str) -> None:
    (finished / name).unlink()
    with pytest.raises(ValueError, match=f"^{re.escape(str(finished))}: no {name}"):
        write_report(finished)


def test_a_resumed_run_keeps_the_later_value_of_a_step(tmp_path: Path) -> None:
    lines = [{"step": 5, "split": "train", "loss": loss} for loss in (1.0, 2.0)]
    write_run(tmp_path, lines, tail='{"step\n{"step": 6, "split": "train", "loss": 3}\n')
    history, unreadable = read_history(tmp_path / "metrics.jsonl")
    assert history == {"train": {5: {"loss": 2.0}, 6: {"loss": 3}}}
    assert unreadable == 1
