"""The shipped supernet of Fashion-MNIST: a run of the study, with the names of its classes."""

import json
from pathlib import Path

import pytest
import torch

from variant import VARiant
from variant.cli.main import main
from variant.data.idx import FASHION_MNIST, FASHION_MNIST_CLASSES
from variant.search.data import held_out

RESULTS = Path(__file__).parents[1] / "benchmarks" / "study" / "results"


@pytest.fixture(scope="module")
def model():
    return VARiant.from_pretrained("fashion-mnist")


@pytest.fixture(scope="module")
def run(model):
    """The row of the study's results that the model's config names."""
    training = model.extra["training"]
    runs = json.loads((RESULTS / "extras.json").read_text())["runs"]
    (row,) = (r for r in runs if (r["name"], r["seed"]) == (training["run"], training["seed"]))
    return row


def test_it_is_the_run_of_the_study_that_its_config_names(model, run):
    training = model.extra["training"]
    assert training["settings"] == run["settings"]
    assert training["steps"] == run["steps"]
    losses = {name.removeprefix("d"): row["mean"] for name, row in run["losses"].items()}
    assert training["held_out_loss"] == pytest.approx(losses, rel=1e-5)


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="needs the package dataset-fashion-mnist")
def test_its_losses_are_those_of_the_study(model, run):
    """On the first 200 of 10,000 held-out images, of which the study gives the standard error."""
    images = held_out(model, "fashion-mnist", 200)
    for depth, name in ((None, "full"), (4, "d4"), (2, "d2")):
        loss = -model.engine().forced_log_probs(images.labels_N, images.tokens_NL, depth=depth)
        row = run["losses"][name]
        assert loss.mean().item() == pytest.approx(row["mean"], abs=4 * row["se"] * 50**0.5)


def test_it_paints_by_the_names_of_its_classes(model, tmp_path):
    assert model.var.config.class_names == FASHION_MNIST_CLASSES
    words = ["generate", "--model", "fashion-mnist", "--labels", "sneaker", "ankle boot"]
    assert main([*words, "--all-depths", "--out", str(tmp_path / "shoes.png")]) == 0
    named = model.generate(["sneaker", "ankle boot"], depth=2, seed=0)
    numbered = model.generate([7, 9], depth=2, seed=0)
    assert torch.equal(named.tokens, numbered.tokens)


def test_no_depth_of_it_is_another(model):
    images = [model.generate([8], depth=depth, seed=0).images for depth in (None, 4, 2)]
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[1], images[2])
