"""Inputs of ``variant eval`` that look right: functions, orders, labels and classifiers."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from seeded import images as seeded_images

from variant.cli import evaluate as evaluate_module
from variant.cli.main import main
from variant.data.config import DataSection
from variant.data.digits import DigitsData
from variant.errors import UserError
from variant.evaluation.classifier import train_classifier
from variant.evaluation.features import FeatureNetwork, Features
from variant.evaluation.image_sets import Reference, array_images, open_images
from variant.evaluation.report import evaluate

NETWORK = FeatureNetwork(
    "means", "FD", "", lambda x: Features(x.float().mean((2, 3))), torch.device("cpu")
)


def array(seed, count, side=16):
    return seeded_images(seed, count, side, side).permute(0, 2, 3, 1).numpy()


def write_folder(folder, pixels, name="{index:05d}.png"):
    folder.mkdir(exist_ok=True)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / name.format(index=index))


def test_a_function_of_features_that_fails_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "failing.py").write_text(
        "import torch\n"
        "def mean(x):\n    return x.float().mean((2, 3))\n"
        "def raises(x):\n    raise RuntimeError('one\\ntwo')\n"
        "def leaves(x):\n    raise SystemExit(3)\n"
        "def empty(x):\n    return mean(x)[:, :0]\n"
        "def integers(x):\n    return mean(x).long()\n"
        "def sparse(x):\n    return mean(x).to_sparse()\n"
        "def absent(x):\n    return mean(x).to('meta')\n"
        "def large(x):\n    return mean(x).double() * 1e200\n"
        "def some(x):\n    return torch.where(x[:, :1, 0, 0] == 7, torch.nan, mean(x))\n"
        "def same(x):\n    return torch.ones(len(x), 3)\n"
    )
    for name, text in (
        ("leaving", "import sys\nsys.exit(4)\n"),
        ("wrong", "def features(:\n"),
        ("broken", "raise KeyError('x')\n"),
    ):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    images = array(1, 40)
    images[:, 0, 0, 0] = 0
    images[17, 0, 0, 0] = 7
    np.savez("images.npz", arr_0=images)
    words = ["eval", "--images", "images.npz", "--reference", "images.npz", "--batch", "16"]
    for features, message in (
        ("failing:raises", "eval: --features failing:raises: RuntimeError: one two"),
        ("failing:leaves", "eval: --features failing:leaves: SystemExit: 3"),
        ("failing:empty", "with D of 1 or more; got (16, 0) (float32, strided, on cpu)"),
        ("failing:integers", "must return floating features (16, D) for as many images"),
        ("failing:integers", "got (16, 3) (int64, strided, on cpu)"),
        ("failing:sparse", "got (16, 3) (float32, sparse_coo, on cpu)"),
        ("failing:absent", "got (16, 3) (float32, strided, on meta)"),
        ("failing:large", "eval: failing:large: the features of image 0 of images.npz are not"),
        ("failing:some", "eval: failing:some: the features of image 17 of images.npz are not"),
        ("leaving:features", "eval: --features leaving:features: SystemExit: 4"),
        ("wrong:features", "eval: --features wrong:features: SyntaxError: "),
        ("broken:features", "eval: --features broken:features: KeyError: 'x'"),
        (".failing:mean", "eval: --features .failing:mean: TypeError: "),
    ):
        assert main([*words, "--features", features]) == 1
        error = capsys.readouterr().err
        assert error.startswith("variant: error: ")
        assert message in error
        assert error.count("\n") == 1
    assert main([*words, "--features", "failing:same", "--json", "same.json"]) == 0
    warnings = json.loads(Path("same.json").read_text())["warnings"]
    assert [warning for warning in warnings if "all 40 images of images.npz" in warning]


def test_numbers_that_do_not_sort_as_numbers_are_warned_about_in_pairs(tmp_path):
    pixels = array(1, 24)
    write_folder(tmp_path / "plain", pixels, "{index}.png")
    write_folder(tmp_path / "padded", pixels, "{index:03d}.png")
    write_folder(tmp_path / "same", pixels, "{index}.png")

    def notes(name, reference, paired=True):
        images, other = open_images(tmp_path / name), reference
        if isinstance(reference, str):
            other = open_images(tmp_path / reference)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            evaluate(images, Reference("real", other), NETWORK, paired=paired)
        return [str(each.message) for each in heard if "in the order of the names" in str(each)]

    both = array_images("array", pixels)
    assert "plain: in the order of the names image 19 is before 2;" in notes("plain", both)[0]
    assert "plain: in the order of the names" in notes("padded", "plain")[0]
    assert notes("plain", "same") == []
    assert notes("padded", both) == []
    assert notes("plain", both, paired=False) == []


@pytest.mark.parametrize("labels", [np.eye(4), np.arange(3), np.arange(4.0), np.array("abcd")])
def test_an_array_that_is_none_of_labels_is_warned_about(labels):
    pixels = array(1, 4)
    with pytest.warns(RuntimeWarning, match="a: arr_1 holds no integer for each of the 4 images"):
        assert array_images("a", pixels, labels).labels is None


def test_a_classifier_of_images_of_another_size_is_not_taken(tmp_path, monkeypatch, capsys):
    """The digest of a folder is of its files, whatever the size to which they are resized."""
    for part in ("train", "held_out"):
        for label in ("a", "b"):
            (tmp_path / part).mkdir(exist_ok=True)
            write_folder(tmp_path / part / label, array(1, 12))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate_module, "STEPS", 1)
    monkeypatch.setattr(
        evaluate_module,
        "train_classifier",
        lambda data, seed, report: train_classifier(data, seed=seed, steps=1, report=report),
    )
    text = (
        'name = "mine"\ndescription = "x"\n[data]\nkind = "folder"\ntrain = "train"\n'
        'held_out = "held_out"\nworkers = 0\n[model]\nnum_classes = 2\ndepth = 2\nembed_dim = 32\n'
        "num_heads = 2\n[vae]\npatch_nums = [1, {last}]\nvocab_size = 8\nz_channels = 4\nch = 32\n"
        "ch_mult = [1, 1]\nnum_res_blocks = 1\n[vae_training]\nepochs = 1\n[vae_training.optim]\n"
        "batch_size = 4\nlearning_rate = 1e-3\n[optim]\nbatch_size = 4\nlearning_rate = 1e-3\n"
        "[schedule]\ndepths = []\nbridge = 0\njoint = 1\ntransition = 0\nrefinement = 0\n"
    )
    Path("mine.toml").write_text(text.format(last=8))
    words = ["eval", "--reference", "mine.toml", "--features", "classifier:mine.toml", "--images"]
    write_folder(tmp_path / "sixteen", array(2, 20))
    write_folder(tmp_path / "twelve", array(2, 20, side=12))
    assert main([*words, "sixteen"]) == 0
    assert main([*words, "sixteen"]) == 0
    Path("mine.toml").write_text(text.format(last=6))
    capsys.readouterr()
    assert main([*words, "twelve"]) == 1
    assert "was trained on images of 16 x 16 pixels, mine.toml has 12" in capsys.readouterr().err
    Path("runs/mine/classifier.json").unlink()
    assert main([*words, "twelve"]) == 1
    assert "give another --weights, or remove it" in capsys.readouterr().err


def test_one_image_trains_no_classifier():
    class One(DigitsData):
        num_train = 1

        def __init__(self):
            super().__init__(DataSection("digits"), 16, 1, seed=0)
            self.num_train = 1

    with pytest.raises(UserError, match="two training images or more; the data have 1"):
        train_classifier(One(), steps=1)
