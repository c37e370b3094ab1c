"""AdamW: parameter groups, the learning rate of a step."""

import dataclasses

import pytest
from tiny_runs import OPTIM

from variant.models.var import VAR
from variant.training.optim import decay_groups, learning_rate


def test_biases_norms_embeddings_and_gains_have_no_weight_decay(recipe):
    module = VAR(recipe.var_config)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    decayed, not_decayed = decay_groups(module, 0.05)
    assert decayed["weight_decay"] == 0.05
    assert not_decayed["weight_decay"] == 0.0
    decayed_names = {names[id(parameter)] for parameter in decayed["params"]}
    not_decayed_names = {names[id(parameter)] for parameter in not_decayed["params"]}
    assert decayed_names | not_decayed_names == set(names.values())
    assert {"word_embed.weight", "head.weight", "blocks.0.attn.mat_qkv.weight"} <= decayed_names
    assert {
        "class_emb.weight",
        "lvl_embed.weight",
        "pos_start",
        "pos_1LC",
        "blocks.0.attn.scale_mul_1H11",
        "head.bias",
    } <= not_decayed_names


def test_learning_rate_is_constant_or_a_cosine_after_the_warm_up():
    assert {learning_rate(OPTIM, step, 100) for step in range(100)} == {1e-3}
    cosine = dataclasses.replace(OPTIM, schedule="cosine", final_ratio=0.1, warmup=0.1)
    rates = [learning_rate(cosine, step, 100) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(1e-4, rel=0.01)
