"""The images that a run's pictures show, as labelled rows."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from softvq.data import DataSplits
from softvq.models import Autoencoder, ImageModel
from softvq.training.evaluation import BATCH, batch_size, in_batches, to_pixels

PER_ROW = 12
ROWS = 4  # of samples, where no classes part them
Rows = list[tuple[str, Tensor]]  # label, (n, C, H, W) in [0, 1]

# label of each row of reconstructions.png, by the error that the row makes
LABELS = {
    "reconstruction_error": "reconstruction",
    "reconstruction_quantizing_error": "soft codes",
    "reconstruction_hard_error": "nearest codes",
}


def reconstruction_rows(model: ImageModel, images: Tensor, labels: Tensor | None) -> Rows:
    """The input images (n, C, H, W) in [0, 1] and, below them, each kind of reconstruction."""
    outputs = model.evaluate(images, labels).outputs
    rows: Rows = [("input", images)]
    shown: list[Tensor] = []
    for name, output in outputs.items():
        if not any(output is other for other in shown):
            rows.append((LABELS[name], output))
        shown.append(output)
    return rows


@torch.no_grad()
def sample_rows(model: ImageModel, data: DataSplits, device: torch.device) -> Rows:
    """Images that nobody drew: decoded from the prior, a row per class where the model has any.

    A model with codes gets them drawn at each place by itself, as often as the validation images
    have them there: what is missing is what a pixelcnn learns.
    """
    if isinstance(model, Autoencoder):
        labels = even_labels(PER_ROW * model.classes or ROWS * PER_ROW, model.classes, device)
        return sampled_rows(model.sample, labels, data.class_names, model.image_shape)
    first = torch.arange(min(BATCH, len(data.validation))).split(batch_size(model.image_shape))
    seen = [
        model.encode_indices(to_pixels(images, device))
        for images, _ in data.validation.load(first, device)
    ]
    codes = {}
    for level in seen[0]:
        indices = torch.cat([batch[level] for batch in seen])
        # Which image's code each place gets: (n, h, w)
        source = torch.randint(len(indices), (ROWS * PER_ROW, *indices.shape[1:]), device=device)
        codes[level] = indices.gather(0, source)

    def decode(chosen: Tensor) -> Tensor:
        return model.decode_indices({level: grid[chosen] for level, grid in codes.items()})

    chosen = torch.arange(ROWS * PER_ROW, device=device)
    return _in_rows("codes drawn apart", in_batches(decode, chosen, model.image_shape))


def even_labels(count: int, classes: int, device: torch.device) -> Tensor:
    """Labels (count,) int64 in order, each class as often as the others; of no classes all -1."""
    if not classes:
        return torch.full((count,), -1, device=device)
    return (torch.arange(count, device=device) % classes).sort().values


def sampled_rows(
    sample: Callable[[Tensor], Tensor],
    labels: Tensor,
    class_names: Sequence[str],
    image_shape: tuple[int, int, int],
) -> Rows:
    """Samples in rows of PER_ROW, by class.

    sample: labels (count,) int64, -1 for no class → images (count, C, H, W) in [0, 1].
    """
    images = in_batches(sample, labels, image_shape)
    rows: Rows = []
    for label in labels.unique():
        name = "samples" if label < 0 else class_names[label]
        rows += _in_rows(name, images[labels == label])
    return rows


def _in_rows(label: str, images: Tensor) -> Rows:
    return [(label if i == 0 else "", row) for i, row in enumerate(images.split(PER_ROW))]
