"""What a model refuses before it computes anything: the argument, its value, what is allowed."""

import re

import pytest
import torch

from softvq.models import VQVAE, VQVAE2, Autoencoder, CodeLevel, CodePrior, Networks
from softvq.quantizers import VQ

IMAGE, GRID = (1, 8, 8), (4, 4)
IMAGES, LABELS = torch.rand(3, *IMAGE), torch.tensor([0, 1, 1])
CODES = torch.zeros(3, *GRID, dtype=torch.int64)
SMALL = {"networks": Networks(width=2)}


def vqvae():
    return VQVAE(IMAGE, GRID, VQ(4, 6), **SMALL)


def vqvae2():
    return VQVAE2(IMAGE, GRID, VQ(4, 6), VQ(4, 6), **SMALL)


def conditional():
    return Autoencoder(IMAGE, (1, 1), 4, classes=2, **SMALL)


def prior():
    return CodePrior({"codes": CodeLevel(GRID, 6)}, classes=2, width=4, layers=1)


MODELS = [vqvae, vqvae2, conditional]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.rand(3, 3, 8, 8), ValueError, "images must be (B, 1, 8, 8), got (3, 3, 8, 8)"),
        (torch.rand(1, 8, 8), ValueError, "images must be (B, 1, 8, 8), got (1, 8, 8)"),
        (torch.rand(3, 1, 9, 8), ValueError, "images must be (B, 1, 8, 8), got (3, 1, 9, 8)"),
        (IMAGES.byte(), TypeError, "images must be a floating-point tensor, got torch.uint8"),
    ],
)
def test_images(model, images, error, message):
    with pytest.raises(error, match=re.escape(message)):
        model()(images, LABELS)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (LABELS[:2], ValueError, "labels must be (3,), one an image, got (2,)"),
        (LABELS.float(), TypeError, "labels must be whole numbers, got torch.float32"),
        (LABELS + 1, ValueError, "labels must lie in [0, 2), got 1 to 2"),
        (LABELS - 1, ValueError, "labels must lie in [0, 2), got -1 to 0"),
        (None, ValueError, "labels: a model of 2 classes needs them, got None"),
    ],
)
def test_labels(labels, error, message):
    with pytest.raises(error, match=re.escape(message)):
        conditional()(IMAGES, labels)


@pytest.mark.parametrize("model", MODELS)
def test_labels_of_any_whole_numbers(model):
    torch.manual_seed(0)
    expected = model()(IMAGES, LABELS).losses["loss"]
    torch.manual_seed(0)
    assert torch.equal(model()(IMAGES, LABELS.byte()).losses["loss"], expected)


@pytest.mark.parametrize(
    ("codes", "error", "message"),
    [
        (CODES, TypeError, "must be a dict by level, got a Tensor"),
        ({}, ValueError, "must be of the levels ['codes'], got []"),
        ({"top": CODES}, ValueError, "must be of the levels ['codes'], got ['top']"),
        ({"codes": CODES[:, :3]}, ValueError, "['codes'] must be (B, 4, 4), got (3, 3, 4)"),
        ({"codes": CODES[0]}, ValueError, "['codes'] must be (B, 4, 4), got (4, 4)"),
        ({"codes": CODES.float()}, TypeError, "['codes'] must be whole numbers, got torch.float32"),
        ({"codes": CODES + 6}, ValueError, "indices must lie in"),
    ],
)
def test_codes(codes, error, message):
    for call in (vqvae().decode_indices, prior(), prior().log_likelihood):
        with pytest.raises(error, match=re.escape(message)):
            call(codes)


def test_codes_of_both_levels():
    with pytest.raises(ValueError, match=re.escape("levels ['top', 'bottom'], got ['bottom']")):
        vqvae2().decode_indices({"bottom": CODES})


@pytest.mark.parametrize(
    ("labels", "message"),
    [(LABELS + 1, "labels must lie in [-1, 2), got 1 to 2"), (LABELS[:2], "labels must be (3,)")],
)
def test_labels_of_a_prior(labels, message):
    for call in (lambda: prior()({"codes": CODES}, labels), lambda: prior().sample(3, labels)):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


def test_a_prior_of_no_levels():
    with pytest.raises(ValueError, match="levels must name at least one grid of codes, got none"):
        CodePrior({})


def test_a_name_is_no_quantizer():
    with pytest.raises(TypeError, match="quantizer must be a quantizer, got a str"):
        VQVAE(IMAGE, GRID, "vq")
