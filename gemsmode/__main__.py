"""``python -m gemsmode``."""

import sys

from gemsmode.cli import main

sys.exit(main())
