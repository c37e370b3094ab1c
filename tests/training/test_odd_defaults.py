"""A caller's default device and dtype change no training; after it they are as before."""

import dataclasses

import pytest
import torch
from tiny_runs import CPU, quiet

from variant.bench import peak_memory
from variant.bench.engine_bench import measure
from variant.bench.models import build
from variant.bench.roofline import measure_peaks
from variant.data.sources import open_data
from variant.evaluation.features import load_network
from variant.evaluation.report import evaluate
from variant.models.placement import in_usual_defaults
from variant.training.classifier import train_classifier
from variant.training.tokenize import tokenize
from variant.training.vae_task import train_vae
from variant.training.var_task import train_var

FILES = ("vae-best.safetensors", "var-best.safetensors", "model.safetensors")


@pytest.fixture
def odd_defaults():
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def short(recipe):
    training = dataclasses.replace(recipe.vae_training, epochs=1)
    schedule = dataclasses.replace(recipe.schedule, joint=1, transition=0, refinement=0)
    return dataclasses.replace(recipe, vae_training=training, schedule=schedule)


def train(recipe, out):
    for function in (train_vae, train_var):
        function(recipe, out, console=quiet(), device=CPU)
    data = dataclasses.replace(recipe.data, workers=0)
    tokenize(dataclasses.replace(recipe, data=data), out / "tokens", 1, vae_folder=out, device=CPU)
    paths = [*(out / name for name in FILES), *sorted((out / "tokens").glob("*.tar"))]
    return {path.name: path.read_bytes() for path in paths}


@pytest.mark.nightly
def test_a_training_is_the_same(short, tmp_path, request):
    expected = train(short, tmp_path / "usual")
    request.getfixturevalue("odd_defaults")
    assert train(short, tmp_path / "odd") == expected
    assert (torch.get_default_dtype(), torch.get_default_device().type) == (torch.float64, "meta")


@pytest.mark.parametrize(
    "function",
    [train_var, train_vae, tokenize, train_classifier, evaluate, load_network, build, measure_peaks,
     measure, peak_memory.run],
)  # fmt: skip
def test_work_that_makes_models_takes_the_usual_defaults(function, odd_defaults, monkeypatch):
    seen = []

    def look(*arguments, **options):
        seen.append((torch.zeros(1).dtype, torch.zeros(1).device.type))

    # The decorated function is the only cell that the wrapper closes over.
    monkeypatch.setattr(function.__closure__[0], "cell_contents", look)
    function()
    assert seen == [(torch.float32, "cpu")]


def test_labels_of_a_folder_are_on_the_cpu(short, odd_defaults):
    data = open_data(short.data, short.vae.image_size, short.vae.in_channels, 0)
    labels = data.held_out(range(2))[1]
    assert (labels.device.type, data.train_labels.device.type) == ("cpu", "cpu")
    assert data.train_labels.tolist() == [0] * 12 + [1] * 12


def test_the_defaults_come_back_after_an_error(odd_defaults):
    def fail():
        assert (torch.zeros(1).dtype, torch.zeros(1).device.type) == (torch.float32, "cpu")
        raise KeyError

    with pytest.raises(KeyError):
        in_usual_defaults(fail)()
    assert (torch.zeros(1).dtype, torch.zeros(1).device.type) == (torch.float64, "meta")
