"""Means of measured values; norms of groups of layers; the file of steps."""

import json
import os
import signal

import pytest
import torch

from variant.training.gradient_norms import GradientNorms
from variant.training.meters import Meters
from variant.training.steps_file import StepsFile

CPU = torch.device("cpu")


def test_means_are_weighted_and_rows_are_numbered():
    meters = Meters(CPU)
    meters.add("loss/full", torch.tensor(1.0, requires_grad=True))
    meters.add("loss/full", 4.0, weight=2)
    meters.add("by_scale/", torch.tensor([1.0, 5.0]))
    meters.add("by_scale/", torch.tensor([3.0, 7.0]))
    assert meters.means() == {"loss/full": 3.0, "by_scale/0": 2.0, "by_scale/1": 6.0}
    assert meters.means() == {}
    meters.add("loss/full", 2.0)
    assert meters.means() == {"loss/full": 2.0}


def test_a_value_of_weight_0_does_not_count_and_a_key_of_no_weight_is_left_out():
    meters = Meters(CPU)
    meters.add("a", torch.tensor(3.0), torch.tensor(1.0))
    meters.add("a", torch.tensor(0.0), torch.tensor(0.0))
    meters.add("b", torch.tensor(0.0), torch.tensor(0.0))
    assert meters.means() == {"a": 3.0}


def test_a_histogram_is_read_as_share_used_and_perplexity():
    meters = Meters(CPU)
    meters.add("codes#2", torch.tensor([3, 0, 1, 0]))
    meters.add("codes#2", torch.tensor([1, 0, 3, 0]))
    meters.add("codes#3", torch.tensor([0, 0, 0, 0]))  # nothing was counted
    assert meters.means() == pytest.approx({"codes_used/2": 0.5, "codes_perplexity/2": 2.0})


def test_totals_continue_bit_by_bit():
    values = torch.rand(7, generator=torch.Generator().manual_seed(0)).tolist()
    whole, first = Meters(CPU), Meters(CPU)
    for value in values:
        whole.add("a", value)
    for value in values[:4]:
        first.add("a", value)
    second = Meters(CPU)
    second.load(json.loads(json.dumps(first.totals())))
    for value in values[4:]:
        second.add("a", value)
    assert second.means() == whole.means()


def test_means_are_those_of_all_processes():
    meters = Meters(CPU)
    meters.add("a", 2.0)
    meters.add("row/", torch.tensor([1.0, 2.0]))

    def with_the_other_process(own):  # whose sums and weights are a 6 of 3, row (2, 3) of 1
        return [mine + its for mine, its in zip(own, [6.0, 3.0, 2.0, 3.0, 1.0], strict=True)]

    assert meters.means(with_the_other_process) == {"a": 2.0, "row/0": 1.5, "row/1": 2.5}


def test_a_group_s_norm_is_that_of_one_layer():
    layers = [torch.nn.Linear(3, 2) for _ in range(3)]
    norms = GradientNorms({"one": layers[:1], "two": layers[1:], "none": []})
    assert {k: v.item() for k, v in norms.measure().items()} == {"one": 0.0, "two": 0.0}
    for layer in layers[:2]:
        layer(torch.ones(4, 3)).sum().backward()  # 4 in each of 8 places
    assert norms.measure()["one"].item() == pytest.approx(4 * 8**0.5)
    assert norms.measure()["two"].item() == pytest.approx(4 * 8**0.5 / 2**0.5)


def test_the_file_of_steps_drops_what_a_resumed_run_repeats(tmp_path):
    file = StepsFile(tmp_path, "var")
    file.keep_until(5)
    assert not file.path.exists()
    for step in (2, 4, 6):
        file.append({"step": step, "loss/full": 0.5})
    with file.path.open("a") as text:
        text.write('{"step": 8, "lo')
    file.keep_until(4)
    file.append({"step": 5})
    lines = [json.loads(line) for line in file.path.read_text().splitlines()]
    assert lines == [{"step": 2, "loss/full": 0.5}, {"step": 4, "loss/full": 0.5}, {"step": 5}]
    file.keep_until(0)
    assert not file.path.exists()


@pytest.mark.parametrize(
    "damage", ["\n", "[]\n", "4\n", '{"step": "x"}\n', '{"step": true}\n', "\0"]
)
def test_damaged_lines_are_dropped(tmp_path, damage):
    file = StepsFile(tmp_path, "var")
    file.path.write_text('{"step": 1}\n' + damage)
    file.keep_until(9)
    assert file.path.read_text() == '{"step": 1}\n'


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path):
    file = StepsFile(tmp_path, "var")
    file.path.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        file.append({"step": 1})


def test_a_named_pipe_of_the_files_name_is_not_waited_for(tmp_path):
    file = StepsFile(tmp_path, "var")
    os.mkfifo(file.path)
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waited for a reader"))
    signal.alarm(10)
    try:
        file.keep_until(0)
        with pytest.raises(OSError, match=r"var-steps\.jsonl"):
            file.append({"step": 1})
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
