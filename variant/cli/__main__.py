"""``python -m variant.cli``."""

import sys

from variant.cli.main import main

sys.exit(main())
