"""Fixtures of the training tests: a small data set, and a recipe that trains on it in seconds."""

import pytest
from PIL import Image
from tiny_runs import tiny_recipe


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folders of training and held-out images: 12 and 3 small ones in each of two classes.

    A test that changes them must change them back.
    """
    root = tmp_path_factory.mktemp("images")
    for part in ("train", "held_out"):
        for label in range(2):
            (root / part / f"class{label}").mkdir(parents=True)
            for index in range(12 if part == "train" else 3):
                shade = (200 * label, 20 * index, 100)
                image = Image.new("RGB", (12 + index, 10), shade)
                image.save(root / part / f"class{label}" / f"{index}.png")
    return root


@pytest.fixture
def recipe(folders):
    return tiny_recipe(folders)
