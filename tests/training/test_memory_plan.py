"""The plan of a training step's memory against the bytes that live during such steps."""

import dataclasses
import gc

import pytest
import torch
from live_bytes import LiveBytes

from variant import VARConfig, VQVAEConfig
from variant.data import encode
from variant.models import execution, token_loss
from variant.models.execution import Execution
from variant.models.presets import VAR_PRESETS, vqvae_of
from variant.models.var import VAR
from variant.models.vqvae import VQVAE
from variant.training import memory_plan
from variant.training.memory_plan import fastest, fits, training_row, training_rows

GIB = 2**30
D30, VAE = VAR_PRESETS["var-d30"], vqvae_of(VAR_PRESETS["var-d30"])
SIDES = (1, 2, 3, 4, 6, 8, 12)
SMALL_VAE = VQVAEConfig(
    vocab_size=256, z_channels=8, ch=32, ch_mult=(1, 1), num_res_blocks=1, patch_nums=SIDES
)


def small_config(width, depth):
    return VARConfig(
        depth=depth,
        embed_dim=width,
        num_heads=width // 32,
        num_classes=10,
        patch_nums=SIDES,
        vocab_size=SMALL_VAE.vocab_size,
        vae_channels=SMALL_VAE.z_channels,
    )


def measured_peak(config, images, parts, dtype, checkpointing):
    """Live bytes at most during two steps that encode images, with a moving average."""
    batch = images // parts
    with LiveBytes() as live:
        vae, var = VQVAE(SMALL_VAE).eval().requires_grad_(False), VAR(config).train()
        optimizer = torch.optim.AdamW(var.parameters(), fused=True)
        average = [parameter.detach().clone() for parameter in var.parameters()]
        labels = torch.zeros(batch, dtype=torch.int64)
        for _ in range(2):
            for _ in range(parts):
                tokens = encode.encode_images(vae, torch.zeros(batch, 3, 24, 24))
                x_teacher = vae.teacher_input(tokens)
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    loss = var(
                        labels,
                        x_teacher,
                        targets_BL=tokens,
                        execution=Execution(checkpointing),
                    ).mean
                loss.backward()
                del loss
            optimizer.step()
            torch._foreach_lerp_(average, list(var.parameters()), 0.1)
            optimizer.zero_grad(set_to_none=True)
    return live.peak


@pytest.mark.parametrize(
    ("width", "depth", "images", "parts", "dtype", "checkpointing"),
    [
        (64, 4, 16, 1, torch.bfloat16, "none"),
        (128, 3, 16, 2, torch.float32, "attention"),
        (96, 6, 16, 1, torch.bfloat16, "full"),
    ],
)
def test_the_plan_is_within_15_percent_of_the_measured_peak(
    width, depth, images, parts, dtype, checkpointing
):
    config = small_config(width, depth)
    gc.collect()
    peak = measured_peak(config, images, parts, dtype, checkpointing)
    row = training_row(
        config,
        SMALL_VAE,
        mode="single",
        gpus=1,
        parts=parts,
        batch=images,
        width=dtype.itemsize,
        checkpointing=checkpointing,
    )
    assert row.total == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize("blocks", [1, 2])
def test_the_encoder_is_within_15_percent_of_its_measured_peak(blocks):
    config = dataclasses.replace(SMALL_VAE, num_res_blocks=blocks)
    vae = VQVAE(config).eval()
    with torch.no_grad(), LiveBytes() as live:
        encode.encode_images(vae, torch.zeros(16, 3, 24, 24))
    row = training_row(
        small_config(64, 4),
        config,
        mode="single",
        gpus=1,
        parts=1,
        batch=16,
        width=4,
        checkpointing="none",
    )
    weights = sum(parameter.nbytes for parameter in vae.parameters())
    assert row.encoder == pytest.approx(live.peak + weights, rel=0.15)


def test_constants_are_those_of_the_modules_with_torch():
    assert memory_plan.CHUNK_LOGITS == token_loss.CHUNK_LOGITS
    assert memory_plan.IMAGES_ENCODED == encode.PART
    assert memory_plan.Checkpointing == execution.Checkpointing


def rows_of(**options):
    return training_rows(D30, VAE, **{"gpus": 8, "batch": 1024, "width": 2, **options})


def test_bytes_a_token_layer_and_channel_in_16_bits_and_in_32():
    expected = {("none", 2): 32, ("none", 4): 72, ("attention", 2): 24, ("full", 2): 4}
    for (checkpointing, width), count in expected.items():
        assert memory_plan.activation_bytes(D30, width, checkpointing) == count


def test_d30_on_eight_gpus_of_80_gb_is_fsdp2_in_4_parts_of_32():
    best = fastest(rows_of(memory=80 * GIB), 80 * GIB)
    assert (best.mode, best.parts, best.images, best.checkpointing) == ("fsdp2", 4, 32, "none")
    assert 45 < best.total / 1e9 < 60


def test_rows_have_the_fewest_parts_that_fit_and_the_fastest_comes_first():
    rows = rows_of(memory=80 * GIB)
    assert [row.work for row in rows] == sorted(row.work for row in rows)
    for row in rows:
        fewer = max((n for n in memory_plan.divisors(128) if n < row.parts), default=None)
        if fewer is None:
            continue
        options = {"mode": row.mode, "checkpointing": row.checkpointing, "width": 2}
        before = training_row(D30, VAE, gpus=8, batch=1024, parts=fewer, **options)
        assert fits(row, 80 * GIB)
        assert not fits(before, 80 * GIB)


def test_nothing_fits_a_small_gpu():
    rows = rows_of(gpus=1, memory=24 * GIB)
    assert fastest(rows, 24 * GIB) is None
    assert {row.images for row in rows} == {1}


def test_more_gpus_share_the_state_in_fsdp2_only():
    one, eight = ({row.mode: row for row in rows_of(gpus=n)} for n in (2, 8))
    for name in ("weights", "optimizer", "ema"):
        assert getattr(one["ddp"], name) == getattr(eight["ddp"], name)
        assert getattr(eight["fsdp2"], name) == getattr(eight["ddp"], name) // 8
    assert one["fsdp2"].weights == 4 * eight["fsdp2"].weights


def test_recomputed_work():
    assert memory_plan.recomputed_share(D30, "none") == 0
    assert memory_plan.recomputed_share(D30, "full") == pytest.approx(1 / 3)
    # The projection to queries, keys and values is a quarter of a block's products.
    assert 1 / 12 < memory_plan.recomputed_share(D30, "attention") < 0.1
    narrow = dataclasses.replace(D30, embed_dim=480)  # attention is a larger share of its work
    assert memory_plan.recomputed_share(narrow, "attention") > 0.1
