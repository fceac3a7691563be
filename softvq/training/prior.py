"""Training a prior over the codes of a trained model."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from softvq.data import DataSplits
from softvq.models import CodePrior, ImageModel, TrainingStep
from softvq.training.build import build_model
from softvq.training.codes import encode_splits
from softvq.training.config import TrainConfig
from softvq.training.evaluation import batch_size
from softvq.training.memory import bytes_of
from softvq.training.pictures import save_rows
from softvq.training.prior_evaluation import code_metrics, prior_metrics
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
