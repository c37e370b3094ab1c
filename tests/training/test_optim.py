"""AdamW: parameter groups, the learning rate of a step."""

import dataclasses

import pytest
import torch
from tiny_runs import OPTIM
from torch import nn

from variant.models.var import VAR
from variant.training.optim import (
    clipped_step,
    decay_groups,
    gradient_norm,
    learning_rate,
)


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


@pytest.mark.parametrize("loss_scaling", [False, True])
@pytest.mark.parametrize("size", [1e-3, 30.0])
def test_a_step_clips_as_clip_grad_norm_does(size, loss_scaling):
    results = []
    for ours in (True, False):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, fused=True)
        scaler = torch.amp.GradScaler("cpu", enabled=loss_scaling, init_scale=4.0)
        for _ in range(3):
            loss = (size * module(torch.ones(2, 8))).square().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = gradient_norm(module)
            if ours:
                # As in a checkpoint of a run whose AdamW was not fused.
                for group in optimizer.param_groups:
                    group["fused"] = None
                clipped_step(optimizer, scaler, norm, 0.5)
            else:
                assert norm == nn.utils.clip_grad_norm_(module.parameters(), 0.5)
                scaler.step(optimizer)
            scaler.update()
            assert not hasattr(optimizer, "grad_scale")
            optimizer.zero_grad()
        results.append([parameter.detach().clone() for parameter in module.parameters()])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
