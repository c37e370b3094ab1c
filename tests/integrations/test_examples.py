"""Every file of ``examples/`` runs on tiny models and does what it says."""

import importlib.util
from pathlib import Path

import pytest
import torch
from lookalike_var import LookalikeVAR, lookalike
from small_models import small_model

FOLDER = Path(__file__).parents[2] / "examples"
TRIED = {"speed_up_a_var_checkpoint", "use_one_op", "train_with_variant_attention"}


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tried_here():
    assert {path.stem for path in FOLDER.glob("*.py")} == TRIED


class Painting(LookalikeVAR):
    """Pictures out, as the original returns them."""

    vae = None

    def autoregressive_infer_cfg(self, B, label_B, **options):
        options.pop("top_p", None)
        tokens, _ = super().autoregressive_infer_cfg(B, label_B, **options)
        return self.vae.decode(tokens)


def test_speeding_up_a_checkpoint_paints_the_same_picture(capsys):
    vae = small_model().vae
    model = lookalike(Painting, sides=(1, 2, 3), vocab=24)
    object.__setattr__(model, "vae", vae)
    example = load("speed_up_a_var_checkpoint")
    pictures = example.compare(model, vae, torch.tensor([2, 4]), cfg=1.5, top_k=5, top_p=0.0)
    assert torch.equal(pictures["patched"], pictures["original"])
    assert pictures["accelerated"].shape == pictures["original"].shape
    assert type(model) is Painting
    assert "MiB" in capsys.readouterr().out


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
