"""Lines that also those want to see who asked for quiet."""

import contextlib
import sys


def warn(text: str) -> None:
    """Print a warning, if there is room where it goes."""
    with contextlib.suppress(OSError):
        print(f"warning: {text}", file=sys.stderr)
