"""The comparison of VQ-VAEs by their losses."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.report import PARTS
from benchmarks.results import VAE_LOSSES
from benchmarks.vae_losses import gaussian, quality, standard_error
from variant.evaluation.image_sets import ImageSet
from variant.models.config import VQVAEConfig
from variant.models.vqvae import VQVAE


def features(images_B3YX):
    return torch.nn.functional.adaptive_avg_pool2d(images_B3YX.float(), 2).flatten(1)


def test_each_run_is_measured_on_the_same_images():
    torch.manual_seed(0)
    config = VQVAEConfig(
        vocab_size=8, z_channels=4, ch=32, ch_mult=(1, 1), num_res_blocks=1, patch_nums=(1, 2, 4)
    )
    pixels = torch.randint(256, (120, 3, 8, 8), dtype=torch.uint8)
    images = ImageSet("noise", 120, None, lambda rows: pixels[rows.start : rows.stop])
    network = SimpleNamespace(run=lambda x: SimpleNamespace(features_BD=features(x)))
    real = gaussian([features(pixels)])
    row, found = quality(VQVAE(config).eval(), images, network, real)
    assert standard_error(features(pixels), found, found) == 0
    assert standard_error(features(pixels), found, features(pixels)) > 0
    assert row["psnr"] == row["psnr_by_scale"][2] > 0
    assert row["fd"] > 0
    assert all(0 < used <= 1 for used in row["codes_used_by_scale"])
    data = {
        "recipe": "noise",
        "images": 120,
        "classifier": {"accuracy": 0.5},
        "floor": 0.25,
        "rows": [
            {
                "name": name,
                "losses": "squared pixel error",
                "train_images": 10,
                "batch": 2,
                "steps": 5,
                "adversary_from": start,
                **row,
                "fd_change_error": error,
            }
            for name, start, error in (("plain", None, None), ("adversary", 3, 0.5))
        ],
    }
    text = "\n".join(PARTS[VAE_LOSSES](data))
    assert (
        "5 steps of 2 images from 10 training images, one seed, the adversary from step 3" in text
    )
    assert "+0.000 (s.e. 0.500)" in text
    assert text.count(f"{row['psnr']:.2f} dB") == 2
    assert pytest.approx(row["psnr"]) == row["psnr_by_scale"][-1]
