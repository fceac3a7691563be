"""Random, repeatable division of an image set."""

import torch

from softvq.data.types import DataError, Images


def split_off(
    data: Images, fraction: float, seed: int, part: str, advice: str
) -> tuple[Images, Images]:
    """Divide `data` into (rest, part), `part` being a random `fraction` of it.

    The same seed gives the same division; both results keep the order of `data`.
    Raises DataError, naming `part` and with the advice, when either of the two would be empty.
    """
    count = round(len(data) * fraction)
    if not 0 < count < len(data):
        raise DataError(
            f"cannot take a {part} split of {fraction:g} from {len(data)} images without leaving "
            f"a split empty; {advice}"
        )
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    rest, taken = order[count:].sort().values, order[:count].sort().values
    return data.select(rest), data.select(taken)
