"""``python -m variant.training RECIPE [options of variant train]``, which torchrun can start."""

import sys

from variant.cli.entry import main

if __name__ == "__main__":
    words = sys.argv[1:]
    if words and not words[0].startswith("-"):
        words.insert(0, "--recipe")
    sys.argv = ["variant", "train", *words]
    sys.exit(main())
