"""Training a model of images."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from softvq.data import Batch, DataError, DataSplits, Images
from softvq.models import ImageModel, TrainingStep, level_suffix
from softvq.training.build import build_model
from softvq.training.config import TrainConfig
from softvq.training.evaluation import evaluate, to_pixels
from softvq.training.pictures import save_codebook_usage, save_rows
from softvq.training.run_folder import RunFolder
from softvq.training.showing import PER_ROW, Rows, reconstruction_rows, sample_rows
from softvq.training.steering import build_steering


class ImageTask:
    """Images to reconstruct; training images that are in memory live on the device."""

    def __init__(self, config: TrainConfig, data: DataSplits, device: torch.device):
        if config.model == "cvae" and any((split.labels < 0).any() for split in data[:3]):
            raise DataError(f"{config.data}: a cvae needs the class of every image")
        self.data, self.device = data, device
        self.shape = {
            "image_shape": data.image_shape,
            "classes": len(data.class_names),
            "class_names": data.class_names,
            "data": data.fingerprint,
        }
        self.model: ImageModel = build_model(config, self.shape).to(device)
        self.steering = build_steering(config, self.model).to(device)
        self.train = data.train.to(device)
        self.examples, self.data_bytes = len(self.train), self.train.nbytes
        self.decoded_bytes, self.streamed = self.train.decoded_bytes, self.train.streamed
        self.indexed_on = self.train.labels.device
        coded = bool(self.model.quantizers)
        self.judged_by = "reconstruction_hard_error" if coded else "reconstruction_error"

    def load(self, batches: Iterable[Tensor]) -> Iterator[Batch]:
        """The training images of each batch of indices, (B,) int64."""
        return self.train.load(batches, self.device)

    def start(self, batch: Batch) -> None:
        """Let the first batch say where codes and temperature begin."""
        images, _ = batch
        self.steering.start(self.model, to_pixels(images, self.device))

    def step(self, batch: Batch) -> TrainingStep:
        """The losses of a batch."""
        images, labels = batch
        return self.model(to_pixels(images, self.device), labels)

    def evaluate(self, split: str) -> dict[str, float]:
        """Every metric of the model over a whole split."""
        return evaluate(self.model, getattr(self.data, split), self.device).values

    def rows(self) -> Rows:
        """A few validation images and their reconstructions."""
        was_training = self.model.training
        self.model.eval()
        rows = self._reconstructed(self.model, self.data.validation)
        self.model.train(was_training)
        return rows

    def _reconstructed(self, model: ImageModel, data: Images) -> Rows:
        first = torch.arange(min(PER_ROW, len(data)))
        images, labels = next(data.load([first], self.device))
        return reconstruction_rows(model, to_pixels(images, self.device), labels)

    def finish(self, model: ImageModel, run: RunFolder) -> dict[str, float]:
        """Metrics of the best model over the test split; its pictures go to the run folder."""
        test = evaluate(model, self.data.test, self.device)
        for level, counts in test.counts.items():
            save_codebook_usage(run.usage(level_suffix(level)), counts)
        save_rows(run.reconstructions, self._reconstructed(model, self.data.test))
        save_rows(run.samples, sample_rows(model, self.data, self.device))
        return test.values
