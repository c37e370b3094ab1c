"""A caller's default device and dtype, and autocast, change no measurement."""

import pytest
import torch

from variant.bench import peak_memory
from variant.bench.engine_bench import measure
from variant.bench.models import build
from variant.bench.roofline import measure_peaks
from variant.data.sources import open_data
from variant.evaluation.features import load_network
from variant.evaluation.report import evaluate


@pytest.fixture
def odd_defaults():
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "function",
    [evaluate, load_network, build, measure_peaks, measure, peak_memory.run],
)
def test_work_that_makes_models_takes_the_usual_defaults(function, odd_defaults, monkeypatch):
    seen = []

    def look(*arguments, **options):
        seen.append((torch.zeros(1).dtype, torch.zeros(1).device.type))
        seen.append(torch.is_autocast_enabled("cpu"))

    decorated = function.__code__.co_freevars.index("func")
    monkeypatch.setattr(function.__closure__[decorated], "cell_contents", look)
    with torch.autocast("cpu", torch.bfloat16):
        function()
    assert seen == [(torch.float32, "cpu"), False]


def test_labels_of_a_folder_are_on_the_cpu(recipe, odd_defaults):
    data = open_data(recipe.data, recipe.vae.image_size, recipe.vae.in_channels, 0)
    labels = data.held_out(range(2))[1]
    assert (labels.device.type, data.train_labels.device.type) == ("cpu", "cpu")
    assert data.train_labels.tolist() == [0] * 12 + [1] * 12
