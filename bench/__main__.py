"""`python -m bench COMMAND`."""

import sys
from importlib import import_module

COMMANDS = (
    *("check", "compile", "emulate", "op", "memory", "step", "trainer", "quality"),
    *("all", "figures"),
)

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(f"usage: python -m bench {{{','.join(COMMANDS)}}} [options]", file=sys.stderr)
        sys.exit(2)
    # Only the command's own module: `compile` needs Triton, `op` does not.
    sys.exit(import_module(f"bench.{sys.argv[1]}").main(sys.argv[2:]))
