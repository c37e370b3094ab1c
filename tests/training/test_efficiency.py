"""The recipe's sections memory and compile: what the trainer makes of them."""

import dataclasses
import sys
import types

import pytest
import torch
from tiny_runs import CPU, metrics, quiet, tiny_recipe, train_both

from variant.errors import UserError
from variant.models.execution import Execution
from variant.models.var import VAR
from variant.training import efficiency
from variant.training.efficiency import (
    CompileSection,
    MemorySection,
    convert_to_fp8,
    execution_of,
    is_in_a_block,
)
from variant.training.resume_rules import compare_recipes
from variant.training.var_task import train_var


def losses(folder):
    return [list(entry["held_out"].values()) for entry in metrics(folder)]


def with_sections(recipe, checkpointing="none", **compilation):
    return dataclasses.replace(
        recipe,
        memory=MemorySection(checkpointing),
        compile=CompileSection(**compilation),
    )


def test_the_defaults_are_eager_and_keep_everything():
    assert execution_of(MemorySection(), CompileSection()) == Execution("none", None)


def test_a_run_with_recomputed_attention_and_compiled_blocks_has_the_same_losses(
    folders, tmp_path, monkeypatch
):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(efficiency, "BACKEND", backend)
    recipe = tiny_recipe(folders)
    train_both(recipe, tmp_path / "plain")
    vae = str(tmp_path / "plain" / "vae-best.safetensors")
    training = dataclasses.replace(recipe.vae_training, weights=vae)
    recipe = dataclasses.replace(recipe, vae_training=training)
    recipe = with_sections(recipe, "attention", blocks=True)
    train_var(recipe, tmp_path / "compiled", console=quiet(), device=CPU)
    changed, expected = (torch.tensor(losses(tmp_path / name)) for name in ("compiled", "plain"))
    torch.testing.assert_close(changed, expected, rtol=1e-4, atol=0)
    assert len(graphs) == 2  # the full network and its bridge
    calls = [node for graph in graphs for node in graph.graph.nodes if "checkpoint" in str(node)]
    assert calls


def test_memory_and_compilation_may_change_when_a_run_is_resumed(folders):
    old = tiny_recipe(folders)
    changes = compare_recipes(old, with_sections(old, "full", blocks=True), "var", "var-last.pt")
    assert changes == ["memory.checkpointing 'none' -> 'full'", "compile.blocks False -> True"]
    with pytest.raises(UserError, match=r"compile.fp8 False -> True"):
        compare_recipes(old, with_sections(old, fp8=True), "var", "var-last.pt")


def test_8_bit_products_without_torchao_are_refused(folders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    recipe = tiny_recipe(folders)
    var = VAR(recipe.var_config)
    with pytest.raises(UserError, match=r"tiny: compile.fp8 needs torchao .*; pip install torchao"):
        convert_to_fp8(var, "tiny", CPU)


def test_8_bit_products_need_a_gpu_that_has_them(folders, monkeypatch):
    module = types.ModuleType("torchao.float8")
    module.convert_to_float8_training = None
    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.float8", module)
    with pytest.raises(UserError, match=r"capability 8.9 or higher; the device is cpu"):
        convert_to_fp8(VAR(tiny_recipe(folders).var_config), "tiny", CPU)


def test_the_linear_layers_of_the_blocks_are_those_in_8_bits(folders):
    var = VAR(tiny_recipe(folders).var_config)
    names = [name for name, module in var.named_modules() if is_in_a_block(module, name)]
    assert len(names) == 4 * var.config.depth
    assert not {"head", "word_embed", "blocks.0.ada_lin.1"} & set(names)
