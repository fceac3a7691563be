"""Lines that also those want to see who asked for quiet."""

import sys


def warn(text: str) -> None:
    """Print a warning."""
    print(f"warning: {text}", file=sys.stderr)
