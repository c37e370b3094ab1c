"""Whole training steps against definitions in float64 that share no model code with the package.

Axes: B images, L tokens of all scales, C width, H heads, D width of one head, 6 the parts of a
block's modulation, 2 its branches.
"""

import dataclasses
import math

import numpy as np
import torch
from tiny_runs import CPU, quiet

from variant.data.encode import encode_images
from variant.models.var import VAR
from variant.models.vqvae import VQVAE
from variant.training.ema import EMASection
from variant.training.run_setup import RunSetup
from variant.training.trainer import Trainer
from variant.training.var_task import VARTask

STREAM_ORDER, STREAM_DROPS = 1, 7


def norm(x, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def silu(x):
    return x / (1 + (-x).exp())


def gelu(x):
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def linear(weights, name, x):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def attention(weights, name, h_BLC, heads, visible_LL):
    q_bias, v_bias = weights[f"{name}.q_bias"], weights[f"{name}.v_bias"]
    qkv = h_BLC @ weights[f"{name}.mat_qkv.weight"].T
    qkv = qkv + torch.cat((q_bias, torch.zeros_like(q_bias), v_bias))
    q_BLHD, k_BLHD, v_BLHD = qkv.unflatten(2, (3, heads, -1)).unbind(2)
    gain_H1 = weights[f"{name}.scale_mul_1H11"].clamp(max=math.log(100)).exp().view(-1, 1)
    q_BLHD, k_BLHD = (x / x.square().sum(-1, keepdim=True).sqrt() for x in (q_BLHD, k_BLHD))
    scores_BHLL = torch.einsum("bihd,bjhd->bhij", q_BLHD * gain_H1, k_BLHD)
    shares_BHLL = scores_BHLL.masked_fill(~visible_LL, -math.inf).softmax(-1)
    y_BLC = torch.einsum("bhij,bjhd->bihd", shares_BHLL, v_BLHD).flatten(2)
    return linear(weights, f"{name}.proj", y_BLC)


def var_loss(config, weights, samples, tokens_BL, x_teacher, layers, dropped_B, kept_N2B):
    """Cross-entropy; layers: those that run at each scale."""
    sides, heads, eps = config.patch_nums, config.num_heads, config.norm_eps
    scale_L = torch.tensor([k for k, side in enumerate(sides) for _ in range(side**2)])
    visible_LL = scale_L.unsqueeze(1) >= scale_L

    def embedded(labels_B):
        return weights["class_emb.weight"][labels_B.where(~dropped_B, config.num_classes)]

    mix_B1 = samples.mix_B.double().unsqueeze(1)
    cond_BC = mix_B1 * embedded(samples.labels_B) + (1 - mix_B1) * embedded(samples.mixed_labels_B)
    start = cond_BC.unsqueeze(1) + weights["pos_start"]
    x_BLC = torch.cat((start, linear(weights, "word_embed", x_teacher)), 1)
    x_BLC = x_BLC + weights["pos_1LC"] + weights["lvl_embed.weight"][scale_L]
    for layer in range(config.depth):
        name, runs_L1 = (
            f"blocks.{layer}",
            torch.tensor([layer in layers[k] for k in scale_L])[:, None],
        )
        if not runs_L1.any():
            continue
        modulation_6B1C = linear(weights, f"{name}.ada_lin.1", silu(cond_BC)).view(
            -1, 6, 1, x_BLC.shape[2]
        )
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation_6B1C.unbind(1)
        branch1_B11, branch2_B11 = kept_N2B[layer].view(2, -1, 1, 1)
        y_BLC = norm(x_BLC, eps) * (1 + scale1) + shift1
        y_BLC = attention(weights, f"{name}.attn", y_BLC, heads, visible_LL)
        h_BLC = x_BLC + branch1_B11 * gate1 * y_BLC
        y_BLC = norm(h_BLC, eps) * (1 + scale2) + shift2
        y_BLC = linear(weights, f"{name}.ffn.fc2", gelu(linear(weights, f"{name}.ffn.fc1", y_BLC)))
        x_BLC = (h_BLC + branch2_B11 * gate2 * y_BLC).where(runs_L1, x_BLC)
    modulation = linear(weights, "head_nm.ada_lin.1", silu(cond_BC))
    scale, shift = modulation.view(-1, 2, 1, x_BLC.shape[2]).unbind(1)
    logits = linear(weights, "head", norm(x_BLC, eps) * (1 + scale) + shift)
    wanted = logits.gather(2, tokens_BL.unsqueeze(2)).squeeze(2)
    return (logits.logsumexp(2) - wanted).mean()


def drops_of(config, seed, step, indices):
    size = 1 + 2 * config.depth
    rows = [
        np.random.default_rng((seed, step, index, STREAM_DROPS)).random(size, np.float32)
        for index in indices
    ]
    draws = torch.from_numpy(np.stack(rows)).double()
    share_N11 = torch.arange(config.depth).view(-1, 1, 1) / (config.depth - 1)
    keep_N11 = 1 - config.drop_path_rate * share_N11.double()
    kept_N2B = (draws[:, 1:].T.reshape(config.depth, 2, -1) < keep_N11) / keep_N11
    return draws[:, 0] < config.cond_drop_rate, kept_N2B


def snapshot(trainer):
    """Of each parameter: value, moments and number of steps, average; all float64."""
    moments = trainer.state.optimizer.state
    return {
        name: (
            parameter.detach().double().clone(),
            [moments[parameter][key].double().clone() for key in ("exp_avg", "exp_avg_sq", "step")]
            if moments[parameter]
            else [torch.zeros((), dtype=torch.float64)] * 3,
            trainer.state.ema.averages[name].double(),
        )
        for name, parameter in trainer.task.module.named_parameters()
    }


def near(value, wanted, tolerance=1e-5):
    return (value - wanted).norm() <= tolerance * wanted.norm() + 1e-12


def check_update(optim, rate, ema_decay, before, after, gradients, undecayed):
    """Clipping, moments, AdamW's step and the moving average; no gradient changes nothing."""
    size = math.sqrt(sum(float(g.square().sum()) for g in gradients.values() if g is not None))
    clipping = min(1.0, optim.clip / (size + 1e-6))
    for name, gradient in gradients.items():
        (value, moments, average), (new, (first, second, step), new_average) = (
            before[name],
            after[name],
        )
        if gradient is None:
            assert torch.equal(new, value), name
            assert step == moments[2], name
        else:
            assert step == moments[2] + 1, name
            for moment, old, beta, what in zip(
                (first, second),
                moments,
                optim.betas,
                (gradient * clipping, (gradient * clipping) ** 2),
                strict=False,  # the third is the number of steps
            ):
                assert near(moment, beta * old + (1 - beta) * what), name
            first, second = (
                m / (1 - beta**step) for m, beta in zip((first, second), optim.betas, strict=True)
            )
            decay = 0.0 if undecayed(name, value) else optim.weight_decay
            wanted = value * (1 - rate * decay) - rate * first / (second.sqrt() + 1e-8)
            assert (new - wanted).abs().max() < 1e-3 * rate, name
        wanted = ema_decay * average + (1 - ema_decay) * new
        assert (new_average - wanted).abs().max() < 1e-6, name
    return size


def test_steps_of_the_transformer(recipe, tmp_path):
    """Full network and subnet, in parts, with all that is drawn; skipped layers do not change."""
    replace = dataclasses.replace
    optim = replace(
        recipe.optim, accumulate=3, clip=1.8, weight_decay=0.3, schedule="cosine", warmup=0.5
    )
    recipe = replace(
        recipe,
        model=replace(recipe.model, cond_drop_rate=0.3, drop_path_rate=0.4),
        schedule=replace(recipe.schedule, bridge=0, joint_probability=0.5, joint=4, transition=0),
        ema=EMASection(0.8),
        optim=optim,
    )
    setup = RunSetup("var", recipe, optim, tmp_path, device=CPU)
    torch.manual_seed(0)
    vae, module = VQVAE(recipe.vae).eval(), VAR(recipe.var_config)
    with torch.no_grad():  # the gates of a new model are nearly 0
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    task = VARTask(module, vae, setup.data, recipe, CPU, setup.steps_per_epoch)
    trainer, total = Trainer(task, setup, 5, quiet()), 10
    names, sizes = set(), []
    for step in range(4):
        before = snapshot(trainer)
        loss, after = trainer._train_step(), snapshot(trainer)
        trainer.state.step += 1

        epoch, place = divmod(step, 2)
        order = np.random.default_rng((recipe.seed, epoch, STREAM_ORDER)).permutation(24)
        indices = order[place * 12 : place * 12 + 12]
        samples = setup.data.samples(indices, epoch)
        tokens_BL = encode_images(vae, samples.images)
        configuration = task.configurations.of_step(step)
        names.add(configuration.name)
        weights = {name: value.clone().requires_grad_() for name, (value, _, _) in before.items()}
        wanted = var_loss(
            module.config,
            weights,
            samples,
            tokens_BL,
            vae.teacher_input(tokens_BL).double(),
            configuration.schedule.layers,
            *drops_of(module.config, recipe.seed, step, indices),
        )
        assert abs(loss - wanted.item()) < 1e-5
        gradients = torch.autograd.grad(wanted, [*weights.values()], allow_unused=True)
        rate = 1e-3 * min(1, (step + 1) / 5) * 0.5 * (1 + math.cos(math.pi * step / total))
        size = check_update(
            optim,
            rate,
            0.8,
            before,
            after,
            dict(zip(weights, gradients, strict=True)),
            lambda name, value: (
                value.dim() < 2
                or any(part in name for part in ("class_emb", "lvl_embed", "pos_", "scale_mul"))
            ),
        )
        sizes.append(size)
        values = trainer.log.meters.means()
        assert abs(values[f"gradient_norm/{configuration.name}/all"] - size) < 1e-5 * size
    assert names == {"full", "2"}
    assert min(sizes) < optim.clip < max(sizes)
