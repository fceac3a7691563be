"""Metrics over whole splits: what they are, and how many images they are counted in at once."""

import shutil

import numpy as np
import pytest
import torch

import softvq
from softvq.data import load_data
from softvq.models import LEVEL, VQVAE2, Autoencoder, SoftVQVAE
from softvq.training import evaluation, showing
from softvq.training.commands import decode, encode, evaluate_run, sample
from softvq.training.evaluation import batch_size, evaluate
from softvq.training.run_folder import RunFolder

CPU = torch.device("cpu")


def test_how_many_images_are_looked_at_together():
    sizes = [batch_size(shape) for shape in ((1, 8, 8), (1, 28, 28), (3, 32, 32))]
    assert sizes == [1000, 1000, 1000]
    assert batch_size((3, 128, 128)) == 85
    assert batch_size((3, 8192, 8192)) == 1


@torch.no_grad()
def test_every_metric_of_a_split_by_hand(tiny_run, monkeypatch):
    """In two batches, of 100 and 44 images."""
    monkeypatch.setattr(evaluation, "BATCH", 100)
    model, data = RunFolder(tiny_run).load_model(CPU), load_data("digits").validation
    torch.nn.init.normal_(model.quantizer.codebook, std=2)  # so that no two outputs are alike
    measured = evaluate(model, data, CPU)

    images = data.images / 255
    latents, codes = model.encode(images), model.quantizer.codebook
    z, temperature = latents.mean, model.quantizer.temperature
    p = softvq.assignment_probabilities(z, codes, temperature)
    nearest = torch.cdist(z.flatten(0, -2), codes).argmin(1)
    counts = np.bincount(nearest, minlength=8)
    shares = counts[counts > 0] / counts.sum()

    own, soft, hard = (
        (model.decode(c) - images).double()
        for c in (z, p @ codes, codes[nearest].view_as(z))
    )  # fmt: skip
    squared = {"own": own, "soft": soft, "hard": hard}
    squared = {name: error.square().mean().item() for name, error in squared.items()}
    assert measured.values == pytest.approx(
        {
            "reconstruction_error": squared["own"],
            "reconstruction_quantizing_error": squared["soft"],
            "reconstruction_hard_error": squared["hard"],
            "psnr": -10 * np.log10(squared["own"]),
            "psnr_hard": -10 * np.log10(squared["hard"]),
            "l1_hard": 2 * hard.abs().mean().item(),  # on [-1, 1]
            "quantizing_error": (z - p @ codes).square().mean().item(),
            "max_probability": p.max(-1).values.mean().item(),
            "kl": latents.mean.square()
            .add(latents.logvar.exp() - latents.logvar - 1)
            .div(2)
            .sum((1, 2, 3))
            .mean()
            .item(),
            "codebook_usage": (counts > 0).mean(),
            "codebook_usage_quarter": (counts >= counts.mean() / 4).mean(),
            "codebook_usage_double": (counts >= counts.mean() * 2).mean(),
            "perplexity": np.exp(-(shares * np.log(shares)).sum()),
        },
        rel=1e-4,
    )
    assert squared["own"] != pytest.approx(squared["hard"], rel=1e-3)
    assert measured.counts[LEVEL].tolist() == counts.tolist()


def test_codes_drawn_apart_are_no_images_codes_but_each_places_own(tiny_run, monkeypatch):
    """Of the codes 2·place and 2·place + 1 every image has only even ones, or only odd ones."""
    places = 2 * torch.arange(4).view(1, 2, 2)

    def encode(self, images):
        return {LEVEL: places + torch.arange(len(images)).view(-1, 1, 1) % 2}

    drawn = []

    def decode(self, indices):
        drawn.append(indices[LEVEL])
        return torch.zeros(len(indices[LEVEL]), 1, 8, 8)

    monkeypatch.setattr(SoftVQVAE, "encode_indices", encode)
    monkeypatch.setattr(SoftVQVAE, "decode_indices", decode)
    showing.sample_rows(RunFolder(tiny_run).load_model(CPU), load_data("digits"), CPU)
    odd = torch.cat(drawn) - places
    assert odd.unique().tolist() == [0, 1]
    mixed = (odd.flatten(1).float().mean(1) % 1 != 0).sum()
    assert mixed > 30  # of 48; by chance 42


@pytest.fixture
def looked_at(tiny_runs, monkeypatch):
    """Seven images are many; the list of how many each call of a model has had."""
    for model in ("soft-vqvae", "vae", "vqvae2", "pixelcnn"):
        tiny_runs(model)  # trained before that
    monkeypatch.setattr(evaluation, "VALUES", 7 * 64)
    sizes = []

    def counted(original):
        def call(self, first, *others):
            values = first if torch.is_tensor(first) else next(iter(first.values()))
            sizes.append(len(values))
            return original(self, first, *others)

        return call

    for kind, names in (
        (SoftVQVAE, ("evaluate", "encode_indices", "decode_indices")),
        (VQVAE2, ("encode_indices", "decode_indices")),
        (Autoencoder, ("evaluate", "sample")),
    ):
        for name in names:
            monkeypatch.setattr(kind, name, counted(getattr(kind, name)))
    return sizes


@pytest.fixture
def run(tiny_run, tmp_path):
    return RunFolder(shutil.copytree(tiny_run, tmp_path / "run"))


def test_large_images_are_looked_at_a_few_at_once(run, tiny_runs, looked_at, tmp_path):
    values = evaluate_run(run, "validation")
    decode(run, encode(run, None, None, tmp_path / "c.npz"), "validation", tmp_path / "out")
    prior = RunFolder(shutil.copytree(tiny_runs("pixelcnn"), tmp_path / "prior"))
    evaluate_run(prior, "validation")
    draw = {"count": 10, "class_name": None, "temperature": None, "seed": 0}
    sample(run, RunFolder(tiny_runs("pixelcnn")), **draw, out=tmp_path / "samples.png")
    sample(RunFolder(tiny_runs("vae")), None, **draw, out=tmp_path / "samples.png")
    assert max(looked_at) == 7
    evaluation.VALUES *= 100
    assert evaluate_run(run, "validation") == pytest.approx(values, rel=1e-4)


@pytest.mark.parametrize("model", ["soft-vqvae", "vae", "vqvae2"])
def test_the_samples_of_a_run_are_drawn_a_few_at_once(model, tiny_runs, looked_at):
    run = RunFolder(tiny_runs(model))
    rows = showing.sample_rows(run.load_model(CPU), load_data("digits"), CPU)
    assert sum(len(images) for _, images in rows) == 48
    assert max(looked_at) == 7
