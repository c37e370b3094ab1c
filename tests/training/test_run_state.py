"""The state of a run, and the metrics file that lists its epochs."""

import json
import math

import pytest
import torch

from variant.training.metrics import MetricsFile
from variant.training.run_state import RunState, best_of


def state_with(history=()):
    module = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(module.parameters())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return RunState(module, optimizer, scaler, history=list(history))


def test_losses_are_averaged_by_name():
    state = state_with()
    for name, loss in (("full", 1.0), ("2", 5.0), ("full", 2.0)):
        state.add_loss(name, loss)
    assert state.mean_losses() == {"2": 5.0, "full": 1.5}


def test_the_best_epoch_is_the_first_of_the_lowest_held_out_loss():
    losses = (3.0, None, 2.0, 2.0)
    history = [
        {"epoch": epoch} if loss is None else {"epoch": epoch, "held_out_mean": loss}
        for epoch, loss in enumerate(losses, 1)
    ]
    assert state_with(history).best_entry() == {"epoch": 3, "held_out_mean": 2.0}
    assert state_with([{"epoch": 1}]).best_entry() is None


def test_the_metrics_file_holds_the_history_and_the_epochs_after_it(tmp_path):
    metrics = MetricsFile(tmp_path, "var")
    metrics.path.write_text('{"epoch": 1}\n{"epoch": 2}\n{"epo')
    metrics.rewrite([{"epoch": 1}])
    metrics.append({"epoch": 2, "train": {"full": 0.5}})
    lines = (tmp_path / "var-metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"epoch": 1},
        {"epoch": 2, "train": {"full": 0.5}},
    ]


def test_a_loss_that_diverged_is_text_that_every_reader_of_json_takes(tmp_path):
    metrics = MetricsFile(tmp_path, "var")
    entry = {"epoch": 1, "train": {"full": math.nan}, "by_scale": [math.inf, -math.inf, 0.5]}
    metrics.rewrite([entry])
    metrics.append(entry)
    for line in metrics.path.read_text().splitlines():
        read = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert read["train"] == {"full": "NaN"}
        assert [float(x) for x in read["by_scale"]] == entry["by_scale"]


def test_a_new_run_has_no_metrics_file_before_its_first_epoch_ends(tmp_path):
    metrics = MetricsFile(tmp_path, "vae")
    metrics.rewrite([])
    assert not metrics.path.exists()
    metrics.path.write_text("of a run that was killed")
    metrics.rewrite([])
    assert not metrics.path.exists()
    metrics.append({"epoch": 1})
    assert metrics.path.read_text() == '{"epoch": 1}\n'


@pytest.mark.parametrize("average", [0.5, 2.0])
def test_an_adversarial_epoch_keeps_its_average_whatever_its_held_out_loss(average):
    entry = {"held_out_mean": 1.0, "ema_held_out_mean": average}
    assert best_of(entry) == (min(1.0, average), average < 1.0)
    assert best_of(entry | {"adversarial": True}) == (average, True)
    assert best_of({"held_out_mean": 1.0, "adversarial": True}) == (1.0, False)
