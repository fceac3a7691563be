"""`python train.py …` is `softvq train …`."""

import sys

from softvq.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
