"""What a caller has set in torch does not change a training, and is as before afterwards."""

import pytest
import torch
from tiny_runs import CPU, quiet, trained_vae

from variant.files import read_safetensors
from variant.torch_modes import modes_of_a_new_process
from variant.training import classifier, tokenize, vae_task, var_task
from variant.training.vae_task import train_vae
from variant.training.var_task import train_var

MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default device": lambda: torch.device("meta"),
}


def modes():
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_device(),
        torch.get_default_dtype(),
    )


@pytest.fixture
def default_dtype():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("mode", MODES)
def test_modes_are_those_of_a_new_process_and_come_back(mode, default_dtype):
    @modes_of_a_new_process()
    def fail():
        raise KeyError(modes())

    with MODES[mode]():
        before = modes()
        with pytest.raises(KeyError) as raised:
            fail()
        assert modes() == before
    assert raised.value.args == ((True, False, False, CPU, torch.float32),)


@pytest.mark.parametrize(
    ("module", "name", "first"),
    [
        (var_task, "train_var", "open_run"),
        (vae_task, "train_vae", "open_run"),
        (tokenize, "tokenize", "integer"),
        (classifier, "train_classifier", "integer"),
    ],
)
def test_every_training_begins_in_the_modes_of_a_new_process(
    module, name, first, monkeypatch, recipe, tmp_path
):
    def begin(*arguments, **options):
        raise KeyError(modes())

    monkeypatch.setattr(module, first, begin)
    arguments = {"tokenize": (recipe, tmp_path, 1), "train_classifier": (None,)}
    options = {"vae_folder": tmp_path} if name == "tokenize" else {}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), pytest.raises(KeyError) as raised:
        getattr(module, name)(*arguments.get(name, (recipe, tmp_path)), **options)
    assert raised.value.args == ((True, False, False, CPU, torch.float32),)


@pytest.mark.nightly
def test_a_training_within_every_mode_is_that_without_them(recipe, tmp_path, default_dtype):
    def weights(folder, name="model"):
        return read_safetensors(tmp_path / folder / f"{name}.safetensors")

    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        train_vae(recipe, tmp_path / "inside", console=quiet(), device=CPU)
        train_var(recipe, tmp_path / "inside", console=quiet(), device=CPU)
    trained_vae(recipe, tmp_path / "outside")
    train_var(recipe, tmp_path / "outside", console=quiet(), device=CPU)
    inside, outside = weights("inside"), weights("outside")
    assert inside.keys() == outside.keys()
    for name, weight in outside.items():
        assert torch.equal(inside[name], weight), name
