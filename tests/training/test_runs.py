"""Training runs and their files: refusals before anything is lost, and resumption."""

import dataclasses
import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import open_recipe_data
from test_trainer import CPU, OPTIM, assert_same, both, folders, interrupt_after, quiet, recipe

from variant.data.images import FolderData
from variant.data.sources import data_inputs
from variant.errors import UserError
from variant.models.var import VAR
from variant.training.recipe import load_recipe
from variant.training.run_setup import RunSetup, resume_hint
from variant.training.trainer import Trainer
from variant.training.vae_task import VAETask, train_vae
from variant.training.var_task import VARTask, train_var, without_tf32

__all__ = ["folders", "recipe"]  # fixtures


def stopped(recipe, out, patch, train=train_vae, task=VAETask, step=2, **rest):
    """Start a run, stop it after that step (of its second epoch), return its output."""
    console = quiet()
    with patch.context() as inner:
        interrupt_after(inner, task, step)
        with pytest.raises(SystemExit):
            train(recipe, out, console=console, device=CPU, **rest)
    return console.file.getvalue()


def resume(recipe, out, train=train_vae):
    return train(recipe, out, resume=True, console=quiet(), device=CPU)


def rewrite(path, **changes):
    state = torch.load(path, weights_only=True)
    for name, value in changes.items():
        if value is None:
            del state[name]
        else:
            state[name] = value
    torch.save(state, path)


def test_a_half_trained_vqvae_is_refused_unless_it_is_named(recipe, tmp_path, monkeypatch):
    stopped(recipe, tmp_path, monkeypatch)
    with pytest.raises(UserError, match="the training of its VQ-VAE has not finished"):
        train_var(recipe, tmp_path, console=quiet(), device=CPU)
    named = dataclasses.replace(
        recipe,
        vae_training=dataclasses.replace(
            recipe.vae_training, weights=str(tmp_path / "vae-best.safetensors")
        ),
    )
    assert train_var(named, tmp_path / "named", console=quiet(), device=CPU).steps == 8
    (tmp_path / "vae-last.pt").unlink()
    with pytest.raises(UserError, match="may be half trained"):
        train_var(recipe, tmp_path, console=quiet(), device=CPU)


def test_resuming_with_another_vqvae_is_refused(recipe, tmp_path, monkeypatch):
    train_vae(recipe, tmp_path, console=quiet(), device=CPU)
    stopped(recipe, tmp_path, monkeypatch, train_var, VARTask)
    path = tmp_path / "vae-best.safetensors"
    save_file({key: value + 1 for key, value in load_file(path).items()}, path)
    with pytest.raises(UserError, match="was trained with another VQ-VAE weights") as caught:
        resume(recipe, tmp_path, train_var)
    assert "\n" not in str(caught.value)


def test_resuming_with_other_data_is_refused(recipe, tmp_path, monkeypatch, folders):
    stopped(recipe, tmp_path, monkeypatch)
    extra = folders / "train" / "class0" / "extra.png"
    extra.write_bytes((folders / "train" / "class0" / "0.png").read_bytes())
    try:
        with pytest.raises(UserError, match=r"another number of training images.*was 24.*is 25"):
            resume(recipe, tmp_path)
    finally:
        extra.unlink()
    first = folders / "train" / "class0" / "0.png"
    renamed = first.rename(first.with_name("zero.png"))
    try:
        with pytest.raises(UserError, match="trained with another image files or labels"):
            resume(recipe, tmp_path)
    finally:
        renamed.rename(first)


def test_digits_have_a_digest_of_their_own():
    inputs = data_inputs(open_recipe_data(load_recipe("digits")))
    assert inputs["num_train"] + inputs["num_held_out"] == 1797
    assert len(inputs["data_sha256"]) == 64


def test_a_damaged_or_foreign_checkpoint_is_one_line(recipe, tmp_path, monkeypatch):
    stopped(recipe, tmp_path, monkeypatch)
    last, best = tmp_path / "vae-last.pt", tmp_path / "vae-best.safetensors"
    whole, whole_best = last.read_bytes(), best.read_bytes()
    state = torch.load(last, weights_only=True)
    module = dict(state["module"])
    module.popitem()
    optimizer = {**state["optimizer"], "param_groups": []}
    for changes, message in (
        ({"format": "other"}, "is not a checkpoint of this program"),
        ({"kind": "var"}, "is not a checkpoint of this program"),
        ({"history": None}, "is damaged: history missing"),
        ({"step": "two"}, "is damaged: step missing or of another type"),
        ({"module": module}, "does not hold the weights of this VQVAE"),
        ({"optimizer": optimizer}, "is damaged"),
        ({"random": {}}, "is damaged"),
    ):
        rewrite(last, **changes)
        with pytest.raises(UserError, match=message) as caught:
            resume(recipe, tmp_path)
        assert "\n" not in str(caught.value)
        last.write_bytes(whole)
    best.write_bytes(whole_best[:-100])
    with pytest.raises(UserError, match=r"vae-best.safetensors: is missing or damaged"):
        resume(recipe, tmp_path)
    best.unlink()
    with pytest.raises(UserError, match=r"vae-best.safetensors: is missing or damaged"):
        resume(recipe, tmp_path)
    best.write_bytes(whole_best)
    assert resume(recipe, tmp_path).steps == 4


def test_runs_are_refused_before_weights_are_read_and_copies_encoded(recipe, tmp_path, monkeypatch):
    both(recipe, tmp_path)

    def fail(*args, **rest):
        raise AssertionError("too late")

    monkeypatch.setattr("variant.training.var_task.load_vae", fail)
    monkeypatch.setattr(VARTask, "_encode_copies", fail)
    (tmp_path / "file").write_text("")
    for out, optim, message in (
        (tmp_path, {}, "already holds a run"),
        (tmp_path / "new", {"precision": "fp16"}, 'precision "fp16" needs a GPU'),
        (tmp_path / "new", {"batch_size": 99}, "batch_size must be at most"),
        (tmp_path / "file" / "run", {}, "cannot be written"),
    ):
        chosen = dataclasses.replace(recipe, optim=dataclasses.replace(OPTIM, **optim))
        with pytest.raises(UserError, match=message):
            train_var(chosen, out, console=quiet(), device=CPU)


def test_a_model_folder_without_a_run_is_not_overwritten(recipe, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for train in (train_vae, train_var):
        with pytest.raises(UserError, match=r"holds a model .config.json. but no training run"):
            train(recipe, tmp_path, console=quiet(), device=CPU)


def test_the_resume_command_is_quoted_and_contains_the_seed(recipe, tmp_path, monkeypatch):
    digits = load_recipe("digits")
    folder = Path("a b")
    assert resume_hint("variant train", digits, folder) == (
        "variant train --recipe digits --out 'a b' --resume"
    )
    assert "--seed 7 --resume" in resume_hint("x", dataclasses.replace(digits, seed=7), folder)
    changed = dataclasses.replace(digits, optim=OPTIM)
    assert resume_hint("x", changed, folder) == "the same command and --resume"
    printed = stopped(recipe, tmp_path, monkeypatch, resume_command="variant train-vae --out q")
    assert "Resume with: variant train-vae --out q" in printed


def test_sigterm_finishes_the_step_saves_and_exits_with_143(recipe, tmp_path, monkeypatch):
    interrupt_after(monkeypatch, VAETask, 2, signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        train_vae(recipe, tmp_path, console=quiet(), device=CPU)
    assert caught.value.code == 143
    assert torch.load(tmp_path / "vae-last.pt", weights_only=True)["step"] == 3


def test_a_resumed_run_equals_an_unbroken_one_with_copies_and_accumulation(
    recipe, tmp_path, monkeypatch
):
    chosen = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, mixup=0.0, copies=2),
        optim=dataclasses.replace(OPTIM, accumulate=3),
    )
    both(chosen, tmp_path / "whole")
    parted = tmp_path / "parted"
    train_vae(chosen, parted, console=quiet(), device=CPU)
    stopped(chosen, parted, monkeypatch, train_var, VARTask)
    torch.manual_seed(99)
    resume(chosen, parted, train_var)
    states = [
        torch.load(f / "var-last.pt", weights_only=True) for f in (tmp_path / "whole", parted)
    ]
    assert_same(states[0]["module"], states[1]["module"])
    assert_same(states[0]["optimizer"]["state"], states[1]["optimizer"]["state"])


def trainer_of(recipe, out):
    setup = RunSetup("vae", recipe, OPTIM, out, device=CPU)
    module = torch.nn.Sequential(torch.nn.Linear(2, 1))
    task = type("Fixed", (VAETask,), {"__init__": lambda self: None})()
    task.module, task.data, task.recipe = module, setup.data, recipe
    return Trainer(task, setup, 1, quiet())


def test_the_real_optimiser_decays_matrices_only_and_steps_on_clipped_gradients(recipe, tmp_path):
    trainer = trainer_of(recipe, tmp_path)
    decays = [group["weight_decay"] for group in trainer.state.optimizer.param_groups]
    assert decays == [OPTIM.weight_decay, 0.0]
    weight, bias = trainer.task.module[0].weight, trainer.task.module[0].bias
    assert [group["params"] for group in trainer.state.optimizer.param_groups] == [[weight], [bias]]
    trainer.task.loss = lambda indices, epoch, step: (weight.sum() + bias.sum()) * 1e3
    trainer.task.before_step = lambda indices, epoch, step: None
    seen = []
    step = trainer.state.optimizer.step

    def watched(*args, **rest):
        seen.append(torch.cat((weight.grad.flatten(), bias.grad)).norm().item())
        return step(*args, **rest)

    trainer.state.optimizer.step = watched
    trainer._train_step()
    assert seen == [pytest.approx(OPTIM.clip, rel=1e-3)]


def test_bf16_computes_products_in_bf16_and_the_teacher_input_in_float32(
    recipe, tmp_path, monkeypatch
):
    train_vae(recipe, tmp_path, console=quiet(), device=CPU)
    observed = {}
    forward = VAR.forward

    def spy(self, labels, x_teacher, schedule=None, **rest):
        observed["enabled"] = torch.is_autocast_enabled("cpu")
        observed["dtype"] = torch.get_autocast_dtype("cpu")
        observed["product"] = torch.nn.functional.linear(x_teacher, x_teacher[0]).dtype
        observed["teacher"] = x_teacher.dtype
        return forward(self, labels, x_teacher, schedule, **rest)

    monkeypatch.setattr(VAR, "forward", spy)
    chosen = dataclasses.replace(recipe, optim=dataclasses.replace(OPTIM, precision="bf16"))
    train_var(chosen, tmp_path, console=quiet(), device=CPU)
    assert observed == {
        "enabled": True,
        "dtype": torch.bfloat16,
        "product": torch.bfloat16,
        "teacher": torch.float32,
    }


def task_of(recipe, copies):
    """A task whose network records its arguments, and the dictionary of those arguments."""
    section = recipe.data
    if copies:
        section = dataclasses.replace(section, mixup=0.0, copies=copies)
    chosen = dataclasses.replace(recipe, data=section)
    arguments = {}

    class Network(torch.nn.Module):
        def schedule(self, depth):
            return None

        def forward(self, labels_B, x_teacher, schedule, **mixing):
            arguments.update(mixing, labels=labels_B, images=x_teacher)
            return torch.zeros(len(labels_B), 3, 8)

    task = VARTask(Network(), None, open_recipe_data(chosen), chosen, CPU, 2)
    task._teacher_input = lambda tokens_BL: tokens_BL
    return task, arguments


def test_copied_tokens_come_with_the_label_of_their_image(recipe):
    task, arguments = task_of(recipe, copies=2)
    number_N = torch.arange(24)
    task._copies_CNL = torch.stack((number_N, number_N))[:, :, None].expand(2, 24, 3)
    indices = torch.randperm(24, generator=torch.Generator().manual_seed(1)).numpy()[:7]
    tokens_BL, labels_B = task._copied(indices, 0, task._copies_CNL)
    assert tokens_BL[:, 0].tolist() == indices.tolist()
    assert labels_B.tolist() == [int(index >= 12) for index in indices]
    assert not arguments


def test_mixup_gives_the_network_the_label_of_the_partner_and_the_images_weight(recipe):
    task, arguments = task_of(recipe, copies=0)
    task._tokenize = lambda images: images[:, 0, 0, :3]  # keeps the mixed pixels
    cross_entropy = torch.nn.functional.cross_entropy
    indices = torch.arange(2, 24, 3).numpy()
    try:
        torch.nn.functional.cross_entropy = lambda logits, target: logits.sum()
        task.loss(indices, 0, 0)
    finally:
        torch.nn.functional.cross_entropy = cross_entropy
    images, labels_B = task.data.train(indices, 0)
    assert torch.equal(arguments["labels"], labels_B)
    mix_B = arguments["mix_B"]
    assert len(set(mix_B.tolist())) == len(indices)
    pixels = images[:, 0, 0, :3]
    for row, mix in enumerate(mix_B):
        # The mixed pixels identify the partner, whose label must be mixed in too.
        others = [mix * pixels[row] + (1 - mix) * pixels[other] for other in range(len(indices))]
        near = [
            other
            for other, mixed in enumerate(others)
            if torch.allclose(mixed, arguments["images"][row], atol=1e-5)
        ]
        assert near
        assert arguments["mixed_labels_B"][row] in labels_B[near]


def test_tokenising_turns_tf32_off_and_restores_it():
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32
    with without_tf32():
        assert not cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
    assert cudnn.allow_tf32 == before


def test_the_model_folder_records_every_setting(recipe, tmp_path):
    both(recipe, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["training"]["settings"] == json.loads(json.dumps(recipe.to_dict()))


def test_an_evaluation_of_few_held_out_images_sees_every_class(recipe, folders):
    section = dataclasses.replace(recipe.data, held_out=str(folders / "train"))
    data = FolderData(section, 8, 3, seed=0)
    assert data.held_out(range(6))[1].unique().tolist() == [0, 1]
    classes = [path.parent.name for path in data.held_out_paths]
    assert classes == [f"class{label}" for label in data.held_out_labels.tolist()]
    assert sorted(classes) == ["class0"] * 12 + ["class1"] * 12
