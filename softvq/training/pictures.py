"""The pictures of a run: rows of images, and how often each code is used."""

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib import get_data_path
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from softvq import metrics
from softvq.training.files import replacing

FONT = Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")  # Pillow's own has Latin alone
FONT_SIZE, MARGIN, GAP = 14, 10, 4  # pixels
INK, FILL, EVEN = "#1f2933", "#3b6fb6", "#c2561a"


def save_rows(path: Path, rows: Sequence[tuple[str, Tensor]], *, image_size: int = 64) -> None:
    """Write one PNG with a row of images per entry, its label at the left.

    rows: label, in the picture of one line, and (n, C, H, W) floats in [0, 1], clamped; of C
    channels the first, or first three.
    image_size: small images are enlarged by the whole factor that brings their longer side
    nearest to so many pixels; large ones stay as they are.
    """
    rows = [(" ".join(label.splitlines()), images) for label, images in rows]
    font = ImageFont.truetype(FONT, FONT_SIZE)
    left = 2 * MARGIN + max(round(font.getlength(label)) for label, _ in rows)
    strips = [_strip(images, image_size) for _, images in rows]
    width = left + max(strip.width for strip in strips) + MARGIN
    height = 2 * MARGIN + sum(strip.height + GAP for strip in strips) - GAP
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    top = MARGIN
    for (label, _), strip in zip(rows, strips, strict=True):
        middle = top + strip.height // 2
        draw.text((MARGIN, middle), label, fill=INK, font=font, anchor="lm")
        canvas.paste(strip, (left, top))
        top += strip.height + GAP
    with replacing(path) as temporary:
        canvas.save(temporary, format="PNG", optimize=True)


def _strip(images: Tensor, image_size: int) -> Image.Image:
    """(n, C, H, W) floats as one picture: n images side by side, GAP white pixels between."""
    channels, height, width = images.shape[1:]
    factor = max(1, round(image_size / max(height, width)))
    pixels = images.detach().float().cpu()[:, : 3 if channels >= 3 else 1]
    pixels = pixels.clamp(0, 1).mul(255).round().byte().expand(-1, 3, -1, -1)
    pixels = pixels.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    padded = torch.nn.functional.pad(pixels, (0, GAP), value=255)
    joined = padded.permute(2, 0, 3, 1).flatten(1, 2)[:, :-GAP]
    return Image.fromarray(joined.contiguous().numpy())


def save_codebook_usage(path: Path, counts: Tensor) -> None:
    """Write a PNG of how often each code is used, from the most to the least used one.

    counts: (K,) int64, how many latents have each code as their nearest; of one at least.
    """
    counts = counts.detach().cpu().sort(descending=True).values
    codes, used = len(counts), int(counts.count_nonzero())

    figure = Figure(figsize=(8, 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # One step for all codes that are used equally often: exact, and few steps however large K is.
    heights, widths = counts.unique_consecutive(return_counts=True)
    edges = torch.cat([widths.new_zeros(1), widths.cumsum(0)]) + 0.5
    axes.stairs(heights.numpy(), edges.numpy(), fill=True, color=FILL)
    even = int(counts.sum()) / codes
    axes.axhline(even, color=EVEN, linewidth=1.2, linestyle="--", label="even use")
    axes.legend(frameon=False, labelcolor=INK, loc="upper right")
    _scale(axes, codes, used, counts)
    _label(axes)
    axes.set_title(
        f"{used:,} of {codes:,} codes used ({used / codes:.2%})   ·   {codes - used:,} unused"
        f"   ·   perplexity {metrics.perplexity(counts):,.1f}",
        loc="left",
        fontsize=11,
        color=INK,
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _scale(axes: Axes, codes: int, used: int, counts: Tensor) -> None:
    """Logarithmic axes where a linear one would hide most of the used codes; counts: (K,)."""
    axes.set_xlim(0.5, codes + 0.5)
    if used < codes / 20:
        axes.set_xscale("log")
    highest = int(counts[0])
    if highest > 50 * int(counts[used - 1]):
        axes.set_yscale("log")
        axes.set_ylim(0.5, highest**1.2)
    else:
        axes.set_ylim(0, 1.2 * highest)


def _label(axes: Axes) -> None:
    """Names of the axes, and as few lines around the plot as will do."""
    axes.set_xlabel("codes, most used first", color=INK)
    axes.set_ylabel("latents per code", color=INK)
    axes.tick_params(colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=INK, alpha=0.12)
    axes.set_axisbelow(True)
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "linear":
            axis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axis.set_major_formatter("{x:,.0f}")
