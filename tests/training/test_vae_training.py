"""Runs that train the VQ-VAE with a perceptual loss and a discriminator."""

import dataclasses
import hashlib
import json
import socket

import pytest
import torch
from rank_jobs import Job, run
from safetensors.torch import load_file, save_file
from test_distributed import train_on_two
from tiny_runs import CPU, OPTIM, assert_same, metrics, quiet, resume, run_until, steps_of

from variant.errors import UserError
from variant.models.config import VQVAEConfig
from variant.models.vqvae import VQVAE
from variant.training.checkpoint_schedule import OutputSection
from variant.training.logging_section import LoggingSection
from variant.training.meters import Meters
from variant.training.perceptual import (
    PerceptualLoss,
    VGG16Features,
    function_loss,
    lpips_loss,
)
from variant.training.recipe import VAETraining
from variant.training.run_setup import RunSetup
from variant.training.vae_sections import AdversarySection, PerceptualSection
from variant.training.vae_task import VAETask, train_vae


def with_losses(recipe, **changes):
    """The recipe with a classifier's features, and a discriminator from the second step."""
    training = dataclasses.replace(
        recipe.vae_training,
        perceptual=PerceptualSection(weight=0.5, steps=3),
        adversary=AdversarySection(
            weight=0.5,
            start_step=1,
            width=4,
            layers=1,
            regularizer="lecam",
            regularizer_weight=0.1,
        ),
        ema_decay=0.5,
    )
    training = dataclasses.replace(training, **changes)
    return dataclasses.replace(recipe, vae_training=training, logging=LoggingSection(every=1))


def last(folder):
    return torch.load(folder / "vae-last.pt", weights_only=True)


def test_stopping_after_any_step_changes_nothing(recipe, tmp_path, monkeypatch):
    recipe = dataclasses.replace(with_losses(recipe), output=OutputSection(checkpoint_steps=1))
    console = quiet()
    train_vae(recipe, tmp_path / "whole", console=console, device=CPU)
    printed = console.file.getvalue()
    assert "perceptual loss: features of a classifier trained first on the same" in printed
    parted = tmp_path / "parted"
    for step in range(3):
        run_until(recipe, parted, monkeypatch, step=step, resume=step > 0)
    (parted / "vae-classifier.json").unlink()  # a resumed run trains it again
    resume(recipe, parted)
    assert recipe.vae_training.loss_text == (
        "squared pixel error, perceptual (features of a classifier trained on the same labels), "
        "adversarial (PatchGAN)"
    )
    whole = last(tmp_path / "whole")
    for part in ("module", "optimizer", "ema", "adversary", "sums", "inputs", "best_sha256"):
        assert_same(whole[part], last(parted)[part])
    assert whole["adversary"]["optimizer"]["state"][0]["step"].item() == 3
    assert metrics(parted, "vae") == metrics(tmp_path / "whole", "vae")
    lines = steps_of(tmp_path / "whole", "vae")
    assert steps_of(parted, "vae") == lines
    names = {"loss/generator", "loss/discriminator", "adversary/weight"}
    for line in lines:
        assert (names <= line.keys()) == (line["step"] > 1)
        parts = line["loss/reconstruction"] + line["loss/quantization"]
        parts += 0.5 * line["loss/perceptual"]
        if line["step"] > 1:
            parts += line["adversary/weight"] * line["loss/generator"]
        assert line["loss/loss"] == pytest.approx(parts, rel=1e-4)
    # The last epoch's average is kept, as an adversary raises the held-out loss.
    entries = metrics(parted, "vae")
    assert [entry.get("adversarial") for entry in entries] == [True, True]
    best = load_file(parted / "vae-best.safetensors")
    assert_same(best, whole["module"] | whole["ema"])
    held_out = entries[-1]["held_out"]
    mean = (held_out["reconstruction"] + 0.5 * held_out["perceptual"]) / 1.5
    assert entries[-1]["held_out_mean"] == pytest.approx(mean)


def test_the_average_has_the_codes_that_were_moved(recipe, tmp_path):
    training = dataclasses.replace(
        recipe.vae_training, kmeans=2, revive_every=3, revive_until=1.0, epochs=2, ema_decay=0.9999
    )
    recipe = dataclasses.replace(recipe, vae_training=training)  # moves codes at steps 0 and 3
    train_vae(recipe, tmp_path, console=quiet(), device=CPU)
    state = last(tmp_path)
    codes = [state[part]["quantize.embedding.weight"] for part in ("module", "ema")]
    # A learning rate of 1e-3 moves each by less than 0.02; k-means moved them further.
    torch.testing.assert_close(*codes, rtol=0, atol=0.02)
    assert not torch.equal(*codes)


def test_a_checkpoint_without_its_discriminator_is_refused(recipe, tmp_path, monkeypatch):
    from tiny_runs import rewrite

    recipe = with_losses(recipe)
    run_until(recipe, tmp_path, monkeypatch)
    rewrite(tmp_path / "vae-last.pt", adversary=None)
    with pytest.raises(UserError, match=r"vae-last.pt: is damaged: .*module"):
        resume(recipe, tmp_path)
    rewrite(tmp_path / "vae-last.pt", adversary={"module": {"x": 1}, "optimizer": {}})
    with pytest.raises(UserError, match=r"is damaged: adversary"):
        resume(recipe, tmp_path)


def test_bf16_parts_and_r1_train(recipe, tmp_path):
    optim = dataclasses.replace(OPTIM, precision="bf16", accumulate=2)
    adversary = AdversarySection(
        weight=0.5, width=4, layers=1, regularizer="r1", regularizer_weight=1.0
    )
    recipe = with_losses(recipe, optim=optim, adversary=adversary)
    assert train_vae(recipe, tmp_path, console=quiet(), device=CPU).steps == 4
    for line in steps_of(tmp_path, "vae"):
        assert line["gradient_norm/discriminator"] > 0


def test_a_part_weighs_as_many_as_its_images_in_what_is_reported(recipe, tmp_path):
    recipe = with_losses(recipe, entropy=0.1, entropy_temperature=1.0)
    setup = RunSetup("vae", recipe, OPTIM, tmp_path, device=CPU)
    perceptual = PerceptualLoss(lambda images: [images], "pixels")
    torch.manual_seed(0)
    task = VAETask(VQVAE(recipe.vae), setup.data, recipe, CPU, 2, perceptual=perceptual)

    def measured(*parts):
        task.meters = Meters(CPU)
        for part in parts:
            task.loss(part, 0, 1)
        return task.meters.means()

    few, many = [0], [13, 14, 15]  # of two parts, or processes
    both, ones, twos = measured(few, many), measured(few), measured(many)
    assert {"loss/perceptual", "loss/discriminator", "adversary/weight"} <= both.keys()
    assert {"loss/quantization", "loss/entropy"} <= both.keys()
    for key, value in both.items():
        assert ones[key] != pytest.approx(twos[key]), key
        assert value == pytest.approx((ones[key] + 3 * twos[key]) / 4), key


def test_nothing_reaches_the_network(recipe, tmp_path, monkeypatch):
    def refused(*args, **rest):
        raise AssertionError("a socket was opened")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refused)
    assert train_vae(with_losses(recipe), tmp_path, console=quiet(), device=CPU).steps == 4


def test_a_given_function_is_the_perceptual_network(recipe, tmp_path, monkeypatch):
    (tmp_path / "my_features.py").write_text(
        "from torch.nn.functional import avg_pool2d\n"
        "def maps(images):\n    return [images, avg_pool2d(images, 2)]\n"
        "def flat(images):\n    return images.detach()\n"
        "def scalar(images):\n    return images.mean()\n"
        "def none(images):\n    return images[:, :0]\n"
        "def failing(images):\n    raise RuntimeError('first line\\nsecond line')\n"
        "def leaving(images):\n    raise SystemExit(3)\n"
        "def infinite(images):\n    return images / 0\n"
        "def wider(images):\n    return images.repeat(1, 1 + images.requires_grad, 1, 1)\n"
    )
    (tmp_path / "leaving.py").write_text("raise SystemExit(4)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def with_function(name):
        module, _, function = name.rpartition(".")
        network = f"{module or 'my_features'}:{function}"
        return with_losses(recipe, perceptual=PerceptualSection(weight=1.0, network=network))

    assert train_vae(with_function("maps"), tmp_path / "a", console=quiet(), device=CPU).steps == 4
    for name, message in (
        ("flat", "no gradient"),
        ("scalar", "must return floating features"),
        ("none", "must return floating features"),
        ("missing", "has no attribute 'missing'"),
        ("failing", "RuntimeError: first line second line"),
        ("leaving", "SystemExit: 3"),
        ("infinite", "its features are not finite"),
        ("leaving.maps", "SystemExit: 4"),
    ):
        named = name.replace(".", ":") if "." in name else f"my_features:{name}"
        with pytest.raises(UserError, match=rf"tiny: .*{named}: .*{message}"):
            train_vae(with_function(name), tmp_path / name, console=quiet(), device=CPU)
    with pytest.raises(UserError, match=r"features of my_features:wider must have the same shapes"):
        train_vae(with_function("wider"), tmp_path / "wider", console=quiet(), device=CPU)


def test_a_run_is_resumed_with_the_module_of_its_features_alone(recipe, tmp_path, monkeypatch):
    module = tmp_path / "resumed_features.py"
    module.write_text("def maps(images):\n    return images\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    section = PerceptualSection(weight=1.0, network="resumed_features:maps")
    recipe, out = with_losses(recipe, perceptual=section), tmp_path / "run"
    train_vae(recipe, out, console=quiet(), device=CPU)
    inputs = torch.load(out / "vae-last.pt", weights_only=False)["inputs"]
    assert inputs["perceptual_sha256"] == hashlib.sha256(module.read_bytes()).hexdigest()
    train_vae(recipe, out, resume=True, console=quiet(), device=CPU)
    module.write_text("def maps(images):\n    return images * 2\n")
    with pytest.raises(UserError, match="trained with another network of the perceptual loss"):
        train_vae(recipe, out, resume=True, console=quiet(), device=CPU)


def test_a_function_that_changes_its_images_changes_no_other_loss(monkeypatch, tmp_path):
    (tmp_path / "zeroing.py").write_text("def maps(x):\n    return x.mul_(0) + 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    loss = function_loss("zeroing:maps", "tiny")
    images = torch.rand(2, 3, 8, 8)
    reconstructed = (images / 2).requires_grad_()
    before = images.clone(), reconstructed.detach().clone()
    loss(reconstructed, images).backward()
    assert images.equal(before[0])
    assert reconstructed.detach().equal(before[1])


# --- fine-tuning the decoder --------------------------------------------------------------------


def test_fine_tuning_the_decoder_keeps_every_token(recipe, tmp_path):
    torch.manual_seed(3)
    # The layout of the published checkpoints: 10 scales, 4 partly shared residual convolutions.
    config = VQVAEConfig(
        vocab_size=32,
        z_channels=8,
        ch=32,
        ch_mult=(1, 1),
        num_res_blocks=1,
        patch_nums=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        share_quant_resi=4,
    )
    published = VQVAE(config)
    torch.save(published.state_dict(), tmp_path / "published.pth")
    training = VAETraining(
        epochs=2,
        optim=dataclasses.replace(OPTIM, weight_decay=0.1),
        start_weights=str(tmp_path / "published.pth"),
        trainable="decoder",
        ema_decay=0.5,
    )
    chosen = dataclasses.replace(recipe, vae=config, vae_training=training)
    missing = dataclasses.replace(training, start_weights=str(tmp_path / "other.pth"))
    missing = dataclasses.replace(chosen, vae_training=missing)
    with pytest.raises(UserError, match=r"other\.pth"):
        train_vae(missing, tmp_path / "missing", console=quiet(), device=CPU)
    train_vae(chosen, tmp_path / "run", console=quiet(), device=CPU)
    tuned = VQVAE(config)
    tuned.load_state_dict(load_file(tmp_path / "run" / "vae-best.safetensors"))
    before, after = published.state_dict(), tuned.state_dict()
    changed = {name for name, value in before.items() if not value.equal(after[name])}
    decoder = {name for name, _ in published.named_parameters() if name.startswith("decoder.")}
    decoder |= {"post_quant_conv.weight", "post_quant_conv.bias"}
    assert changed - {"quantize.ema_vocab_hit_SV"} == decoder
    x = torch.rand(4, 3, 32, 32) * 2 - 1
    assert tuned.eval().encode(x).equal(published.eval().encode(x))
    (tmp_path / "published.pth").unlink()  # a resumed run does not need it
    longer = dataclasses.replace(training, epochs=3)
    longer = dataclasses.replace(chosen, vae_training=longer)
    assert resume(longer, tmp_path / "run").steps == 6


def test_keys_that_contradict_each_other_are_refused(recipe, tmp_path):
    for keys, message in (
        ({"trainable": "decoder"}, "needs start_weights"),
        ({"trainable": "decoder", "start_weights": "x", "revive_every": 2}, "codes stay"),
        (
            {"trainable": "decoder", "start_weights": "x", "revive_every": 0, "entropy": 0.1},
            "codes stay",
        ),
        ({"start_weights": "x", "kmeans": 3}, "kmeans starts new codes"),
        ({"start_weights": "x", "weights": "y"}, "must not be set too"),
        ({"adversary": AdversarySection(weight=1.0, layers=3)}, "layers must be at most 1"),
    ):
        with pytest.raises(ValueError, match=message):
            with_losses(recipe, **keys)
    for keys, message in (
        ({"network": "vgg"}, "MODULE:FUNCTION"),
        ({"network": "lpips"}, "vgg_weights must name a file"),
        ({"vgg_weights": "x"}, "vgg_weights needs network"),
    ):
        with pytest.raises(ValueError, match=message):
            PerceptualSection(weight=1.0, **keys)
    with pytest.raises(ValueError, match="regularizer_weight must be above 0"):
        AdversarySection(regularizer="r1")
    lpips = PerceptualSection(1.0, "lpips", vgg_weights="x", lpips_weights="y")
    with pytest.raises(ValueError, match='network "lpips" needs at least 16 pixels; got 8'):
        with_losses(recipe, perceptual=lpips)
    late = with_losses(recipe, adversary=AdversarySection(weight=1.0, layers=1, start_step=4))
    with pytest.raises(UserError, match="start_step must be below the 4 steps"):
        train_vae(late, tmp_path, console=quiet(), device=CPU)


# --- LPIPS --------------------------------------------------------------------------------------


def published_files(folder):
    """Seeded random weights with the keys of the published files."""
    torch.manual_seed(5)
    vgg = {key: value.clone() for key, value in VGG16Features().state_dict().items()}
    torch.save(vgg | {"classifier.0.bias": torch.zeros(4)}, folder / "vgg16.pth")
    channels = (64, 128, 256, 512, 512)
    linears = {f"lin{k}.model.1.weight": torch.rand(1, c, 1, 1) for k, c in enumerate(channels)}
    save_file(linears, folder / "lpips.safetensors")
    return vgg, linears


def test_lpips_is_computed_as_published(tmp_path):
    vgg, linears = published_files(tmp_path)
    files = str(tmp_path / "vgg16.pth"), str(tmp_path / "lpips.safetensors")
    loss = lpips_loss(*files, CPU)
    x, y = (torch.rand(2, 3, 32, 32) * 2 - 1 for _ in range(2))
    total = torch.zeros(())
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    maps = [(image - shift) / scale for image in (x, y)]
    # torchvision's indices of the convolutions, by stage.
    for k, indices in enumerate(((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))):
        for index in indices:
            weight, bias = (vgg[f"features.{index}.{part}"] for part in ("weight", "bias"))
            maps = [torch.relu(torch.conv2d(z, weight, bias, padding=1)) for z in maps]
        one, other = (z / (z.norm(dim=1, keepdim=True) + 1e-10) for z in maps)
        layer = torch.conv2d((one - other) ** 2, linears[f"lin{k}.model.1.weight"])
        total = total + layer.mean()
        maps = [torch.max_pool2d(z, 2) for z in maps]
    assert loss(x, y).item() == pytest.approx(total.item(), rel=1e-5)
    gray = x[:, :1].clone().requires_grad_()
    loss(gray, y[:, :1]).backward()
    assert gray.grad.abs().sum() > 0


def test_a_wrong_file_of_lpips_is_named(tmp_path):
    published_files(tmp_path)
    vgg, linears = str(tmp_path / "vgg16.pth"), str(tmp_path / "lpips.safetensors")
    for files, name in (
        ((linears, linears), "lpips.safetensors"),
        ((vgg, vgg), "vgg16.pth"),
        ((vgg, str(tmp_path / "none.pth")), "none.pth"),
    ):
        with pytest.raises(UserError, match=name) as raised:
            lpips_loss(*files, CPU)
        assert "\n" not in str(raised.value)


# --- two processes ------------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_two_processes_train_what_one_does(recipe, tmp_path):
    """The discriminator, the adaptive weight, LeCAM's averages, EMA, codes and their revival.

    In two parts, over which the adaptive weight is no sum.
    """
    recipe = with_losses(recipe, optim=dataclasses.replace(OPTIM, accumulate=2))
    one = run(Job(recipe, tmp_path / "one", train="vae"))
    two = Job(recipe, tmp_path / "two", train="vae")
    results, _ = train_on_two([two], tmp_path / "jobs")
    for result in results[0]:
        assert result["ended"] == "finished"
        assert list(result["losses"].values()) == pytest.approx(
            list(one["losses"].values()), rel=1e-5
        )
    left, right = (load_file(tmp_path / name / "vae-best.safetensors") for name in ("one", "two"))
    for name, value in left.items():
        # Not the biases before norms of one channel a group, whose gradients are rounding alone.
        if name.startswith(("quantize.", "decoder.conv_out.", "quant_conv.")):
            assert torch.allclose(value, right[name], rtol=1e-5, atol=1e-5), name
    lines = [steps_of(tmp_path / name, "vae") for name in ("one", "two")]
    for line, other in zip(*lines, strict=True):
        assert line.keys() == other.keys()
        for key, value in line.items():
            assert other[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    entries = json.dumps(metrics(tmp_path / "two", "vae"))
    assert "adversarial" in entries
    # The state of the folder goes on in one process.
    again = dataclasses.replace(
        recipe, vae_training=dataclasses.replace(recipe.vae_training, epochs=3)
    )
    assert resume(again, tmp_path / "two").steps == 6
