"""Phases that end when the held-out losses stop falling."""

import dataclasses
import re

import pytest
import torch
from tiny_runs import CPU, metrics, quiet, resume, run_until, tiny_recipe, trained_vae

from variant.errors import UserError
from variant.training.configurations import Configurations
from variant.training.logging_section import LoggingSection
from variant.training.phase_ends import ENDED, PhaseEnds, ended_phase
from variant.training.resume_rules import compare_recipes, compare_schedules
from variant.training.schedule import ScheduleSection, choose_depth
from variant.training.var_task import VARTask, train_var

SECTION = ScheduleSection(
    depths=(2,), bridge=1, joint=9, transition=8, refinement=9, phases="auto",
    joint_probability=0.2, final_probability=0.8,
)  # fmt: skip


def run(section, losses_of):
    """The history of a run whose held-out losses are a function of the epoch and the phase."""
    history = []
    while True:
        phase = PhaseEnds.of(section, history).phase_at(len(history))
        if phase is None:
            return history
        epoch = len(history) + 1
        entry = {"epoch": epoch}
        losses = losses_of(epoch)
        if losses is not None:
            entry["held_out"] = losses
        history.append(entry)
        ended = ended_phase(section, history)
        if ended is not None:
            entry[ENDED] = ended


def ended(history):
    return {entry[ENDED]: entry["epoch"] for entry in history if ENDED in entry}


def test_a_phase_ends_with_the_third_evaluation_without_progress():
    # The first evaluation of a phase sets its best loss, three more show no progress.
    history = run(SECTION, lambda epoch: {"full": 2.0, "2": 3.0})
    assert ended(history) == {"joint": 4, "transition": 8, "refinement": 12}
    assert len(history) == 12


def test_losses_that_fall_run_the_planned_epochs():
    history = run(SECTION, lambda epoch: {"full": 2.0, "2": 3.0 * 0.99**epoch})
    assert ended(history) == {}
    assert len(history) == 26


@pytest.mark.parametrize(("factor", "ends"), [(0.9985, {}), (0.9998, {"joint": 4})])
def test_progress_is_more_than_a_thousandth(factor, ends):
    # The mean over both falls by the factor in the joint phase, by 2 % an epoch after it.
    def losses(epoch):
        loss = factor**epoch if epoch <= 9 else 0.5 * 0.98**epoch
        return {"full": loss, "2": loss}

    section = dataclasses.replace(SECTION, transition=0, refinement=5)
    joint = {name: epoch for name, epoch in ended(run(section, losses)).items() if name == "joint"}
    assert joint == ends


def test_a_plateau_counts_against_the_best_loss_of_its_phase():
    # 1.0, up, back to a little less than 1.0, up: never below the best by a thousandth.
    values = [1.0, 1.2, 0.9995, 1.1]
    history = run(SECTION, lambda epoch: {"full": values[(epoch - 1) % 4], "2": 1.0})
    assert ended(history)["joint"] == 4


def test_the_last_phases_are_judged_by_the_subnets():
    # The full network gets worse, the subnet better: as refinement does.
    history = run(SECTION, lambda epoch: {"full": 2.0 * 1.1**epoch, "2": 3.0 * 0.99**epoch})
    assert ended(history) == {"joint": 4}  # by the mean
    assert len(history) == 4 + 8 + 9


def test_epochs_without_an_evaluation_do_not_count():
    def losses(epoch):
        return {"full": 2.0, "2": 3.0} if epoch % 2 == 0 else None

    history = run(SECTION, losses)
    assert ended(history)["joint"] == 8


def test_planned_phases_never_end_early():
    section = dataclasses.replace(SECTION, phases="planned")
    history = run(section, lambda epoch: {"full": 2.0, "2": 3.0})
    assert ended(history) == {}
    assert len(history) == 26


def test_without_subnets_the_full_network_decides():
    section = dataclasses.replace(SECTION, depths=())
    assert len(run(section, lambda epoch: {"full": 2.0})) == 12


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [(0, 0.2), (3.9, 0.2), (4, 0.2), (6, 0.35), (7.99, 0.2 + 0.6 * 3.99 / 8), (8, 0.8), (11, 0.8)],
)
def test_the_probability_follows_the_ends(epoch, expected):
    history = [{"epoch": 4, ENDED: "joint"}, {"epoch": 8, ENDED: "transition"}]
    ends = PhaseEnds.of(SECTION, history)
    assert ends == PhaseEnds(4, 8, 17)
    assert ends.probability(SECTION, epoch) == pytest.approx(expected)


def test_without_early_ends_the_probability_is_the_section_s():
    ends = PhaseEnds.of(SECTION)
    for epoch in range(26):
        assert ends.probability(SECTION, epoch) == SECTION.probability(epoch)


def with_auto(recipe, **values):
    values = {"phases": "auto", "joint": 5, "transition": 5, "refinement": 5, **values}
    return dataclasses.replace(recipe, schedule=dataclasses.replace(recipe.schedule, **values))


def test_a_run_ends_its_phases_and_a_resumed_one_equals_it(folders, tmp_path, monkeypatch):
    logging = LoggingSection(samples_every=8)
    recipe = dataclasses.replace(with_auto(tiny_recipe(folders)), logging=logging)
    original = VARTask.held_out_losses

    def flat(self, *arguments):
        losses = original(self, *arguments)
        return {name: 2.0 if "/" not in name else loss for name, loss in losses.items()}

    monkeypatch.setattr(VARTask, "held_out_losses", flat)
    trained_vae(recipe, tmp_path / "whole")
    console = quiet()
    summary = train_var(recipe, tmp_path / "whole", console=console, device=CPU)
    assert (summary.epochs, summary.steps) == (12, 24)
    printed = console.file.getvalue()
    found = re.findall(r"the (\w+) phase ends with epoch (\d+), because", printed)
    assert found == [("joint", "4"), ("transition", "8"), ("refinement", "12")]
    entries = metrics(tmp_path / "whole")
    assert {e[ENDED]: e["epoch"] for e in entries if ENDED in e} == {
        "joint": 4, "transition": 8, "refinement": 12,
    }  # fmt: skip

    pictures = sorted(path.name for path in (tmp_path / "whole").glob("var-*.png"))
    assert pictures == ["var-samples-0008.png", "var-samples-0012.png"]  # 12 is the last epoch

    # Stopped within the transition, after the joint phase has ended early.
    trained_vae(recipe, tmp_path / "parted")
    run_until(recipe, tmp_path / "parted", monkeypatch, train_var, VARTask, step=10)
    assert resume(recipe, tmp_path / "parted", train_var).epochs == 12
    states = [
        torch.load(tmp_path / part / "var-last.pt", weights_only=True)
        for part in ("whole", "parted")
    ]
    for name, weight in states[0]["module"].items():
        assert torch.equal(weight, states[1]["module"][name]), name
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parted")
    # A finished run has nothing left to do.
    assert resume(recipe, tmp_path / "parted", train_var).steps == 24


def test_the_steps_after_an_early_end_are_those_of_the_next_phase(recipe):
    configurations = Configurations(with_auto(recipe), 100)
    configurations.observe([{"epoch": 2, ENDED: "joint"}])
    for step in range(200, 700):
        expected = choose_depth(0, step, 0.2 + 0.8 * (step / 100 - 2) / 5, (2,))
        name = configurations.of_step(step).name
        assert name == ("full" if expected is None else "2"), step


def test_the_rule_and_the_phases_of_a_run_that_has_begun_stay(recipe):
    auto = with_auto(recipe)
    planned = with_auto(recipe, phases="planned")
    with pytest.raises(UserError, match=r"schedule.phases 'planned' -> 'auto'"):
        compare_recipes(planned, auto, "var", "FILE")
    longer = with_auto(recipe, joint=6)
    compare_schedules(auto, longer, "var", 0, 100, "FILE")
    with pytest.raises(UserError, match=r"FILE: has completed 1 epoch with schedule.joint 5"):
        compare_schedules(auto, longer, "var", 100, 100, "FILE")
    compare_schedules(auto, with_auto(recipe, refinement=9), "var", 300, 100, "FILE")
