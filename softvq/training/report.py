"""One self-contained HTML page about a run, made from the files in its folder."""

import base64
import json
import math
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from softvq.training.curves import Chart, Points, Scale, draw_chart, number
from softvq.training.files import replacing
from softvq.training.history import History, Metrics, are_metrics, read_history, with_nan
from softvq.training.run_folder import RunError, RunFolder

SOFT, HARD = "reconstruction_quantizing_error", "reconstruction_hard_error"
GAP = "gap"  # HARD - SOFT
# name -> (which is better, what it says), in the order of the page
MEANINGS = {
    HARD: ("lower", "Squared error when the decoder sees only the nearest codes."),
    SOFT: ("lower", "Squared error when the decoder sees soft mixtures of the codes."),
    GAP: ("lower", "Hard minus soft error: what the soft error alone would hide."),
    "reconstruction_error": ("lower", "Squared error of the model's own output."),
    "quantizing_error": (
        "lower",
        "Squared distance of a latent and its code, soft where the model is, per element.",
    ),
    "psnr_hard": ("higher", "Peak signal-to-noise ratio with nearest codes, in dB."),
    "psnr": ("higher", "Peak signal-to-noise ratio of the model's own output, in dB."),
    "l1_hard": ("lower", "Absolute error with nearest codes, on pixels from -1 to 1."),
    "codebook_usage": ("higher", "Fraction of the codes that are nearest to at least one latent."),
    "codebook_usage_quarter": ("higher", "Of the codes, with a quarter of an even share or more."),
    "codebook_usage_double": ("", "Fraction of the codes with two even shares or more."),
    "perplexity": ("higher", "How many codes, evenly used, would be as varied as these."),
    "max_probability": ("higher", "Mean probability of the nearest code; 1 is a hard choice."),
    "kl": ("", "Divergence of the latents from a standard normal, in nats per image."),
    "bits_per_dim": (
        "lower",
        "What an image costs per pixel and channel, codes included, in bits.",
    ),
    "bits_per_dim_of_codes": ("lower", "The codes' share of that, the class of an image included."),
    "bits_per_latent": ("lower", "What the prior takes for one code."),
    "order0_bits_per_latent": ("", "What a code takes if only the codes' frequencies are known."),
    "uniform_bits_per_latent": ("", "What a code takes if nothing is known: log2 K."),
}
SUFFIXES = ("", "_top", "_bottom")  # of what each level of a model has
# file stem -> (heading, what it shows, description for those who cannot see it), in order
PICTURES = {
    "reconstructions": (
        "Reconstructions",
        "From the top: the input; the model's own output; where there are codes, decoded from soft "
        "codes, and from the nearest codes alone, which is all that a discrete code keeps.",
        "Rows of images: the inputs, and below each its reconstructions.",
    ),
    "samples": (
        "Samples",
        "Images that are in no data set: decoded from the prior of the latents. Codes drawn apart, "
        "each place by itself, show what a prior over codes, a pixelcnn, would have to learn.",
        "Rows of images drawn from the model.",
    ),
    "codebook_usage": (
        "Use of the codebook",
        "How many latents have each code as their nearest. The dashed line is even use.",
        "Latents per code, from the most to the least used; the title gives usage and perplexity.",
    ),
    "codebook_usage_top": (
        "Use of the top codebook",
        "The same on the coarse grid.",
        "Latents per code of the top level, from the most to the least used.",
    ),
    "codebook_usage_bottom": (
        "Use of the bottom codebook",
        "The same on the fine grid.",
        "Latents per code of the bottom level, from the most to the least used.",
    ),
}


class Measured(NamedTuple):
    """The numbers that stand for the run, and where they are from."""

    source: str
    metrics: Metrics


def write_report(run: RunFolder) -> Path:
    """Write report.html about a finished or unfinished run, and return its path.

    Needs config.toml and metrics.jsonl; of the other files the page shows what is there.
    Raises RunError without one of the two and for a damaged summary.json, and ConfigError.
    """
    config = tomllib.loads(run.read_config().to_toml())
    if not run.metrics.is_file():
        raise RunError(
            f"{run.path}: no metrics.jsonl there; name the folder of a run that came to its first "
            "validation"
        )
    history, unreadable = read_history(run.metrics)
    finished = run.summary.is_file()
    summary = _read_summary(run.summary) if finished else {}
    measured = _measured(summary, history)
    charts = _charts(history)
    template = _environment().get_template("report.html.jinja")
    page = template.render(
        title=f"{config['model']} on {config.get('data') or config.get('tokenizer')}",
        folder=run.path.resolve().name,
        finished=finished,
        step=max((step for steps in history.values() for step in steps), default=0),
        measured=measured,
        tiles=list(_tiles(measured.metrics, config, summary, history)),
        rows=_metric_rows(measured.metrics),
        charts=[chart for chart in charts.values() if chart],
        soft=bool(_points(history, "validation", SOFT)),
        missing_charts=[] if finished else [title for title, chart in charts.items() if not chart],
        pictures=[
            (*words, stem.startswith("codebook"), _data_uri(run.path / f"{stem}.png"))
            for stem, words in PICTURES.items()
            if (run.path / f"{stem}.png").is_file()
        ],
        unreadable=unreadable,
        not_finite=sum(
            not math.isfinite(value)
            for steps in history.values()
            for metrics in steps.values()
            for value in metrics.values()
        ),
        config=_flat(config),
        environment=_flat({name: value for name, value in summary.items() if name != "test"}),
    )
    with replacing(run.report) as temporary:
        temporary.write_text(page, "utf-8", errors="replace")  # names of any bytes
    return run.report


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        match json.loads(path.read_text("utf-8")):
            case dict() as summary if are_metrics(summary.get("test", {})):
                return summary
        raise ValueError("not the summary of a run")
    except ValueError as error:
        raise RunError(
            f"{path}: cannot be read ({error}); make it anew with softvq train --out "
            f"{path.parent} --resume"
        ) from error


def _points(history: History, split: str, name: str) -> Points:
    values = ((step, metrics.get(name)) for step, metrics in history.get(split, {}).items())
    return sorted((step, v) for step, v in values if v is not None and math.isfinite(v))


def _measured(summary: Mapping[str, Any], history: History) -> Measured:
    """The test metrics, or else the latest validation or training ones."""
    if "test" in summary:
        return Measured("test", _with_gap(with_nan(summary["test"])))
    for split in ("test", "validation", "train"):
        if split in history:
            step = max(history[split])
            return Measured(f"{split} at step {step:,}", _with_gap(history[split][step]))
    return Measured("nothing measured yet", {})


def _with_gap(metrics: Metrics) -> Metrics:
    if SOFT in metrics and HARD in metrics:
        return metrics | {GAP: metrics[HARD] - metrics[SOFT]}
    return metrics


def _metric_rows(metrics: Metrics) -> list[tuple[str, str, str, str]]:
    """(name, value, better, meaning) of each metric, the known ones first."""
    names = [name for name in MEANINGS if name in metrics]
    names += [name for name in metrics if name not in MEANINGS]
    return [(name, number(metrics[name]), *_meaning(name)) for name in names]


def _meaning(name: str) -> tuple[str, str]:
    """Which is better and what it says; of a level's metric, those of the metric."""
    for suffix in SUFFIXES[1:]:
        if name.endswith(suffix):
            better, words = MEANINGS.get(name.removesuffix(suffix), ("", ""))
            return better, f"{words} At the {suffix[1:]} level." if words else ""
    return MEANINGS.get(name, ("", ""))


def _tiles(
    metrics: Metrics, config: Mapping[str, Any], summary: Mapping[str, Any], history: History
) -> Iterator[tuple[str, str, str]]:
    """(label, value, remark) of the headline numbers that are known."""
    if "bits_per_latent" in metrics:
        yield "Bits per latent", number(metrics["bits_per_latent"]), "for one code, by the prior"
    if "bits_per_dim" in metrics:
        yield "Bits per dimension", number(metrics["bits_per_dim"]), "codes included"
    if HARD in metrics:
        yield "Hard error", number(metrics[HARD]), "nearest code, per pixel"
    if "psnr_hard" in metrics:
        yield "Hard PSNR", f"{metrics['psnr_hard']:.2f} dB", "nearest code"
    if GAP in metrics:
        share = metrics[GAP] / metrics[SOFT] if metrics[SOFT] else math.inf
        yield "Soft-hard gap", number(metrics[GAP]), f"{share:+z.0%} on the soft error"
    elif HARD not in metrics and "reconstruction_error" in metrics:
        yield "Error", number(metrics["reconstruction_error"]), "per pixel"
    if "psnr" in metrics and "psnr_hard" not in metrics:
        yield "PSNR", f"{metrics['psnr']:.2f} dB", "model's own output"
    for suffix in SUFFIXES:
        name = suffix.replace("_", " ")
        if f"codebook_usage{suffix}" in metrics:
            usage = metrics[f"codebook_usage{suffix}"]
            yield f"Codebook usage{name}", f"{usage:.1%}", "codes used at least once"
        if f"perplexity{suffix}" in metrics:
            value = number(metrics[f"perplexity{suffix}"])
            yield f"Perplexity{name}", value, f"of {config['codebook_size']} codes"
    speeds = [speed for _, speed in _points(history, "train", "images_per_second")]
    speed = summary.get("images_per_second", speeds[-1] if speeds else None)
    if speed is not None:
        yield "Images / second", f"{speed:,.0f}", summary.get("device", "in training")


def _charts(history: History) -> dict[str, Chart | None]:
    """All curves of the page by title; None for one without a single point."""

    def both(name: str) -> dict[str, Points]:
        return {split: _points(history, split, name) for split in ("train", "validation")}

    def by_level(name: str) -> dict[str, Points]:
        return {
            f"validation{suffix.replace('_', ' ')}": _points(history, "validation", name + suffix)
            for suffix in SUFFIXES
        }

    def usage(suffix: str) -> dict[str, Points]:
        lines = {"at all": "", "a quarter of an even share": "_quarter", "double": "_double"}
        return {
            label: _points(history, "validation", f"codebook_usage{name}{suffix}")
            for label, name in lines.items()
        }

    def training(*names: str) -> dict[str, Points]:
        return {name.replace("_", " "): _points(history, "train", name) for name in names}

    levels = [s for s in SUFFIXES if _points(history, "validation", f"codebook_usage{s}")] or [""]
    split = "validation" if _points(history, "validation", HARD) else "train"
    soft, hard = _points(history, split, SOFT), _points(history, split, HARD)
    soft_at = dict(soft)
    gap = [(step, value - soft_at[step]) for step, value in hard if step in soft_at]
    soft_hard: dict[str, Points] = {"hard": hard, "soft": soft, "gap": gap} if gap else {}
    charts: tuple[tuple[str, dict[str, Points], Scale], ...] = (
        (f"Soft against hard ({split})", soft_hard, "from zero"),
        ("Reconstruction error", both("reconstruction_error"), "log"),
        ("Temperature", training("temperature", "critical_temperature"), "log"),
        ("Perplexity", by_level("perplexity"), "from zero"),
        *((f"Codes used{s.replace('_', ', ')}", usage(s), "from zero") for s in levels),
        ("Bits per latent", both("bits_per_latent"), "from zero"),
        ("Training loss", training("loss"), "log"),
    )
    return {title: draw_chart(title, series, scale) for title, series, scale in charts}


def _flat(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(dotted key, value as text) of a nested table."""
    rows = []
    for key, value in table.items():
        if isinstance(value, dict):
            rows += [(f"{key}.{inner}", text) for inner, text in _flat(value)]
        else:
            text = json.dumps(value, ensure_ascii=False, default=str)
            rows.append((key, value if isinstance(value, str) else text))
    return rows


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
