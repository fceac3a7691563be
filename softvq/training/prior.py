"""Training a prior over the codes of a trained model."""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from softvq import metrics
from softvq.data import DataSplits
from softvq.models import CodePrior, ImageModel, TrainingStep, level_suffix
from softvq.training.build import build_model
from softvq.training.codes import CodeSet, CodeSplits, encode_splits
from softvq.training.config import TrainConfig
from softvq.training.evaluation import batch_size
from softvq.training.likelihood import (
    bits_per_dimension,
    discretised_logistic_log_likelihood,
    fit_scales,
    order0_bits_per_latent,
)
from softvq.training.memory import bytes_of
from softvq.training.pictures import save_rows
from softvq.training.ranks import from_all, share_of
from softvq.training.run_folder import RunFolder
from softvq.training.showing import PER_ROW, ROWS, Rows, even_labels, sampled_rows
from softvq.training.steering import Steering
from softvq.training.task import Examples


class PriorTask:
    """Codes to predict; all of them live on the device.

    tokenizer: the model, in eval mode, whose codes of `images` are learned; `fingerprint` tells it
    from others.
    """

    judged_by = "bits_per_latent"

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: ImageModel,
        images: DataSplits,
        device: torch.device,
        fingerprint: str,
    ):
        self.tokenizer, self.images, self.device = tokenizer, images, device
        self.data = encode_splits(tokenizer, images, device)
        labelled = all((split.labels >= 0).all() for split in images[:3])
        self.shape = {
            "levels": self.data.levels,
            "classes": len(images.class_names) if labelled else 0,
            "class_names": images.class_names,
            "tokenizer": fingerprint,
            "data": images.fingerprint,
        }
        self.model = build_model(config, self.shape).to(device)
        self.steering = Steering()
        self.train = self.data.train.to(device)
        self.examples = len(self.train)
        self.data_bytes = bytes_of([*self.train.codes.values(), self.train.labels])
        self.decoded_bytes, self.streamed = self.data_bytes, False
        self.indexed_on = self.train.labels.device

    def load(self, batches: Iterable[Tensor]) -> Iterator[Examples]:
        """Codes (B, h, w) int64 of each level, then labels (B,), of each batch of indices, (B,)."""
        for chosen in batches:
            codes, labels = self.train.batch(chosen)
            yield *codes.values(), labels

    def start(self, batch: Examples) -> None:
        """Nothing to measure before the first step."""

    def step(self, batch: Examples) -> TrainingStep:
        """The losses of a batch."""
        *codes, labels = batch
        named = dict(zip(self.train.codes, codes, strict=True))
        return TrainingStep(self.model(named, labels), {}, {})

    def evaluate(self, split: str) -> dict[str, float]:
        """Bits per latent over a whole split."""
        size = batch_size(self.images.image_shape)
        return code_metrics(self.model, getattr(self.data, split), size, self.device)

    def rows(self) -> Rows:
        """None: sampling takes too long for every validation."""
        return []

    def finish(self, model: CodePrior, run: RunFolder) -> dict[str, float]:
        """Metrics of the best model over the test split; samples go to the run folder."""
        values = prior_metrics(model, self.tokenizer, self.images, self.data, "test", self.device)
        count = PER_ROW * model.classes or PER_ROW * ROWS
        labels = even_labels(count, model.classes, self.device)
        sample, shape = decoded_samples(model, self.tokenizer), self.images.image_shape
        save_rows(run.samples, sampled_rows(sample, labels, self.images.class_names, shape))
        return values


def decoded_samples(
    prior: CodePrior, tokenizer: ImageModel, temperature: float = 1.0
) -> Callable[[Tensor], Tensor]:
    """labels (count,) int64, -1 for no class → images (count, C, H, W) of codes of the prior."""

    @torch.no_grad()
    def sample(labels: Tensor) -> Tensor:
        codes = prior.sample(len(labels), labels, temperature=temperature)
        return tokenizer.decode_indices(codes)

    return sample


@torch.no_grad()
def code_metrics(
    model: CodePrior, data: CodeSet, size: int, device: torch.device
) -> dict[str, float]:
    """Bits per latent over a whole split of codes, the same bits however many ranks share it.

    size: of the batches. The model keeps the mode it was in.
    """
    was_training = model.training
    model.eval()
    batches = torch.arange(len(data)).split(size)
    results = []
    for batch in share_of(batches):
        codes, labels = data.batch(batch)
        codes = {name: grid.to(device) for name, grid in codes.items()}
        results.append(model(codes, labels.to(device)))
    model.train(was_training)
    means = metrics.Mean()
    for result, batch in zip(from_all(results), batches, strict=True):
        means.add(result, len(batch))
    values = means.read()
    del values["loss"]
    return values


def prior_metrics(
    model: CodePrior,
    tokenizer: ImageModel,
    images: DataSplits,
    data: CodeSplits,
    split: str,
    device: torch.device,
) -> dict[str, float]:
    """Bits per latent of a split, what simpler models of it take, and bits per dimension.

    bits_per_dim is −log₂ p(class) p(codes | class) p(image | codes) per pixel and channel, a bound
    of −log₂ p(image): classes are even, the image is a discretised logistic around its decoded
    codes, of the scales that fit the validation images best.
    """
    codes: CodeSet = getattr(data, split)
    values = code_metrics(model, codes, batch_size(images.image_shape), device)
    for name, level in data.levels.items():
        size = level.codebook_size
        order0 = order0_bits_per_latent(data.train.codes[name], codes.codes[name], size)
        values[f"order0_bits_per_latent{level_suffix(name)}"] = order0
        values[f"uniform_bits_per_latent{level_suffix(name)}"] = math.log2(size)

    pixels = math.prod(images.image_shape)
    scales = fit_scales(_decoded(tokenizer, images, data, "validation", device))
    nats = torch.cat(
        [
            discretised_logistic_log_likelihood(output, batch, scales)
            for output, batch in _decoded(tokenizer, images, data, split, device)
        ]
    )
    image_bits = bits_per_dimension(nats, pixels).mean().item()
    code_bits = values["bits_per_latent"] * model.latents + math.log2(max(1, model.classes))
    values["bits_per_dim"] = image_bits + code_bits / pixels
    values["bits_per_dim_of_codes"] = code_bits / pixels
    return values


@torch.no_grad()
def _decoded(
    tokenizer: ImageModel, images: DataSplits, data: CodeSplits, split: str, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """(decoded codes (B, C, H, W), images (B, C, H, W) uint8) of a split, batch by batch."""
    codes: CodeSet = getattr(data, split)
    batches = torch.arange(len(codes)).split(batch_size(images.image_shape))
    pictures = getattr(images, split).load(batches, device)
    for chosen, (batch, _) in zip(batches, pictures, strict=True):
        grids = {name: grid.to(device) for name, grid in codes.batch(chosen)[0].items()}
        yield tokenizer.decode_indices(grids), batch
