"""Smooth mixtures, the null class and given tokens: equal to outputs of the original VAR code."""

import json

import numpy as np
import pytest
import torch
from golden_models import NAMES, golden_engine
from safetensors.torch import load_file
from small_models import small_model
from test_cuda_graphs import Repeater

from benchmarks.golden_weights import FOLDER
from variant.engine.arguments import keep_by_map
from variant.engine.engine import Engine
from variant_kernels import ScaleLayout
from variant_kernels.dispatch.support import triton_interprets

RECORDED = load_file(FOLDER / "editing.safetensors")
CASES = json.loads((FOLDER / "editing.json").read_text())["cases"]
BACKENDS = ("reference", "cpu")


def run(golden, engine, name, case, **changes):
    """The result of a recorded case, and its mask of kept tokens (B, L)."""
    described, label = CASES[case], golden.tensors["label"]
    labels = label if described["labels"] == "label" else torch.full_like(label, -1)
    arguments, keep_BL = {}, torch.zeros(len(label), engine.var.layout.total, dtype=torch.bool)
    if described["mask"] is not None:
        mask = RECORDED[f"{name}.{described['mask']}"]
        arguments = {"tokens": golden.tensors["tokens_in"], "mask": mask}
        keep_BL |= keep_by_map(mask.view(-1, *mask.shape[-2:]).float(), engine.var.layout)
    arguments |= {**described["arguments"], **changes}
    generator = torch.Generator().manual_seed(described["seed"])
    return engine.generate(labels, generator=generator, **arguments), keep_BL


def check(name, case, result, golden, keep_BL):
    drawn, given = RECORDED[f"{name}.{case}.drawn"].long(), golden.tensors["tokens_in"]
    assert torch.equal(result.tokens, torch.where(keep_BL, given, drawn))
    pixels = result.images[..., 3::8, 5::8]
    torch.testing.assert_close(pixels, RECORDED[f"{name}.{case}.pixels"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_tokens_and_images_equal_the_original(name, backend, case):
    golden, engine = golden_engine(name, backend=backend)
    result, keep_BL = run(golden, engine, name, case)
    check(name, case, result, golden, keep_BL)


@pytest.mark.skipif(not triton_interprets(), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("case", ["null", "edit_smooth"])
def test_tokens_and_images_equal_the_original_in_triton(case):
    golden, engine = golden_engine("no_l2norm", backend="triton")
    result, keep_BL = run(golden, engine, "no_l2norm", case)
    check("no_l2norm", case, result, golden, keep_BL)
