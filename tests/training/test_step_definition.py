"""Whole training steps against definitions in float64 that share no model code with the package.

Axes: B images, L tokens of all scales, C width, H heads, D width of one head, 6 the parts of a
block's modulation, 2 its branches; R vectors of a scale, V codes.
"""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_runs import CPU, quiet

from variant.data.encode import encode_images
from variant.models.config import VQVAEConfig
from variant.models.var import VAR
from variant.models.vqvae import VQVAE
from variant.training.ema import EMASection
from variant.training.perceptual import PerceptualLoss
from variant.training.recipe import VAETraining
from variant.training.run_setup import RunSetup
from variant.training.trainer import Trainer
from variant.training.vae_sections import AdversarySection, PerceptualSection
from variant.training.vae_task import VAETask
from variant.training.var_task import VARTask

STREAM_ORDER, STREAM_SCALES, STREAM_DROPS = 1, 6, 7


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


def near(value, wanted, tolerance=3e-5):
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
        assert loss == pytest.approx(wanted.item(), rel=1e-6)
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


def quantised(vae, f, num_scales, temperature):
    """The features that are decoded, the quantiser's loss, the entropy term of the first scales."""
    sides, quantizer, beta = vae.config.patch_nums, vae.quantize, vae.config.beta
    codes_VC, size, last = quantizer.embedding.weight, sides[-1], len(sides) - 1
    with torch.no_grad():
        spread = (codes_VC.unsqueeze(1) - codes_VC).square().sum(2).mean()
    f_hat, loss, entropies = torch.zeros_like(f), 0.0, []
    for k in range(num_scales):
        rest = F.interpolate(f - f_hat.detach(), size=(sides[k],) * 2, mode="area")
        rest_RC = rest.permute(0, 2, 3, 1).flatten(0, 2)
        distance_RV = (rest_RC.unsqueeze(1) - codes_VC).square().sum(2)
        log_RV = (-distance_RV / (temperature * spread)).log_softmax(1)
        mean_V = log_RV.exp().mean(0)
        entropies.append((mean_V * mean_V.log()).sum() - (log_RV.exp() * log_RV).sum(1).mean())
        h = codes_VC[distance_RV.argmin(1)].view(len(f), sides[k], sides[k], -1).permute(0, 3, 1, 2)
        if k < last:
            h = F.interpolate(h, size=(size, size), mode="bicubic")
        conv = quantizer.quant_resi[k]  # one for each scale
        h = h / 2 + F.conv2d(h, conv.weight, conv.bias, padding=1) / 2
        f_hat = f_hat + h
        loss = loss + beta * (f - f_hat.detach()).square().mean()
        loss = loss + (f_hat - f.detach()).square().mean()
    straight = f
    if num_scales <= last:
        small = F.interpolate(f, size=(sides[num_scales - 1],) * 2, mode="area")
        straight = F.interpolate(small, size=(size, size), mode="bicubic")
    decoded = straight + (f_hat - straight).detach()
    return decoded, loss / num_scales, torch.stack(entropies).mean()


def colour_maps(images):
    return [images, images.roll(1, dims=1) * images]


def distance(images, others):
    total = 0.0
    for one, other in zip(colour_maps(images), colour_maps(others), strict=True):
        one, other = (x / x.square().sum(1, keepdim=True).sqrt() for x in (one, other))
        total += (one - other).square().sum(1).mean() / 2
    return total


def lecam(averages, real, fake):
    return ((real - averages[1]).relu() ** 2).mean() + ((averages[0] - fake).relu() ** 2).mean()


def test_steps_of_the_vqvae(recipe, tmp_path):
    """All losses, in parts. The networks are the package's, in float64."""
    optim = dataclasses.replace(recipe.optim, accumulate=2, clip=2.0, weight_decay=0.3)
    training = VAETraining(
        epochs=2,
        optim=optim,
        reconstruction=3.0,
        scale_dropout=0.5,
        entropy=0.2,
        entropy_temperature=0.5,
        perceptual=PerceptualSection(weight=0.4),
        adversary=AdversarySection(
            weight=0.6, width=4, layers=1, regularizer="lecam", regularizer_weight=0.3
        ),
        ema_decay=0.8,
    )
    config = VQVAEConfig(8, 4, 64, (1, 1), 1, (1, 2, 4), share_quant_resi=0)
    recipe = dataclasses.replace(recipe, vae=config, vae_training=training)
    setup = RunSetup("vae", recipe, optim, tmp_path, device=CPU)
    torch.manual_seed(0)
    perceptual = PerceptualLoss(colour_maps, "products of colours")
    module = VQVAE(config)
    torch.nn.init.normal_(module.quantize.embedding.weight)
    task = VAETask(module, setup.data, recipe, CPU, 4, perceptual=perceptual)
    trainer, adversary = Trainer(task, setup, 2, quiet()), task.discriminator
    assert adversary is not None
    counts = []
    for step in range(2):
        vae, judge = VQVAE(config).double(), copy.deepcopy(adversary.discriminator).double()
        vae.load_state_dict(module.state_dict())
        averages = adversary.module.get_buffer("averages").double()
        before = snapshot(trainer)
        loss, after = trainer._train_step(), snapshot(trainer)
        trainer.state.step += 1

        rng = np.random.default_rng((0, step, STREAM_SCALES))
        num_scales = int(rng.integers(1, 3)) if rng.random() < 0.5 * (1 - step / 4) else 3
        counts.append(num_scales)
        order = np.random.default_rng((0, 0, STREAM_ORDER)).permutation(24)
        indices = order[step * 12 :][:12]
        total, of_judge = torch.zeros(2, dtype=torch.float64)
        means = torch.zeros(2)
        for part in np.split(indices, 2):
            images = setup.data.samples(part, 0).images.double()
            decoded, quantisation, entropy = quantised(
                vae, vae.quant_conv(vae.encoder(images)), num_scales, 0.5
            )
            made = vae.decoder(vae.post_quant_conv(decoded))
            like = 3 * (made - images).square().mean() + 0.4 * distance(made, images)
            fooled, last = -judge(made).mean(), vae.decoder.conv_out.weight
            above, below = (
                torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (like, fooled)
            )
            total = total + (like + 0.6 * above / below * fooled + quantisation + 0.2 * entropy) / 2
            real, fake = judge(images), judge(made.detach())
            of_judge = of_judge + ((1 - real).relu().mean() + (1 + fake).relu().mean()) / 4
            if step:
                of_judge = of_judge + 0.3 * lecam(averages, real, fake) / 2
            means = means + torch.stack((real.mean(), fake.mean())).detach() / 2
        assert loss == pytest.approx(total.item(), rel=1e-6)
        names, weights = zip(*vae.named_parameters(), strict=True)
        gradients = torch.autograd.grad(total, weights, retain_graph=True, allow_unused=True)
        check_update(
            optim,
            1e-3,
            0.8,
            before,
            after,
            dict(zip(names, gradients, strict=True)),
            lambda name, value: value.dim() < 2 or "embedding" in name,
        )
        gradients = torch.autograd.grad(of_judge, [*judge.parameters()])
        size = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        measured = trainer.log.meters.means()["gradient_norm/discriminator"]
        assert abs(measured - size) < 1e-4 * size
        means = averages.lerp(means, 0.01) if step else means
        assert (adversary.module.get_buffer("averages") - means).abs().max() < 1e-6
    assert counts == [3, 1]  # the second has no gradient for two convolutions
