"""PSNR and SSIM: closed forms, the definition by loops, and the command."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from seeded import images, noise

from variant.cli import evaluate
from variant.cli.generate import weights_sha256
from variant.cli.main import main
from variant.errors import UserError
from variant.evaluation.features import FeatureNetwork, Features
from variant.evaluation.image_sets import array_images
from variant.evaluation.paired import (
    compare_pairs,
    psnr,
    squared_errors,
    structural_similarity,
)
from variant.evaluation.reconstruct import reconstructions
from variant.models.config import VQVAEConfig
from variant.models.vqvae import VQVAE
from variant.supernet import VARiant


def as_set(name, pixels):
    return array_images(name, pixels.permute(0, 2, 3, 1).numpy())


def test_equal_images_have_infinite_psnr_and_an_ssim_of_one():
    pixels = images(1, 5, 20, 17)
    result = compare_pairs(as_set("a", pixels), as_set("b", pixels), batch=2)
    assert (result.psnr, result.ssim, result.equal) == (math.inf, pytest.approx(1), 1.0)


def test_the_intervals_of_pairs_are_those_of_means_over_images():
    pixels = images(1, 40, 12, 12)
    steps = torch.arange(40) % 4  # of every pixel of an image
    other = (pixels // 2 + steps[:, None, None, None]).to(torch.uint8)
    result = compare_pairs(as_set("a", other), as_set("b", pixels // 2), batch=7)
    squares = (steps**2).double()
    t_39 = 2.022691
    half = t_39 * squares.std() / 40**0.5
    ends = [psnr(float(squares.mean() + sign * half)) for sign in (1, -1)]
    assert result.psnr_interval == pytest.approx(ends)
    assert result.psnr == pytest.approx(psnr(float(squares.mean())))
    ssims = structural_similarity(other, pixels // 2)
    half = float(t_39 * ssims.std() / 40**0.5)
    assert result.ssim_interval == pytest.approx((result.ssim - half, min(1, result.ssim + half)))
    assert compare_pairs(as_set("a", pixels), as_set("b", pixels)).psnr_interval is None


def test_one_step_in_every_pixel_has_its_closed_form():
    pixels = images(1, 3, 16, 16).clamp(0, 254)
    result = compare_pairs(as_set("a", pixels), as_set("b", pixels + 1))
    assert result.psnr == pytest.approx(20 * math.log10(255), abs=1e-9)
    assert result.equal == 0
    assert psnr(255.0**2) == 0


def test_constant_images_have_the_ssim_of_their_luminance():
    one, other = torch.full((1, 3, 12, 12), 50), torch.full((1, 3, 12, 12), 100)
    c1 = (0.01 * 255) ** 2
    expected = (2 * 50 * 100 + c1) / (50**2 + 100**2 + c1)
    assert structural_similarity(one, other).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("side", [12, 15, 8])
def test_ssim_by_loops_over_windows(side):
    one, other = 255 * noise(1, side, side), 255 * noise(2, side, side)
    window = 11 if side >= 11 else 7
    line = np.exp(-((np.arange(window) - window // 2) ** 2) / (2 * 1.5**2))
    weights = np.outer(line, line) / line.sum() ** 2
    values = []
    for y in range(side - window + 1):
        for x in range(side - window + 1):
            a, b = (p[y : y + window, x : x + window] for p in (one, other))
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            variances = (weights * (a - mean_a) ** 2).sum() + (weights * (b - mean_b) ** 2).sum()
            covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            values.append(
                (2 * mean_a * mean_b + c1)
                * (2 * covariance + c2)
                / ((mean_a**2 + mean_b**2 + c1) * (variances + c2))
            )
    tensors = [torch.from_numpy(p).expand(1, 3, -1, -1) for p in (one, other)]
    assert structural_similarity(*tensors).item() == pytest.approx(np.mean(values), abs=1e-9)
    assert squared_errors(*tensors).item() == pytest.approx(((one - other) ** 2).mean())


def test_sets_of_other_sizes_are_refused():
    with pytest.raises(UserError, match="a has 3, b 4"):
        compare_pairs(as_set("a", images(1, 3, 8, 8)), as_set("b", images(1, 4, 8, 8)))


def test_coloured_images_are_no_gray_ones():
    """A VQ-VAE of gray images would see their red alone."""
    config = VQVAEConfig(
        vocab_size=8,
        z_channels=4,
        ch=32,
        ch_mult=(1, 1),
        num_res_blocks=1,
        patch_nums=(1, 2),
        in_channels=1,
    )
    vae, pixels = VQVAE(config).eval(), images(1, 3, 4, 4)
    gray = as_set("gray", pixels[:, :1].expand(-1, 3, -1, -1))
    assert reconstructions("mine", vae, gray).read(range(3)).shape == (3, 3, 4, 4)
    with pytest.raises(UserError, match="mine has gray images; coloured holds coloured ones"):
        reconstructions("mine", vae, as_set("coloured", pixels)).read(range(3))


def test_every_distance_of_reconstructions_has_an_r(tmp_path, monkeypatch, capsys):
    """FID and sFID; the others keep their names."""

    def run(pixels):
        means = pixels.float().mean((2, 3))
        return Features(means, means[:, :2], means)

    network = FeatureNetwork("inception-2015", "FID", "", run, torch.device("cpu"))
    monkeypatch.setattr(evaluate, "network_of", lambda command, out, size: network)
    np.savez(tmp_path / "real.npz", images(1, 24, 16, 16).permute(0, 2, 3, 1).numpy())
    words = ["eval", "--reference", str(tmp_path / "real.npz"), "--json", "-"]
    assert main([*words, "--reconstruct", "digits"]) == 0
    names = [m["name"] for m in json.loads(capsys.readouterr().out)["metrics"]]
    assert names[:5] == ["rFID", "rsFID", "Inception Score", "precision", "recall"]


def test_the_command_reconstructs_and_pairs(tmp_path, monkeypatch, capsys):
    (tmp_path / "colour.py").write_text(
        "def features(images):\n    return images.float().mean((2, 3)) / 255\n"
    )
    monkeypatch.chdir(tmp_path)
    pixels = images(1, 24, 16, 16).permute(0, 2, 3, 1).numpy()
    np.savez("real.npz", pixels)
    words = ["eval", "--reference", "real.npz", "--features", "colour:features", "--json", "-"]
    assert main([*words, "--reconstruct", "digits", "--scales"]) == 0
    result = json.loads(capsys.readouterr().out)
    vae = VARiant.from_pretrained("digits").vae
    assert result["reconstructed_by_sha256"] == weights_sha256(vae)
    values = {m["name"]: m["value"] for m in result["metrics"]}
    assert "rFD (colour:features)" in values
    assert 0 < values["PSNR"] < 60
    assert 0 < values["SSIM"] < 1
    metrics = {m["name"]: m for m in result["metrics"]}
    for name, found in metrics.items():  # each has an interval
        assert found["low"] <= found["value"] <= found["high"], name
    last, whole = metrics["PSNR, scales to 8x8"], metrics["PSNR"]
    assert [last[end] for end in ("low", "high")] == pytest.approx([whole["low"], whole["high"]])
    by_scale = [value for name, value in values.items() if name.startswith("PSNR, scales to ")]
    assert len(by_scale) == 6
    assert by_scale[-1] == pytest.approx(values["PSNR"])
    assert len(set(by_scale)) == 6
    np.savez("same.npz", pixels)
    assert main([*words, "--images", "same.npz", "--paired"]) == 0
    text = capsys.readouterr().out
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    values = {m["name"]: m["value"] for m in strict["metrics"]}
    assert (values["PSNR"], values["equal images"]) == ("Infinity", 1.0)
    Path("same.json").write_text(text)
    assert main(["eval", "--compare", "same.json", "same.json"]) == 0
    printed = capsys.readouterr().out
    assert "PSNR" in printed
    assert "nan" not in printed
    np.savez("few.npz", pixels[:21])
    assert main([*words, "--images", "few.npz", "--paired"]) == 1
    assert "--paired needs as many images" in capsys.readouterr().err
    assert main([*words, "--images", "few.npz", "--reconstruct", "digits"]) == 1
    assert main([*words, "--images", "few.npz", "--scales"]) == 1
    assert "--scales is for --reconstruct" in capsys.readouterr().err
    np.savez("statistics.npz", mu=np.zeros(3), sigma=np.eye(3))
    words[2] = "statistics.npz"
    assert main([*words, "--reconstruct", "digits"]) == 1
    assert "needs a reference with images" in capsys.readouterr().err
