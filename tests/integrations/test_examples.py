"""Every file of ``examples/`` runs on tiny models and gives its documented result."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from lookalike_var import PictureVAR

FOLDER = Path(__file__).parents[2] / "examples"
TRIED = {"speed_up_a_var_checkpoint", "use_one_op", "train_with_variant_attention"}


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tried_here():
    assert {path.stem for path in FOLDER.glob("*.py")} == TRIED


@pytest.fixture
def original_repository(tmp_path, monkeypatch):
    """A folder that can be imported from like a clone of the original."""
    package = tmp_path / "models"
    package.mkdir()
    (package / "__init__.py").write_text("from lookalike_var import build_vae_var\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "models", raising=False)
    yield tmp_path
    sys.modules.pop("models", None)


def test_speeding_up_a_checkpoint_generates_the_same_picture(original_repository, capsys):
    example = load("speed_up_a_var_checkpoint")
    vae, model = example.original_models(str(original_repository), 4, None, None)
    pictures = example.compare(model, vae, torch.tensor([2, 4]), cfg=1.5, top_k=5, top_p=0.0)
    assert all(picture.isfinite().all() for picture in pictures.values())
    assert torch.equal(pictures["patched"], pictures["original"])
    assert pictures["accelerated"].shape == pictures["original"].shape
    assert type(model) is PictureVAR
    assert "MiB" in capsys.readouterr().out


def test_checkpoints_are_loaded_where_they_are_named(original_repository, tmp_path):
    example = load("speed_up_a_var_checkpoint")
    vae, var = example.original_models(str(original_repository), 4, None, None)
    for model, name in ((var, "var.pth"), (vae, "vae.pth")):
        torch.save(model.state_dict(), tmp_path / name)
    files = str(tmp_path / "var.pth"), str(tmp_path / "vae.pth")
    loaded_vae, loaded_var = example.original_models(str(original_repository), 4, *files)
    for model, loaded in ((vae, loaded_vae), (var, loaded_var)):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_single_ops_agree_in_one_pass_and_scale_by_scale(capsys):
    example = load("use_one_op")
    layout = example.ScaleLayout.from_patch_nums((1, 2, 3))
    qkv = torch.randn(2, layout.total, 3, 2, 16)
    one, steps = example.all_scales_at_once(qkv, layout), example.scale_by_scale(qkv, layout)
    assert torch.allclose(one, steps, atol=1e-5)
    example.main()
    assert "largest difference" in capsys.readouterr().out


def test_training_with_the_attention_layer_learns():
    losses = load("train_with_variant_attention").train(60)
    assert losses[0] == pytest.approx(2.1, abs=0.4)
    assert losses[-1] < 0.1


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("train_with_variant_attention", ["--steps", "0"], "--steps must be at least 1; got 0"),
        (
            "speed_up_a_var_checkpoint",
            ["--repo", "nothere"],
            "--repo must be a clone of FoundationVision/VAR; nothere has no models",
        ),
    ],
)
def test_wrong_usage_is_one_message(name, words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, *words])
    with pytest.raises(SystemExit) as stop:
        load(name).main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
