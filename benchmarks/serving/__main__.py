"""``python -m benchmarks.serving``."""

import sys

from .run import main

sys.exit(main())
