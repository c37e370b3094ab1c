"""Training of the transformer: configurations, tokens, mixup, the VQ-VAE that it needs."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from small_models import open_recipe_data, open_recipe_source
from tiny_runs import CPU, OPTIM, quiet, run_until, train_both, trained_vae

from variant.checkpoints.model_folder import load_model
from variant.data.images import FolderData
from variant.data.samples import mixing
from variant.errors import UserError
from variant.models.var import VAR
from variant.training.schedule import choose_depth, subnet_probability
from variant.training.vae_task import train_vae
from variant.training.var_task import VARTask, train_var


def test_training_the_transformer_needs_a_vqvae(recipe, tmp_path):
    with pytest.raises(
        UserError, match="holds no VQ-VAE; train one first with `variant train-vae`"
    ):
        train_var(recipe, tmp_path, console=quiet(), device=CPU)


def test_a_half_trained_vqvae_is_refused_unless_it_is_named(recipe, tmp_path, monkeypatch):
    run_until(recipe, tmp_path, monkeypatch)
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
    with pytest.raises(UserError, match="training may be incomplete"):
        train_var(recipe, tmp_path, console=quiet(), device=CPU)


def test_classes_of_model_and_data_must_agree(recipe, tmp_path):
    trained_vae(recipe, tmp_path)
    other = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, num_classes=5))
    text = "tiny: model.num_classes must be 2, as many as the data has "
    text += f"(sub-folders of {recipe.data.train}); got 5"
    with pytest.raises(UserError) as caught:
        train_var(other, tmp_path, console=quiet(), device=CPU)
    assert str(caught.value) == text
    # The VQ-VAE does not see classes, but what it is trained for does.
    with pytest.raises(UserError) as caught:
        train_vae(other, tmp_path / "vae", console=quiet(), device=CPU)
    assert str(caught.value) == text
    assert not (tmp_path / "vae").exists()


def test_each_step_trains_the_scheduled_configuration(recipe, tmp_path, monkeypatch):
    trained_vae(recipe, tmp_path)
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


def test_copies_are_encoded_once_and_trained_on(recipe, tmp_path):
    section = dataclasses.replace(recipe.data, mixup=0.0, copies=2)
    assert train_both(dataclasses.replace(recipe, data=section), tmp_path).steps == 8


def test_training_losses_of_copies_are_those_of_the_first_copy(recipe, tmp_path):
    section = dataclasses.replace(recipe.data, mixup=0.0, copies=2)
    copied = train_both(dataclasses.replace(recipe, data=section), tmp_path)
    var, vae, _ = load_model(tmp_path)
    images, labels = open_recipe_data(recipe).train(np.random.default_rng(0).permutation(24)[:6], 0)
    with torch.no_grad():
        tokens = vae.encode(images)
        logits = var(labels, vae.teacher_input(tokens))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    assert copied.train_loss["full"] == pytest.approx(loss.item(), rel=1e-4)


def test_bf16_computes_products_of_the_present_weights_and_the_teacher_input_in_float32(
    recipe, tmp_path, monkeypatch
):
    trained_vae(recipe, tmp_path)
    observed, fresh = {}, []
    forward = VAR.forward

    def spy(self, labels, x_teacher, schedule=None, **rest):
        observed["enabled"] = torch.is_autocast_enabled("cpu")
        observed["dtype"] = torch.get_autocast_dtype("cpu")
        observed["product"] = torch.nn.functional.linear(x_teacher, x_teacher[0]).dtype
        observed["teacher"] = x_teacher.dtype
        # autocast keeps its cast of a weight: one from an earlier step would be another value.
        weight = self.word_embed.weight
        used = torch.nn.functional.linear(torch.eye(weight.shape[1]), weight).T
        fresh.append(torch.equal(used, weight.bfloat16()))
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
    assert len(fresh) > 8
    assert all(fresh)


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

    task = VARTask(Network(), None, open_recipe_source(chosen), chosen, CPU, 2)
    task._teacher_input = lambda tokens_BL: tokens_BL
    return task, arguments


def test_copied_tokens_come_with_the_label_of_their_image(recipe):
    task, arguments = task_of(recipe, copies=2)
    number_N = torch.arange(24)
    task._copies_CNL = torch.stack((number_N, number_N))[:, :, None].expand(2, 24, 3)
    task._labels_N = number_N // 12
    indices = torch.randperm(24, generator=torch.Generator().manual_seed(1)).numpy()[:7]
    samples = task._copied(indices, 0, task._copies_CNL)
    assert samples.tokens_BL[:, 0].tolist() == indices.tolist()
    assert samples.labels_B.tolist() == [int(index >= 12) for index in indices]
    assert not arguments


def test_mixup_gives_the_network_the_label_of_the_partner_and_the_images_weight(recipe):
    task, arguments = task_of(recipe, copies=0)
    task._tokenize = lambda images: images[:, 0, 0, :3]  # keeps the mixed pixels
    cross_entropy = torch.nn.functional.cross_entropy
    indices = np.arange(2, 24, 3)
    try:
        torch.nn.functional.cross_entropy = lambda logits, target: logits.sum()
        task.loss(indices, 1, 0)
    finally:
        torch.nn.functional.cross_entropy = cross_entropy
    partner_N, mix_N = mixing(0, 1, 24, 0.2)
    data = open_recipe_data(recipe)
    images, labels_B = data.train(indices, 1)
    others, other_labels_B = data.train(partner_N[indices], 1)
    mix_B = torch.from_numpy(mix_N[indices])
    assert torch.equal(arguments["labels"], labels_B)
    assert torch.equal(arguments["mixed_labels_B"], other_labels_B)
    assert torch.equal(arguments["mix_B"], mix_B)
    expected = mix_B[:, None] * images[:, 0, 0, :3] + (1 - mix_B[:, None]) * others[:, 0, 0, :3]
    torch.testing.assert_close(arguments["images"], expected)
    assert not torch.equal(labels_B, other_labels_B)


def test_the_model_folder_records_every_setting(recipe, tmp_path):
    train_both(recipe, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["training"]["settings"] == json.loads(json.dumps(recipe.to_dict()))
    assert config["var"]["class_names"] == ["class0", "class1"]


def test_an_evaluation_of_few_held_out_images_sees_every_class(recipe, folders):
    section = dataclasses.replace(recipe.data, held_out=str(folders / "train"))
    data = FolderData(section, 8, 3, seed=0)
    assert data.held_out(range(6))[1].unique().tolist() == [0, 1]
    classes = [path.parent.name for path in data.held_out_paths]
    assert classes == [f"class{label}" for label in data.held_out_labels.tolist()]
    assert sorted(classes) == ["class0"] * 12 + ["class1"] * 12
