"""Numbers and their nouns in messages."""

import re
from pathlib import Path

import numpy as np
import pytest

from variant_kernels.wording import counted

ROOT = Path(__file__).parents[2]
NOUNS = (
    "batch(?:es)|byte|class(?:es)|code|column|depth|entr(?:ies)|epoch|feature|file|GPU|head|image|"
    "key|label|layer|page|parameter|part|pass(?:es)|process(?:es)|round|row|sample|scale|schedule|"
    "sequence|set|shard|step|tensor|thread|token|value"
)
# A value in braces, then a plural; also where the line of the source ends between them.
PLURAL = re.compile(
    rf"\{{([^{{}}]+)\}} (?:\"\n\s*f?\")?(?:other |held-out )?((?:{NOUNS})s?(?<=s))\b(?!/s)"
)
CONSTANT = re.compile(r"(?:\w+\.)?[A-Z][A-Z_]+(?:\[[^\]]*\])?(?::,)?")
# No number, or one that is never 1.
ALLOWED = {
    ("checkpoints/model_folder.py", "what", "keys"),
    ("ops/pages.py", "'with' if eight_bits else 'without'", "scales"),
    ("training/new_recipe.py", "side", "images"),  # 64x64 images
    ("data/file_stamps.py", "made", "images"),  # a text
    ("bench/environment.py", "machine['threads']", "threads"),  # of a file's name
}


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [
        (0, "image", "0 images"),
        (1, "image", "1 image"),
        (1, "class", "1 class"),
        (2, "batch", "2 batches"),
        (2, "entry", "2 entries"),
        (2, "key", "2 keys"),
        (1024, "held-out image", "1,024 held-out images"),
        (1.0, "epoch", "1 epoch"),
        (1.5, "epoch", "1.5 epochs"),
        (np.int64(1234567), "image", "1,234,567 images"),
        (np.float32(1.5), "epoch", "1.5 epochs"),
    ],
)
def test_the_noun_follows_the_number(count, noun, text):
    assert counted(count, noun) == text


def test_no_message_writes_a_plural_behind_any_number():
    found = []
    for package in ("variant", "variant_kernels"):
        for path in (ROOT / package).rglob("*.py"):
            for value, noun in PLURAL.findall(path.read_text()):
                where = f"{path.parent.name}/{path.name}", value, noun
                if CONSTANT.fullmatch(value) is None and where not in ALLOWED:
                    found.append(where)
    assert not found  # write variant_kernels.wording.counted
