"""What may differ between a run and its continuation, and what it does."""

import dataclasses
import shutil

import pytest
import torch
from tiny_runs import (
    CPU,
    OPTIM,
    assert_same,
    metrics,
    quiet,
    resume,
    run_until,
    tiny_recipe,
    trained_vae,
)

from variant.differences import differences
from variant.errors import UserError
from variant.training.optim import learning_rate
from variant.training.recipe import OutputSection, Recipe
from variant.training.resume_rules import compare_recipes, compare_schedules
from variant.training.schedule import ScheduleSection, subnet_probability
from variant.training.vae_task import VAETask, train_vae
from variant.training.var_task import VARTask, train_var


def changed(recipe: Recipe, section: str, **values) -> Recipe:
    return dataclasses.replace(
        recipe, **{section: dataclasses.replace(getattr(recipe, section), **values)}
    )


def with_epochs(recipe, epochs, **values):
    """The recipe with so many epochs of the VQ-VAE, and nothing that depends on their number."""
    return changed(
        recipe, "vae_training", epochs=epochs, revive_every=0, scale_dropout=0.0, **values
    )


def last(folder, kind="vae"):
    return torch.load(folder / f"{kind}-last.pt", weights_only=True)


def test_moved_data_and_other_outputs_are_allowed_and_printed(
    recipe, tmp_path, monkeypatch, folders
):
    train_vae(recipe, tmp_path / "whole", console=quiet(), device=CPU)
    parted = tmp_path / "parted"
    run_until(recipe, parted, monkeypatch)
    moved = shutil.copytree(folders, tmp_path / "elsewhere")
    chosen = changed(
        dataclasses.replace(
            recipe, name="other", description="words", output=OutputSection(checkpoint_every=9)
        ),
        "data",
        train=str(moved / "train"),
        held_out=str(moved / "held_out"),
        workers=1,
    )
    console = quiet()
    train_vae(chosen, parted, resume=True, console=console, device=CPU)
    assert_same(last(tmp_path / "whole")["module"], last(parted)["module"])
    assert metrics(parted, "vae") == metrics(tmp_path / "whole", "vae")
    printed = console.file.getvalue()
    assert "vae: training on 24 images with cpu, from step 3 of 4 steps, 2 epochs\n" in printed
    for text in ("name 'tiny' -> 'other'", "data.workers 0 -> 1", "output.checkpoint_every 1 -> 9"):
        assert text in printed


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("data", {"hflip": 0.25}, "data.hflip 0.5 -> 0.25"),
        ("data", {"randaugment_ops": 1}, "data.randaugment_ops 2 -> 1"),
        ("eval", {"every": 2}, "eval.every 1 -> 2"),
        ("vae", {"beta": 0.5, "using_znorm": True}, "vae.using_znorm .*, vae.beta 0.25 -> 0.5"),
        ("vae_training", {"reconstruction": 2.0}, "vae_training.reconstruction 1.0 -> 2.0"),
        ("vae_training", {"scale_dropout": 0.25}, "vae_training.scale_dropout 0.5 -> 0.25"),
        (
            "vae_training",
            {"optim": dataclasses.replace(OPTIM, learning_rate=0.5, batch_size=8)},
            "vae_training.optim.batch_size 12 -> 8, vae_training.optim.learning_rate 0.001 -> 0.5",
        ),
    ],
)
def test_what_changes_the_numbers_is_refused_by_name(
    stopped, recipe, tmp_path, section, values, message
):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    before = (tmp_path / "vae-last.pt").read_bytes()
    with pytest.raises(UserError, match=f"written with other settings: {message}; resume") as e:
        resume(changed(recipe, section, **values), tmp_path)
    assert str(e.value).startswith(str(tmp_path / "vae-last.pt"))
    assert "\n" not in str(e.value)
    assert (tmp_path / "vae-last.pt").read_bytes() == before


def test_many_differences_are_shortened(recipe):
    other = changed(recipe, "vae_training", optim=dataclasses.replace(OPTIM, batch_size=6, clip=2))
    other = changed(other, "eval", every=2, batch_size=2, limit=2)
    other = dataclasses.replace(changed(other, "data", hflip=0.0), seed=3)
    with pytest.raises(UserError, match=r"FILE: was written .* and 2 more; resume with the first"):
        compare_recipes(recipe, other, "vae", "FILE")


def test_sections_of_the_other_task_may_change(recipe):
    model = changed(changed(recipe, "model", depth=5, num_heads=1), "optim", batch_size=3)
    assert len(compare_recipes(recipe, model, "vae", "FILE")) == 3
    vae = changed(recipe, "vae_training", reconstruction=9.0)
    assert compare_recipes(recipe, vae, "var", "FILE") == ["vae_training.reconstruction 1.0 -> 9.0"]
    with pytest.raises(UserError, match=r"model.depth 3 -> 5"):
        compare_recipes(recipe, model, "var", "FILE")


def test_differences_have_dotted_keys():
    old = {"a": {"b": 1, "c": [1, 2]}, "d": 0, "gone": 1}
    new = {"a": {"b": 1, "c": [1, 3]}, "d": None, "new": {"x": 1}}
    assert list(differences(old, new)) == [
        ("a.c", [1, 2], [1, 3]),
        ("d", 0, None),
        ("gone", 1, None),
        ("new", None, {"x": 1}),
    ]


def test_more_epochs_equal_a_run_that_had_them_from_the_start(recipe, tmp_path):
    train_vae(with_epochs(recipe, 3), tmp_path / "whole", console=quiet(), device=CPU)
    parted = tmp_path / "parted"
    train_vae(with_epochs(recipe, 2), parted, console=quiet(), device=CPU)
    console = quiet()
    train_vae(with_epochs(recipe, 3), parted, resume=True, console=console, device=CPU)
    assert "changed since the run began: vae_training.epochs 2 -> 3" in console.file.getvalue()
    assert metrics(parted, "vae") == metrics(tmp_path / "whole", "vae")
    for part in ("module", "random", "best_sha256"):
        assert_same(last(parted)[part], last(tmp_path / "whole")[part])


def test_more_refinement_equals_a_run_that_had_it_from_the_start(recipe, tmp_path):
    trained_vae(recipe, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "parted")
    longer = changed(recipe, "schedule", refinement=2)
    train_var(longer, tmp_path / "whole", console=quiet(), device=CPU)
    train_var(recipe, tmp_path / "parted", console=quiet(), device=CPU)
    assert resume(longer, tmp_path / "parted", train_var).epochs == 5
    assert metrics(tmp_path / "parted") == metrics(tmp_path / "whole")
    states = [last(tmp_path / name, "var")["module"] for name in ("parted", "whole")]
    assert_same(*states)


def test_the_steps_that_remain_follow_the_schedule_of_the_new_number(recipe, tmp_path):
    cosine = dataclasses.replace(OPTIM, schedule="cosine", warmup=0.25)
    train_vae(with_epochs(recipe, 2, optim=cosine), tmp_path, console=quiet(), device=CPU)
    rates = [group["lr"] for group in last(tmp_path)["optimizer"]["param_groups"]]
    assert rates == [learning_rate(cosine, 3, 4)] * 2
    resume(with_epochs(recipe, 3, optim=cosine), tmp_path)
    rates = [group["lr"] for group in last(tmp_path)["optimizer"]["param_groups"]]
    assert rates == [learning_rate(cosine, 5, 6)] * 2


def test_fewer_epochs_than_are_completed_are_refused(recipe, tmp_path, monkeypatch):
    run_until(with_epochs(recipe, 3), tmp_path, monkeypatch, step=2)
    with pytest.raises(UserError, match=r"has completed 1.5 of 3 epochs; the recipe now has 1"):
        resume(with_epochs(recipe, 1), tmp_path)
    assert resume(with_epochs(recipe, 2), tmp_path).epochs == 2


def phases(recipe, joint, transition, refinement):
    return changed(recipe, "schedule", joint=joint, transition=transition, refinement=refinement)


@pytest.mark.parametrize(
    ("epochs", "new", "is_allowed"),
    [
        (0.5, (2, 2, 1), True),  # within the joint phase of both
        (1.0, (2, 5, 0), True),
        (1.5, (2, 2, 1), False),
        (1.5, (1, 3, 1), False),  # another slope of the transition
        (3.5, (1, 2, 9), True),
        (3.5, (1, 3, 9), False),
        (0.5, (0, 2, 2), False),
    ],
)
def test_phases_may_change_as_long_as_the_completed_steps_stay(recipe, epochs, new, is_allowed):
    old, other = phases(recipe, 1, 2, 1), phases(recipe, *new)

    def compare():
        compare_schedules(old, other, "var", round(epochs * 100), 100, "FILE")

    if is_allowed:
        compare()
    else:
        with pytest.raises(UserError, match=r"FILE: has completed .* epochs with schedule.joint 1"):
            compare()
    # The rule is that of the probability itself.
    steps = [step / 100 for step in range(round(epochs * 100))]
    sections = (old.schedule, other.schedule)
    assert is_allowed == all(
        subnet_probability(step, 0.2, sections[0].joint, sections[0].transition)
        == subnet_probability(step, 0.2, sections[1].joint, sections[1].transition)
        for step in steps
    )


def test_without_subnets_every_phase_may_change():
    old, new = (
        ScheduleSection(depths=(), bridge=0, joint=joint, transition=1, refinement=1)
        for joint in (1, 4)
    )
    assert new.agrees_until(old, 2.5)


def test_phases_of_the_paper_equal_the_same_ones_written_out(recipe):
    paper = changed(recipe, "schedule", joint=None, transition=None, refinement=None)
    assert compare_recipes(paper, phases(recipe, 5, 15, 15), "var", "FILE") == []


def test_a_file_of_another_size_is_named_by_its_class(recipe, tmp_path, monkeypatch, folders):
    moved = shutil.copytree(folders, tmp_path / "images")
    chosen = changed(recipe, "data", train=str(moved / "train"), held_out=str(moved / "held_out"))
    run_until(chosen, tmp_path / "run", monkeypatch)
    path = moved / "train" / "class1" / "3.png"
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0")
    with pytest.raises(UserError, match=r"other image files or labels.*Changed: train/class1$"):
        resume(chosen, tmp_path / "run")
    path.write_bytes(whole)
    (moved / "held_out" / "class0" / "0.png").rename(moved / "held_out" / "class0" / "00.png")
    with pytest.raises(UserError, match=r"Changed: held_out/class0$"):
        resume(chosen, tmp_path / "run")


def test_the_vqvae_s_settings_may_change_while_the_transformer_resumes(
    recipe, tmp_path, monkeypatch
):
    trained_vae(recipe, tmp_path)
    run_until(recipe, tmp_path, monkeypatch, train_var, VARTask)
    assert resume(changed(recipe, "vae_training", epochs=7), tmp_path, train_var).steps == 8


@pytest.fixture(scope="module")
def stopped(folders, tmp_path_factory):
    """The folder of a VQ-VAE's training that was stopped after step 3 of 4."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        run_until(tiny_recipe(folders), folder, patch, task=VAETask)
    return folder
