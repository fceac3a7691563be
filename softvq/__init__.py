"""softvq: soft vector quantisation, its kernels, and the autoencoders around it."""

import pathlib

if not (pathlib.Path(__file__).parent / "kernels").is_dir():
    # Running from a checkout: the folder kernels/ lies beside this package.
    __path__.append(str(pathlib.Path(__file__).parent.parent))

from softvq.functional import (
    SoftQuantized,
    assignment_probabilities,
    code_sums,
    code_usage,
    nearest_codes,
    soft_quantize,
    usage_and_entropy,
)

__version__ = "0.1.0"

__all__ = [
    "SoftQuantized",
    "assignment_probabilities",
    "code_sums",
    "code_usage",
    "nearest_codes",
    "soft_quantize",
    "usage_and_entropy",
]
