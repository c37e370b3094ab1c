"""``variant warm``: on a CPU nothing to do; elsewhere every shape is run with timing allowed."""

import itertools
import json

import pytest
import torch

from variant.cli import warm as module
from variant.engine.engine import Engine
from variant_kernels import tuning_switch


@pytest.fixture
def steps(monkeypatch):
    """The generations of the command on a device that needs warming; those of 9 do not fit."""
    seen, generate = [], Engine.generate_with

    def noted(self, labels, sampling, **options):
        allowed = tuning_switch.may_time()
        seen.append((options["depth"], len(labels), sampling.top_p, allowed, self.capture))
        if len(labels) == 9:
            raise MemoryError
        return generate(self, labels, sampling, **options)

    monkeypatch.setattr(module, "needs_warming", lambda device: True)
    monkeypatch.setattr(Engine, "generate_with", noted)
    monkeypatch.delenv("VARIANT_TUNE", raising=False)
    return seen


def test_on_a_cpu_there_is_nothing_to_do(run, model):
    code, printed, _ = run("warm", "--model", model, "--device", "cpu")
    assert code == 0
    assert printed.splitlines()[-1].startswith("warm: nothing to do on cpu: its kernels are")


def test_every_depth_and_batch_is_run_with_timing_allowed(run, model, steps):
    code, printed, _ = run("warm", "--model", model, "--device", "cpu", "--batch", 2, 1)
    assert code == 0
    expected = itertools.product((4, 3, 2), (1, 2), (0.96, 0), (True,), (False,))
    assert steps == list(expected)
    assert not tuning_switch.may_time()
    lines = printed.splitlines()[1:]
    assert len(lines) == 7
    assert lines[1].startswith("warm: depth 4, batch 2: ")
    assert lines[5].endswith("; 6 of 6, about 0:00:00 left")


def test_a_batch_that_does_not_fit_is_passed_over(run, model, steps):
    words = (
        "--device",
        "cpu",
        "--batch",
        9,
        1,
        "--depths",
        2,
        "--json",
        "-",
        "--dtype",
        "bfloat16",
    )
    code, printed, _ = run("warm", "--model", model, *words)
    assert code == 0
    result = json.loads(printed)
    assert [(s["depth"], s["batch"], s["fits"]) for s in result["steps"]] == [
        (2, 1, True),
        (2, 9, False),
    ]
    assert result["dtype"] == "bfloat16"


def test_ctrl_c_says_how_to_go_on(run, model, steps, monkeypatch):
    step = module._step

    def interrupted(engine, depth, batch):
        if depth == 3:
            raise KeyboardInterrupt
        return step(engine, depth, batch)

    monkeypatch.setattr(module, "_step", interrupted)
    code, _, error = run("warm", "--model", model, "--device", "cpu")
    assert code == 130
    assert "variant: stopped. 1 of 3 steps done; the same command" in error
    assert not tuning_switch.may_time()


def test_wrong_options_are_refused_before_the_work(run, model, steps):
    for words in (("--batch", 0), ("--depths", 7), ("--backend", "fast"), ("--device", "gpu")):
        code, _, error = run("warm", "--model", model, "--device", "cpu", *words)
        assert code in (1, 2), words
        assert error.count("\n") == 1
    assert steps == []
    if not torch.cuda.is_available():
        assert run("warm", "--model", model)[0] == 1  # its default device is a GPU
