"""`python -m softvq …` is `softvq …`."""

import sys

from softvq.cli import main

sys.exit(main())
