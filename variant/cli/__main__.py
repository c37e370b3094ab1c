"""``python -m variant.cli``."""

import sys

from variant.cli.entry import main

sys.exit(main())
