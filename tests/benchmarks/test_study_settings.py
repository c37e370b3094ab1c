"""The study's parts: metrics, schedules without a cache, work of a run, settings, tasks."""

import dataclasses

import numpy as np
import pytest
import torch

from benchmarks.study import scheduler
from benchmarks.study.__main__ import main
from benchmarks.study.collect import made_on
from benchmarks.study.metrics import distances, flagged, halves
from benchmarks.study.schedules import (
    falling_schedule,
    layer_tokens,
    layers_of,
    masked_losses,
    masked_tokens,
    token_losses,
)
from benchmarks.study.settings import SMOKE, load_study, merged
from benchmarks.study.speed import Speed
from benchmarks.study.stages import training
from benchmarks.study.tasks import Task, tasks_of
from benchmarks.study.work import Work, choose_epochs, phase_epochs, step_flop
from variant.engine.engine import Engine
from variant.errors import UserError
from variant.models.config import VARConfig, VQVAEConfig
from variant.models.flops import training_flop
from variant.models.var import VAR
from variant.models.vqvae import VQVAE
from variant.models.zones import reset_zone_weights
from variant_kernels import DepthSchedule

CONFIG = VARConfig(
    depth=8, embed_dim=32, num_heads=2, num_classes=3, patch_nums=(1, 2, 3), vocab_size=8,
    vae_channels=4, subnets={4: (0, 2, 5, 7), 2: (0, 7)}, bridge=1,
)  # fmt: skip


def test_metrics_of_images_see_wrong_classes():
    generator = torch.Generator().manual_seed(0)
    label_N = torch.arange(400) % 4
    sets = [torch.randn(400, 5, generator=generator) + 3 * label_N[:, None] for _ in range(2)]
    right = distances(sets[0], label_N, sets[1], label_N, 4)
    wrong = distances(sets[0], (label_N + 1) % 4, sets[1], label_N, 4)
    assert wrong["fashion_fd_without_classes"] == right["fashion_fd_without_classes"]
    assert wrong["fashion_fd"] > 20 * right["fashion_fd"]
    assert right["precision"] > 0.8 > 0.1 > wrong["precision"]
    row = {"losses": {}, "generated": {"full": {**right, "accuracy": 0.9, "floor": 0.1}}}
    broken = {"losses": {}, "generated": {"full": {**wrong, "accuracy": 0.1, "floor": 0.1}}}
    assert all(flagged(broken, row).values())
    assert not any(flagged(row, row).values())


def test_halves_are_disjoint_and_alike():
    labels = np.arange(200) % 10
    first, second = halves(labels, 50)
    assert len(first) == len(second) == 50
    assert not set(first) & set(second)
    assert (np.bincount(labels[first]) == 5).all()
    assert (np.bincount(labels[second]) == 5).all()


def test_names_of_schedules():
    full = tuple(range(8))
    assert layers_of(CONFIG, "full", 1) == (full,) * 3
    assert layers_of(CONFIG, "d2", 1) == (full, (0, 7), (0, 7))
    assert layers_of(CONFIG, "d4@b2", 1) == (full, full, (0, 2, 5, 7))
    assert layers_of(CONFIG, "d2@middle", 1) == (full, (0, 7), full)
    assert layer_tokens(CONFIG, layers_of(CONFIG, "d2@middle", 1)) == 8 + 2 * 4 + 8 * 9


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    var = VAR(CONFIG)
    for weight in var.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    reset_zone_weights(var)
    return var.eval()


@pytest.mark.parametrize("name", ["full", "d2", "d4@b2", "d2@b0", "d2@all"])
def test_the_masked_forward_pass_is_that_of_the_model(model, name):
    labels, x_teacher = torch.tensor([0, 2]), torch.randn(2, 13, 4)
    targets = torch.randint(0, 8, (2, 14))
    layers = layers_of(CONFIG, name, 1)
    expected = token_losses(model, labels, x_teacher, targets, layers)
    assert falling_schedule(CONFIG, layers) is not None
    masked = masked_losses(model, labels, x_teacher, targets, layers)
    assert torch.allclose(masked, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["full", "d2", "d2@b0"])
def test_tokens_without_a_cache_are_those_of_the_engine(model, name):
    torch.manual_seed(1)
    vae = VQVAE(VQVAEConfig(8, 4, ch=32, ch_mult=(1, 1), num_res_blocks=1, patch_nums=(1, 2, 3)))
    labels = torch.tensor([0, 1, 2, 0])
    expected = Engine(model, vae.eval()).generate(
        labels, depth=None if name == "full" else 2, bridge=0 if name == "d2@b0" else None,
        cfg=1.5, top_p=0.9, seed=3, decode=False,
    )  # fmt: skip
    tokens = masked_tokens(
        model, vae, labels, layers_of(CONFIG, name, 1), cfg=1.5, top_p=0.9, seed=3,
        image_ids_B=torch.arange(4),
    )  # fmt: skip
    assert torch.equal(tokens, expected.tokens)


def test_a_layer_of_some_scales_sees_their_tokens_only(model):
    labels, x_teacher = torch.tensor([1]), torch.randn(1, 13, 4)
    targets = torch.randint(0, 8, (1, 14))
    early = token_losses(model, labels, x_teacher, targets, layers_of(CONFIG, "d2@early", 1))
    full = token_losses(model, labels, x_teacher, targets, layers_of(CONFIG, "full", 1))
    assert not torch.allclose(early[:, 0], full[:, 0])
    assert not torch.allclose(early[:, 5:], full[:, 5:])  # keys of the first scale are missing
    late = token_losses(model, labels, x_teacher, targets, layers_of(CONFIG, "d2@late", 1))
    assert torch.allclose(late[:, :5], full[:, :5], atol=1e-5)
    assert not torch.allclose(late[:, 5:], full[:, 5:])


def test_runs_of_equal_work_have_different_numbers_of_steps():
    study = load_study()
    steps = {}
    for name in ("p0", "p0.5", "progressive", "teacher-frozen"):
        run = study.find(name, 0)
        values = {**run.recipe, "model": {"weights": "of the base"}, "seed": 0}
        recipe, total = choose_epochs(values, study.recipe_of, run.phases, 10, 60)
        assert total == pytest.approx(60, abs=5)
        steps[name] = 10 * recipe.schedule.phase_lengths.total
        counted = [Work(recipe, 10).of_step(step) for step in range(steps[name])]
        assert sum(counted) == pytest.approx(total)
    assert steps["p0"] == 60 < steps["p0.5"] < steps["progressive"]
    assert steps["teacher-frozen"] < steps["progressive"]


@pytest.mark.parametrize("kind", ["copies", "lora", "adaln"])
def test_frozen_layers_count_for_the_passes_that_they_have(kind):
    rank = 3 * (kind == "lora")
    config = dataclasses.replace(
        CONFIG, subnets={2: (0, 7)}, zone_weights=kind, lora_rank=rank, zone_adaln=kind != "lora"
    )
    # Tokens 1, 4, 9; width 32: a layer has 12 * 32^2 weights; the head has 32 * 8.
    layer, head, word = 2 * 12 * 32**2, 2 * 32 * 8, 2 * 4 * 32
    bridge = 8 * layer * 1
    flexible = 2 * layer * 13 * (3 if kind == "copies" else 2)
    attention = 4 * 32 * (8 * 1 * 1 + 3 * 2 * (4 * 5 + 9 * 14))
    low_rank = 3 * 2 * 2 * 13 * rank * (32 + 96 + 32 + 32 + 2 * (32 + 128))
    once = 2 * 32 * 192 * (8 + 3 * 2 * (kind != "lora")) + 2 * 32 * 64  # adaLN, norm of the head
    expected = bridge + flexible + attention + low_rank + once + 2 * head * 14 + word * 13
    assert step_flop(config, DepthSchedule(8, 3, (0, 7), 1)) == pytest.approx(expected)
    shared = dataclasses.replace(CONFIG, subnets={2: (0, 7)})
    schedule = DepthSchedule(8, 3, (0, 7), 1)
    assert step_flop(shared, schedule) == training_flop(shared, schedule) > expected


@pytest.mark.nightly
def test_every_run_of_the_study_has_a_length():
    study = load_study(None, ())
    trained = [run for run in study.runs() if run.trains and run.seed == 0 and run.name != "base"]
    assert {"teacher-frozen", "copies", "lora4", "adaln"} <= {run.name for run in trained}
    for run in trained:
        assert min(training.training_length(study, run).values()) >= 0


def test_what_every_verdict_needs_comes_first(tmp_path):
    """No metric decides a verdict before it has told the control from the model it is made of."""
    speed = Speed(**{each.name: 1.0 for each in dataclasses.fields(Speed)})
    names = [task.name for task in tasks_of(load_study(None, ()), tmp_path, speed)]
    for seed in range(3):
        for name in ("base", "labels-permuted"):
            assert names.index(f"{name}/seed{seed}") < names.index("p0/seed0")


def test_phases_are_whole_epochs_in_proportion():
    assert phase_epochs((5, 15, 15), 70) == {"joint": 10, "transition": 30, "refinement": 30}
    assert sum(phase_epochs((5, 15, 12), 17).values()) == 17
    assert phase_epochs((1, 0, 0), 9) == {"joint": 9, "transition": 0, "refinement": 0}


def test_the_time_left_does_not_take_the_rest_of_a_resumed_task_for_its_whole(
    tmp_path, monkeypatch
):
    """A task of an hour that was resumed in its last minute, and one that takes twice its time."""
    clock, lines = [0.0], []
    taken = {"resumed": 60.0, "slow": 7200.0, "last": 3600.0}

    class Process:
        pid = 0

        def __init__(self, words):
            clock[0] += taken[words[0]]

        def poll(self):
            return 0

    tasks = [Task(name, (), lambda report: None, lambda: False, 3595.0) for name in taken]
    monkeypatch.setattr(scheduler, "_start", lambda words, log: Process(words))
    monkeypatch.setattr(scheduler.time, "monotonic", lambda: clock[0])
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "resumed.txt").write_text("began before")
    scheduler.run_tasks(tasks, lambda task: [task.name], tmp_path, 1, lines.append)
    done = [line for line in lines if "done (" in line]
    assert "resumed: done (1 of 3 tasks; 3.0 core hours planned, 2.0 left, about 120" in done[0]
    assert "slow: done (2 of 3 tasks; 3.0 core hours planned, 2.0 left, about 120" in done[1]
    assert "0.0 left, about 0 minutes" in done[2]


def test_settings_are_read_and_checked():
    study = load_study()
    assert {"zones", "training-free", "bridges", "ratios", "extras", "augmentation", "kv8"} < {
        part.name for part in study.parts
    }
    names = [(run.name, run.seed) for run in study.runs()]
    assert len(names) == len(set(names))
    assert names.index(("base", 2)) < names.index(("p0", 0)) < names.index(("bridge0", 0))
    only = load_study(only=("kv8",))
    assert {run.name for run in only.runs()} == {"base", "several", "kv8"}
    with pytest.raises(UserError, match="there is no nonsense"):
        load_study(only=("nonsense",))
    assert load_study(SMOKE).recipe["data"] == {"kind": "digits"}
    assert merged({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}) == {"a": {"b": 3, "c": 2}}


def test_an_unknown_name_is_one_line(tmp_path, capsys):
    assert main(["run", "--out", str(tmp_path), "--only", "p7"]) == 1
    assert capsys.readouterr().err.startswith("error: study: there is no p7")


def test_a_study_that_is_stopped_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmarks.study.__main__._run", stopped)
    assert main(["run", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "study: stopped; the same command continues\n"


def test_a_file_names_every_machine_of_its_rows():
    """Rows that were kept from an earlier file may have been made on another one."""
    one = {"cpu": "A", "isa": "avx2", "python": "3.11", "torch": "2.13"}
    other = {**one, "cpu": "B", "torch": "2.12"}
    found = made_on([{"made": one}, {"made": other}, {"made": one}])
    assert found["machine"] == "A (avx2) and B (avx2), one thread per run"
    assert found["versions"] == {"python": "3.11", "torch": "2.13 and 2.12"}
    assert made_on([{"made": one}])["machine"] == "A (avx2), one thread per run"
