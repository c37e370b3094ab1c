"""A VQ-VAE in two stages by the packaged recipes: a whole run, then one with a discriminator."""

import dataclasses
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import CPU, assert_same, quiet, run_until, steps_of

from benchmarks.vae_losses import measure
from variant.cli.main import main
from variant.data.idx import FASHION_MNIST
from variant.data.sources import open_data
from variant.errors import UserError
from variant.evaluation.classifier import save_classifier, train_classifier
from variant.models.config import to_plain
from variant.paths import file_sha256
from variant.training.export import models_of
from variant.training.recipe import load_recipe
from variant.training.vae_task import train_vae
from variant.training.var_task import train_var

FIRST, SECOND = "fashion-mnist-vqvae", "fashion-mnist-adversarial"
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
# Minutes of two cores that the runs of Fashion-MNIST may take; 0 leaves them out.
MINUTES = int(os.environ.get("VARIANT_VAE_MINUTES", "0"))
JUDGES = (1, 2, 3)  # seeds of classifiers
IMAGES = 5000  # held-out ones that a judge sees


def as_idx(values):
    head = bytes((0, 0, 8, values.ndim)) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    return head + values.tobytes()


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The current folder, with files like those of Fashion-MNIST; options of runs of seconds."""
    monkeypatch.chdir(tmp_path)
    rng, words = np.random.default_rng(0), ["--data.dataset", "none"]
    for key, count in (("train", 320), ("held_out", 40)):
        images = rng.integers(256, size=(count, 28, 28), dtype=np.uint8)
        Path(key).write_bytes(as_idx(images))
        Path(f"{key}-labels").write_bytes(as_idx(np.arange(count, dtype=np.uint8) % 10))
        words += [f"--data.{key.replace('_', '-')}", key]
        words += [f"--data.{key.replace('_', '-')}-labels", f"{key}-labels"]
    words += ["--vae-training.perceptual.steps", "2", "--vae-training.optim.batch-size", "8"]
    return [*words, "--vae-training.optim.precision", "fp32", "--logging.every", "1"]


def shortened(name, small, *more):
    """The words of a run of three steps of a recipe into its own folder."""
    words = ["--vae-training.optim.steps-per-epoch", "3"]
    words += ["--vae-training.adversary.start-step", "1"] if name == SECOND else []
    return ["train-vae", "--recipe", name, *small, *words, *more]


def test_two_short_commands_train_both_stages(small, capsys):
    # The second alone says what is missing, without a look at the Hub.
    assert main(shortened(SECOND, small)) == 1
    message = capsys.readouterr().err
    assert "vae_training.start_weights: ./runs/fashion-mnist-vqvae: no such model" in message
    assert "`variant train-vae` with another recipe trains one" in message
    assert main(shortened(FIRST, small)) == 0
    # A recipe of other sizes is refused before its classifier is trained.
    assert main(shortened(SECOND, small, "--vae.vocab-size", "128")) == 1
    assert "vae.vocab_size must be 256, as in the model; got 128" in capsys.readouterr().err
    assert not list(Path("runs", SECOND).glob("*"))
    assert main(shortened(SECOND, small)) == 0
    first = Path("runs", FIRST, "vae-best.safetensors")
    saved = torch.load(Path("runs", SECOND, "vae-last.pt"), weights_only=True)
    assert saved["inputs"]["start_sha256"] == file_sha256(first)
    lines = steps_of(Path("runs", SECOND), "vae")
    adversarial = [line["step"] for line in lines if "loss/discriminator" in line]
    assert adversarial == [2, 3]
    assert "loss/generator" not in steps_of(Path("runs", FIRST), "vae")[-1]
    # Rates this low change little of what was trained.
    before, after = load_file(first), load_file(Path("runs", SECOND, "vae-best.safetensors"))
    for name in filter(lambda name: name.startswith("decoder."), before):
        torch.testing.assert_close(after[name].float(), before[name].float(), rtol=0.1, atol=0.02)


def test_the_recipes_are_the_runs_that_were_measured():
    """docs/training.md quotes the results of these runs."""
    rows = {}
    for name in ("2-threads", "r1-seed-0-epyc-1-thread"):
        path = next(RESULTS.glob(f"vae-losses-fashion-mnist-*{name}.json"))
        rows |= {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    for recipe, row in ((FIRST, rows["perceptual"]), (SECOND, rows["with"])):
        section = to_plain(load_recipe(recipe).vae_training)
        settings = row["settings"]
        section.pop("start_weights")
        if not settings["adversary"]["weight"]:  # its other keys have no effect
            section["adversary"] = settings["adversary"] = None
        if not settings["revive_every"]:
            section["revive_until"] = settings["revive_until"] = None
        assert section == settings
    # Both runs of the stage began with the same weights.
    assert rows["with"]["start_sha256"] == rows["without"]["start_sha256"]
    keys = {"model", "vae", "data", "optim", "schedule", "eval", "seed"}
    one, other = (load_recipe(name).to_dict() for name in (FIRST, SECOND))
    assert {key: one[key] for key in keys} == {key: other[key] for key in keys}


def test_the_folder_of_a_run_is_a_trained_vqvae(recipe, tmp_path, monkeypatch):
    """Wherever a VQ-VAE is named, as soon as its training has finished."""

    def named(key, folder, **more):
        training = dataclasses.replace(recipe.vae_training, **{key: str(folder)}, **more)
        return dataclasses.replace(recipe, vae_training=training)

    first = tmp_path / "first"
    run_until(recipe, first, monkeypatch)
    for key, train in (("start_weights", train_vae), ("weights", train_var)):
        with pytest.raises(UserError, match="the training of its VQ-VAE has not finished"):
            train(named(key, first), tmp_path / "early", console=quiet(), device=CPU)
    train_vae(recipe, first, resume=True, console=quiet(), device=CPU)
    best = load_file(first / "vae-best.safetensors")
    further = named("start_weights", first, revive_every=0, trainable="decoder", epochs=1)
    train_vae(further, tmp_path / "second", console=quiet(), device=CPU)
    tuned = load_file(tmp_path / "second" / "vae-best.safetensors")
    kept = [name for name in best if name.startswith(("encoder.", "quant_conv."))]
    assert_same({name: best[name] for name in kept}, {name: tuned[name] for name in kept})
    train_var(named("weights", first), tmp_path / "var", console=quiet(), device=CPU)
    _, vae, _ = models_of(tmp_path / "var" / "var-last.pt", vae=first)
    assert_same(dict(vae.state_dict()), best)
    # The folder of a run of other scales does not fit, though its tensors do.
    config = dataclasses.replace(recipe.vae, patch_nums=(1, 3, 4))
    other = dataclasses.replace(named("weights", first), vae=config)
    with pytest.raises(UserError, match=r"vae.patch_nums must be \[1, 2, 4\]"):
        train_var(other, tmp_path / "other", console=quiet(), device=CPU)


@pytest.mark.skipif(not MINUTES, reason="takes minutes; VARIANT_VAE_MINUTES=15 runs it")
@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="dataset-fashion-mnist is not installed")
@pytest.mark.timeout(7200)
def test_fashion_mnist_in_minutes(tmp_path, monkeypatch):
    """Codes, scales and the adversarial stage on held-out images, within the minutes."""
    monkeypatch.chdir(tmp_path)
    start = time.process_time()
    assert main(["train-vae", "--recipe", FIRST]) == 0
    assert main(["train-vae", "--recipe", SECOND]) == 0
    seconds = time.process_time() - start
    # The same stage without the adversary.
    words = ["--recipe", SECOND, "--vae-training.adversary.weight", "0", "--out", "runs/without"]
    assert main(["train-vae", *words]) == 0
    section = load_recipe(FIRST)
    data = open_data(section.data, section.vae.image_size, section.vae.in_channels, section.seed)
    # A distance depends on whose features it is in, so that the mean of several judges decides.
    # Their seeds are others than that of the perceptual loss, and they are trained for longer.
    runs = {"without": Path("runs/without"), "with": Path("runs", SECOND)}
    changes, errors = [], []
    for seed in JUDGES:
        judge = Path(f"judge-{seed}.safetensors")
        save_classifier(judge, *train_classifier(data, seed=seed))
        result = measure(SECOND, judge, runs, IMAGES)
        without, adversarial = result["rows"]
        changes.append(adversarial["fd"] - without["fd"])
        errors.append(adversarial["fd_change_error"])
        print(f"judge {seed}: {without['fd']:.4f} to {adversarial['fd']:.4f}, {errors[-1]:.4f}")
        for row in result["rows"]:
            assert min(row["codes_used_by_scale"][-3:]) >= 0.9
            assert row["psnr_by_scale"] == sorted(set(row["psnr_by_scale"]))
        assert adversarial["psnr"] > without["psnr"] - 1
    assert seconds <= 60 * 2 * MINUTES
    # The judges see the same images: the error of their mean is at most the mean of their errors.
    assert np.mean(changes) + 2 * np.mean(errors) < 0
