"""Pixels of 8 bits, and the memory of a depth, as numbers."""

import re

import numpy as np
import pytest
import torch

from variant.engine.images import check_image_dtype, to_pil, to_uint8
from variant.engine.planning import (
    depths_of,
    kv_dtype_name,
    merged_zone_bytes,
    plan_row,
    schedule_of,
    schedule_row,
    weight_bytes,
)
from variant.models.config import VARConfig, VQVAEConfig
from variant.models.parameter_count import var_parameters, vqvae_parameters
from variant_kernels import CachePlan, DepthSchedule


def test_pixels_are_rounded_and_clamped():
    images = torch.tensor([-0.1, 0.0, 0.49 / 255, 0.51 / 255, 0.5, 254.6 / 255, 1.0, 1.2])
    assert to_uint8(images).tolist() == [0, 0, 0, 1, 128, 255, 255, 255]
    assert to_uint8(images.bfloat16()).dtype == torch.uint8
    pixels = torch.tensor([3, 255], dtype=torch.uint8)
    assert to_uint8(pixels) is pixels


def test_images_of_pil_are_rows_of_pixels_in_colour():
    colour = torch.arange(2 * 3 * 2 * 4, dtype=torch.uint8).view(2, 3, 2, 4)
    for image, expected in zip(to_pil(colour), colour, strict=True):
        assert (image.mode, image.size) == ("RGB", (4, 2))
        assert np.array_equal(np.asarray(image), expected.permute(1, 2, 0).numpy())
    [grey] = to_pil(torch.full((1, 1, 2, 2), 0.2))
    assert np.asarray(grey).tolist() == [[[51] * 3] * 2] * 2
    for shape in ((3, 2, 2), (1, 2, 2, 2), (1, 4, 2, 2), (1, 1, 3, 2, 2)):
        text = f"to_pil: images must be (B, 3 or 1, Y, X); got {shape}"
        with pytest.raises(ValueError, match=re.escape(text)):
            to_pil(torch.zeros(shape))


def test_images_are_float32_or_uint8():
    assert check_image_dtype("op", "uint8") == check_image_dtype("op", torch.uint8) == torch.uint8
    assert check_image_dtype("op", torch.float32) == torch.float32
    with pytest.raises((TypeError, ValueError), match="op: image_dtype must be "):
        check_image_dtype("op", torch.float16)


def config_of(**changes):
    settings = {
        "depth": 4, "embed_dim": 64, "num_heads": 2, "num_classes": 5, "patch_nums": (1, 2, 3),
        "vocab_size": 32, "vae_channels": 8, "mlp_ratio": 3.0, "subnets": {2: (0, 3), 3: (0, 2, 3)},
        "bridge": 1,
    }  # fmt: skip
    return VARConfig(**settings | changes)


def test_depths_are_those_of_the_config_or_of_the_papers_chain():
    assert depths_of(config_of()) == (4, 3, 2)
    assert depths_of(config_of(subnets={}, bridge=None)) == (4, 2)
    assert depths_of(config_of(depth=16, subnets={}, bridge=None)) == (16, 8, 4, 2)


def test_the_schedule_of_a_depth_has_the_layers_of_the_config():
    config = config_of(subnets={2: (0, 3), 3: (0, 1, 3)})
    every = (0, 1, 2, 3)
    assert schedule_of(config, 4, 1).layers == (every,) * 3
    assert schedule_of(config, 3, 1).layers == (every, (0, 1, 3), (0, 1, 3))
    assert schedule_of(config, 2, 2).layers == (every, every, (0, 3))


def test_names_of_eight_bit_keys_and_values():
    assert kv_dtype_name("op", None) is None
    for name in ("fp8", torch.float8_e4m3fn, "torch.float8_e4m3fn"):
        assert kv_dtype_name("op", name) == "float8_e4m3fn"
    for other in ("float16", torch.float16, 8, "fp16"):
        with pytest.raises(ValueError, match=r"op: kv_dtype must be None .* got "):
            kv_dtype_name("op", other)


def test_the_row_of_a_depth_has_the_bytes_of_its_plan():
    config = config_of()
    row = plan_row(config, 2, 1, 3, torch.bfloat16, page_size=4)
    plan = CachePlan(config.layout, DepthSchedule(4, 3, 2, 1), 4)
    assert (row.depth, row.bridge, row.tokens) == (2, 1, plan.peak_page_tokens)
    assert row.paper_measured == 2 * 3 * plan.paper_tokens * 64 * 6  # float32 K, 16-bit V
    assert row.paper_same == 2 * 3 * plan.paper_tokens * 64 * 4
    assert row.exact == row.ours == 2 * 3 * plan.peak_page_tokens * 64 * 4
    assert row.share == row.ours / row.paper_same
    assert row.merged_zone == 0
    small = plan_row(config, 2, 1, 3, "float32", page_size=4, kv_dtype="fp8", guidance=False)
    assert small.exact == 3 * plan.peak_page_tokens * 64 * 8
    assert small.ours == 3 * plan.peak_page_tokens * 2 * (64 + 2)  # a scale for each head
    assert small.paper_same == 3 * plan.paper_tokens * 64 * 8
    assert plan_row(config, 2, 1, 1, "float32").tokens % 16 == 0  # pages of 16 tokens
    with pytest.raises(ValueError, match="plan_row: kv_dtype must be None"):
        plan_row(config, 2, 1, 1, "float32", kv_dtype="int8")


def test_the_row_of_a_schedule_names_its_last_depth_and_its_bridge():
    config = config_of(zone_weights="lora", lora_rank=2)
    weights = 4 * 64**2 + 2 * 64 * 192
    for depths, depth, bridge, merged in (
        ([4, [0, 2, 3], [0, 3]], 2, 1, 3 + 2),
        ([4, 4, [0, 1, 3]], 3, 2, 0),
        ([4, 4, 4], 4, 3, 0),
    ):
        row = schedule_row(config, DepthSchedule.from_depths(depths), 1, "bfloat16")
        assert (row.depth, row.bridge) == (depth, bridge)
        assert row.merged_zone == merged * weights * 2
    with pytest.raises(ValueError, match="schedule_row: kv_dtype must be None"):
        schedule_row(config, DepthSchedule.full(4, 3), 1, "float32", kv_dtype=3)


def test_bytes_of_merged_zones():
    config = config_of(zone_weights="lora", lora_rank=2)
    assert merged_zone_bytes(config, 3, "float32") == 3 * (4 * 64**2 + 2 * 64 * 192) * 4
    assert merged_zone_bytes(config, 4, "float32") == 0  # the full network has none
    assert merged_zone_bytes(config_of(), 3, "float32") == 0
    assert plan_row(config, 2, 1, 1, "float16").merged_zone == 2 * (4 * 64**2 + 2 * 64 * 192) * 2


def test_bytes_of_the_weights_are_those_of_the_parameters():
    var = config_of()
    vae = VQVAEConfig(
        vocab_size=32, z_channels=8, ch=32, ch_mult=(1, 1), patch_nums=(1, 2, 3), share_quant_resi=2
    )
    expected = 2 * var_parameters(var) + 4 * vqvae_parameters(vae)
    assert weight_bytes(var, vae, "bfloat16") == expected
