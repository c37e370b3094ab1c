"""Zone weights in files: one folder holds all; the original format holds the full network."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from zone_models import KINDS, LABELS, VARIATIONS, zone_model

from variant.checkpoints.original_var import load_original, save_original
from variant.errors import UserError
from variant.models.zones import is_zone_key
from variant.supernet import VARiant


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("options", VARIATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_holds_all_and_is_read_back(kind, options, tmp_path):
    model = zone_model(kind, **options)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["var"]["zone_weights"] != "shared"
    loaded = VARiant.from_pretrained(tmp_path)
    assert loaded.var.config == model.var.config
    assert same_state(loaded.var, model.var)
    for depth in (None, 2):
        ours, theirs = (m.generate(LABELS, depth=depth, seed=1) for m in (model, loaded))
        assert torch.equal(ours.tokens, theirs.tokens)
    card = (tmp_path / "README.md").read_text()
    assert "same weights serve" not in card
    assert {"adaln": "adaLN", "copies": "copies"}.get(kind, "LoRA, rank 3") in card


def test_bfloat16_folders_are_read_back_too(tmp_path):
    model = zone_model("lora")
    model.save_pretrained(tmp_path)
    loaded = VARiant.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.var.layers()[0].zones["2"].lora["fc1"].lora_A.dtype == torch.bfloat16
    assert torch.isfinite(loaded.generate(LABELS, depth=2, seed=0).images).all()


def test_missing_zone_weights_are_an_error_or_those_of_the_full_network(tmp_path):
    model = zone_model("copies")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    kept = {k: v for k, v in load_file(path).items() if not k.startswith("var.blocks.3.zones.2.")}
    save_file(kept, path)
    with pytest.raises(UserError, match=r"blocks\.3\.zones\.2\."):
        VARiant.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"missing \(initialised\) keys: blocks\.3\.zones"):
        loaded = VARiant.from_pretrained(tmp_path, strict=False)
    block, original = loaded.var.layers()[3], model.var.layers()[3]
    assert torch.equal(block.zones["2"].ffn.fc1.weight, original.ffn.fc1.weight)
    assert torch.equal(block.zones["3"].ffn.fc1.weight, original.zones["3"].ffn.fc1.weight)


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_the_original_format_gets_the_full_network_with_a_warning(ending, tmp_path):
    model = zone_model("lora")
    paths = [tmp_path / f"{name}.{ending}" for name in ("var", "vae")]
    with pytest.warns(UserWarning, match=r'zone weights \("lora"\) of the depths 2, 3, which the'):
        save_original(model.var, model.vae, *paths)
    var, _ = load_original(*paths, num_heads=2)
    expected = {k: v for k, v in model.var.state_dict().items() if not is_zone_key(k)}
    assert var.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in var.state_dict().items())
