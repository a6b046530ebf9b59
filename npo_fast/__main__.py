"""``python -m npo_fast``: the same as ``npo-fast``."""

import sys

from npo_fast.cli import main

sys.exit(main())
