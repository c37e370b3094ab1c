"""Training: the schedule is followed, runs are reproducible, resumed runs equal unbroken ones."""

import dataclasses
import io
import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from small_models import open_recipe_data

from variant.checkpoints.model_folder import load_model
from variant.data.config import DataSection
from variant.data.images import epoch_order
from variant.errors import UserError
from variant.models.config import VQVAEConfig
from variant.models.var import VAR
from variant.models.vqvae import VQVAE
from variant.training.optim import OptimSection, decay_groups, learning_rate
from variant.training.recipe import EvalSection, ModelSection, Recipe, VAETraining
from variant.training.schedule import ScheduleSection, choose_depth, subnet_probability
from variant.training.vae_task import VAETask, revive_codes, train_vae
from variant.training.var_task import VARTask, train_var

OPTIM = OptimSection(batch_size=12, learning_rate=1e-3)
CPU = torch.device("cpu")


def quiet():
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of ten small images each in two classes."""
    root = tmp_path_factory.mktemp("images")
    for part in ("train", "held_out"):
        for label in range(2):
            (root / part / f"class{label}").mkdir(parents=True)
            for index in range(12 if part == "train" else 3):
                shade = (200 * label, 20 * index, 100)
                image = Image.new("RGB", (12 + index, 10), shade)
                image.save(root / part / f"class{label}" / f"{index}.png")
    return root


@pytest.fixture
def recipe(folders):
    return Recipe(
        name="tiny",
        description="two classes of flat colours",
        model=ModelSection(depth=3, embed_dim=32, num_heads=2, num_classes=2),
        vae=VQVAEConfig(
            vocab_size=8,
            z_channels=4,
            ch=32,
            ch_mult=(1, 1),
            num_res_blocks=1,
            patch_nums=(1, 2, 4),
        ),
        vae_training=VAETraining(epochs=2, optim=OPTIM, revive_every=2, scale_dropout=0.5),
        data=DataSection(
            kind="folder",
            train=str(folders / "train"),
            held_out=str(folders / "held_out"),
            hflip=0.5,
            randaugment_ops=2,
            randaugment_magnitude=9,
            mixup=0.2,
            workers=2,
        ),
        optim=OPTIM,
        schedule=ScheduleSection(depths=(2,), bridge=1, joint=1, transition=2, refinement=1),
        eval=EvalSection(batch_size=4),
    )


def metrics(folder, kind="var"):
    lines = (folder / f"{kind}-metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    for entry in entries:
        entry.pop("seconds")
    return entries


def both(recipe, out):
    train_vae(recipe, out, console=quiet(), device=CPU)
    return train_var(recipe, out, console=quiet(), device=CPU)


def interrupt_after(monkeypatch, task, step, signum=signal.SIGINT):
    """Send a signal to this process, once, while that step runs."""
    original, sent = task.loss, []

    def loss(self, indices, epoch, current):
        if current == step and not sent:
            sent.append(current)
            os.kill(os.getpid(), signum)
        return original(self, indices, epoch, current)

    monkeypatch.setattr(task, "loss", loss)


def test_the_two_commands_give_a_model_folder(recipe, tmp_path):
    summary = both(recipe, tmp_path)
    assert summary.epochs == 4
    assert summary.steps == 8
    assert set(summary.held_out_loss) == {"full", "2"}
    var, vae, config = load_model(tmp_path)
    assert var.config == recipe.var_config
    assert vae.config == recipe.vae
    assert config["training"]["recipe"] == "tiny"
    assert config["training"]["held_out_loss"] == summary.held_out_loss
    best = load_file(tmp_path / "var-best.safetensors")
    assert all(torch.equal(value, best[key]) for key, value in var.state_dict().items())
    entries = metrics(tmp_path)
    means = [entry["held_out_mean"] for entry in entries]
    assert summary.best_epoch == means.index(min(means)) + 1


def test_the_same_seed_gives_the_same_losses_and_weights_twice(recipe, tmp_path):
    both(recipe, tmp_path / "a")
    both(recipe, tmp_path / "b")
    both(dataclasses.replace(recipe, seed=1), tmp_path / "c")
    for kind in ("vae", "var"):
        assert metrics(tmp_path / "a", kind) == metrics(tmp_path / "b", kind)
        assert metrics(tmp_path / "a", kind) != metrics(tmp_path / "c", kind)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in "ab"]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


@pytest.mark.parametrize(("kind", "task"), [("vae", VAETask), ("var", VARTask)])
@pytest.mark.parametrize("step", [1, 2])  # the end of an epoch, and the middle of one
def test_stopping_and_resuming_equals_never_stopping(
    recipe, tmp_path, monkeypatch, kind, task, step
):
    both(recipe, tmp_path / "whole")
    parted = tmp_path / "parted"
    if kind == "var":
        train_vae(recipe, parted, console=quiet(), device=CPU)
    train = train_vae if kind == "vae" else train_var
    with monkeypatch.context() as patch:
        interrupt_after(patch, task, step)
        console = quiet()
        with pytest.raises(SystemExit) as stopped:
            train(recipe, parted, console=console, device=CPU)
    assert stopped.value.code == 130
    assert f"stopped after step {step + 1} of" in console.file.getvalue()
    assert "Resume with: the same command and --resume" in console.file.getvalue()
    torch.manual_seed(99)  # other draws of the process must not change the run
    train(recipe, parted, resume=True, console=quiet(), device=CPU)
    assert metrics(parted, kind) == metrics(tmp_path / "whole", kind)
    states = [
        torch.load(folder / f"{kind}-last.pt", weights_only=True)
        for folder in (tmp_path / "whole", parted)
    ]
    for part in ("module", "random"):
        assert_same(states[0][part], states[1][part])
    assert_same(states[0]["optimizer"]["state"], states[1]["optimizer"]["state"])
    bests = [load_file(f / f"{kind}-best.safetensors") for f in (tmp_path / "whole", parted)]
    assert_same(*bests)


def assert_same(left, right):
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for pair in zip(left, right, strict=True):
            assert_same(*pair)
    else:
        assert left == right


def test_each_step_trains_the_scheduled_configuration(recipe, tmp_path, monkeypatch):
    train_vae(recipe, tmp_path, console=quiet(), device=CPU)
    depths = []
    forward = VAR.forward

    def spy(self, labels, x_teacher, schedule=None, **rest):
        if self.training:
            depths.append(schedule.depths)
        return forward(self, labels, x_teacher, schedule, **rest)

    monkeypatch.setattr(VAR, "forward", spy)
    train_var(recipe, tmp_path, console=quiet(), device=CPU)
    expected = []
    for step in range(8):
        depth = choose_depth(0, step, subnet_probability(step / 2, 0.2, 1, 2), (2,))
        expected.append((3, 3, 3) if depth is None else (3, 2, 2))
    assert depths == expected
    assert depths[-2:] == [(3, 2, 2)] * 2


def test_accumulated_parts_give_the_gradient_of_the_whole_batch(recipe, tmp_path):
    plain = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, mixup=0.0),
        model=dataclasses.replace(recipe.model, cond_drop_rate=0.0),
    )
    parted = dataclasses.replace(plain, optim=dataclasses.replace(OPTIM, accumulate=3))
    for name, chosen in (("whole", plain), ("parted", parted)):
        both(chosen, tmp_path / name)
    whole, parts = (metrics(tmp_path / name)[0] for name in ("whole", "parted"))
    assert parts["train"] == pytest.approx(whole["train"], rel=1e-4)


def test_bf16_trains(recipe, tmp_path):
    assert both(with_precision(recipe, "bf16"), tmp_path).steps == 8


def test_fp16_without_a_gpu_is_refused(recipe, tmp_path):
    train_vae(recipe, tmp_path, console=quiet(), device=CPU)
    with pytest.raises(UserError, match='precision "fp16" needs a GPU'):
        train_var(with_precision(recipe, "fp16"), tmp_path, console=quiet(), device=CPU)


def with_precision(recipe, precision):
    return dataclasses.replace(recipe, optim=dataclasses.replace(OPTIM, precision=precision))


def test_copies_are_encoded_once_and_trained_on(recipe, tmp_path):
    section = dataclasses.replace(recipe.data, mixup=0.0, copies=2)
    assert both(dataclasses.replace(recipe, data=section), tmp_path).steps == 8


def test_a_folder_that_holds_a_run_is_not_overwritten(recipe, tmp_path):
    train_vae(recipe, tmp_path, console=quiet(), device=CPU)
    with pytest.raises(UserError, match="already holds a run; continue it with --resume"):
        train_vae(recipe, tmp_path, console=quiet(), device=CPU)


def test_resuming_needs_a_run_of_the_same_recipe(recipe, tmp_path):
    with pytest.raises(UserError, match="holds no run to resume"):
        train_vae(recipe, tmp_path, resume=True, console=quiet(), device=CPU)
    train_vae(recipe, tmp_path, console=quiet(), device=CPU)
    with pytest.raises(UserError, match="written by another recipe or seed"):
        train_vae(recipe, tmp_path, resume=True, seed=3, console=quiet(), device=CPU)
    whole = (tmp_path / "vae-last.pt").read_bytes()
    (tmp_path / "vae-last.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"not a readable checkpoint|damaged"):
        train_vae(recipe, tmp_path, resume=True, console=quiet(), device=CPU)


def test_training_the_transformer_needs_a_vqvae(recipe, tmp_path):
    with pytest.raises(
        UserError, match="holds no VQ-VAE; train one first with `variant train-vae`"
    ):
        train_var(recipe, tmp_path, console=quiet(), device=CPU)


def test_classes_of_model_and_data_must_agree(recipe, tmp_path):
    train_vae(recipe, tmp_path, console=quiet(), device=CPU)
    other = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, num_classes=5))
    with pytest.raises(UserError, match="num_classes must be 2, as many as the data has; got 5"):
        train_var(other, tmp_path, console=quiet(), device=CPU)


def test_an_output_that_cannot_be_written_is_one_line(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        train_vae(recipe, tmp_path / "file" / "run", console=quiet(), device=CPU)


def test_missing_and_broken_image_folders_are_one_line(recipe, tmp_path):
    def run(**changes):
        section = dataclasses.replace(recipe.data, **changes)
        train_vae(
            dataclasses.replace(recipe, data=section), tmp_path / "o", console=quiet(), device=CPU
        )

    with pytest.raises(UserError, match="nowhere: no such folder of images"):
        run(train=str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="one sub-folder of images per class; it has none"):
        run(train=str(tmp_path / "empty"))
    (tmp_path / "bad" / "class0").mkdir(parents=True)
    (tmp_path / "bad" / "class0" / "x.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"must have the classes of .*class1"):
        run(held_out=str(tmp_path / "bad"))
    (tmp_path / "bad" / "class1").mkdir()
    (tmp_path / "bad" / "class1" / "x.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"x.png: is not a readable image"):
        run(held_out=str(tmp_path / "bad"))


def test_a_loss_that_is_not_finite_stops_the_run(recipe, tmp_path, monkeypatch):
    def loss(self, indices, epoch, step):
        return self.module(self.data.train(indices, epoch)[0])[1] * float("nan")

    monkeypatch.setattr(VAETask, "loss", loss)
    with pytest.raises(UserError, match=r"the loss is not finite at step 0 .epoch 0.; try a lower"):
        train_vae(recipe, tmp_path, console=quiet(), device=CPU)


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


def test_epochs_visit_every_image_once_in_an_order_of_their_own():
    orders = [epoch_order(0, epoch, 50).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1]
    assert epoch_order(0, 1, 50).tolist() == orders[1]


def test_revived_codes_are_used_afterwards(recipe):
    torch.manual_seed(0)
    module = VQVAE(recipe.vae)
    torch.nn.init.constant_(module.quantize.embedding.weight[1:], 100.0)
    images = torch.rand(8, 3, 8, 8) * 2 - 1
    assert module.encode(images).unique().numel() == 1
    assert revive_codes(module, images, np.random.default_rng(0)) == 7
    assert module.encode(images).unique().numel() > 3


def test_a_batch_larger_than_the_data_is_refused(recipe, tmp_path):
    optim = dataclasses.replace(OPTIM, batch_size=64)
    with pytest.raises(UserError, match=r"batch_size must be at most .* \(24\); got 64"):
        train_vae(
            dataclasses.replace(
                recipe, vae_training=dataclasses.replace(recipe.vae_training, optim=optim)
            ),
            tmp_path,
            console=quiet(),
            device=CPU,
        )


def test_the_summary_gives_both_losses_of_the_best_weights_for_every_configuration(
    recipe, tmp_path
):
    vae_summary = train_vae(recipe, tmp_path, console=quiet(), device=CPU)
    assert vae_summary.train_loss.keys() == {"reconstruction"}
    assert vae_summary.held_out_loss.keys() == {"reconstruction"}
    summary = train_var(recipe, tmp_path, console=quiet(), device=CPU)
    assert summary.train_loss.keys() == summary.held_out_loss.keys() == {"full", "2"}
    var, vae, _ = load_model(tmp_path)
    data = open_recipe_data(recipe)
    # Six images, as many as are held out; the same in every run, and of both classes.
    sample = np.random.default_rng(0).permutation(24)[:6]
    images, labels = data.train(sample, 0)
    assert set(labels.tolist()) == {0, 1}
    with torch.no_grad():
        tokens = vae.encode(images)
        logits = var(labels, vae.teacher_input(tokens), var.schedule(2))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    assert summary.train_loss["2"] == pytest.approx(loss.item(), rel=1e-4)


def test_training_losses_of_copies_are_those_of_the_first_copy(recipe, tmp_path):
    section = dataclasses.replace(recipe.data, mixup=0.0, copies=2)
    copied = both(dataclasses.replace(recipe, data=section), tmp_path)
    var, vae, _ = load_model(tmp_path)
    images, labels = open_recipe_data(recipe).train(np.random.default_rng(0).permutation(24)[:6], 0)
    with torch.no_grad():
        tokens = vae.encode(images)
        logits = var(labels, vae.teacher_input(tokens))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    assert copied.train_loss["full"] == pytest.approx(loss.item(), rel=1e-4)


def test_a_held_out_loss_that_is_not_finite_leaves_the_best_weights_alone(
    recipe, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        VAETask, "evaluate", lambda self, indices, *, held_out: {"reconstruction": float("nan")}
    )
    with pytest.raises(UserError, match=r"the held-out loss is not finite at step 2 .epoch 0."):
        train_vae(recipe, tmp_path, console=quiet(), device=CPU)
    assert not (tmp_path / "vae-best.safetensors").exists()
    assert not (tmp_path / "vae-last.pt").exists()


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_weights(
    recipe, tmp_path, monkeypatch
):
    modules = []

    def loss(self, indices, epoch, step):
        modules.append((self.module, {k: v.clone() for k, v in self.module.state_dict().items()}))
        weight = next(self.module.parameters())
        return weight.sum() * 0 + (weight.flatten()[0] * 0).sqrt()  # its gradient is not finite

    monkeypatch.setattr(VAETask, "loss", loss)
    with pytest.raises(UserError, match="the gradient is not finite at step 0"):
        train_vae(recipe, tmp_path, console=quiet(), device=CPU)
    module, before = modules[-1]
    assert_same(module.state_dict(), before)
