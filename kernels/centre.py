"""Where every backend moves the origin before it multiplies."""

from torch import Tensor

_SOME = 64


def centre_of(codebook: Tensor) -> Tensor:
    """A point (…, 1, D) in the midst of the codes (…, K, D): the median of some, by coordinate.

    Any point among them would do. But a mean would follow a single code that is far away, to where
    all others lose their digits; half of these have to be far before the median does. The step
    between them is odd, so that it hits no pattern of powers of two.
    """
    some = codebook.detach()[..., :: codebook.shape[-2] // _SOME | 1, :]
    middle = some.shape[-2] // 2
    return some.sort(-2).values[..., middle : middle + 1, :]
