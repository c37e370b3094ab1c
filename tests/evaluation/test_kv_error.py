"""What 8-bit K/V change: measured, printed, and kept beside the results that it comes from."""

import json
import re
from pathlib import Path

import pytest
import torch
from golden_models import NAMES, golden_models
from small_models import small_model

from benchmarks import golden_weights, kv8
from variant.cli.kv_error_table import FIGURES
from variant.cli.main import main
from variant.engine.engine import Engine
from variant.evaluation.kv_error import STEPS_PER_DEPTH, greedy_change, measure_kv_error
from variant_kernels.dispatch.request import dtype_name

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def run(capsys, *words):
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_change_is_what_the_two_engines_say():
    model = small_model()
    engine = Engine(model.var, model.vae)
    done = []
    (found,) = measure_kv_error(engine, images=2, depths=(2,), tick=done.append)
    assert len(done) == STEPS_PER_DEPTH
    other = Engine(model.var, model.vae, kv_dtype="fp8")
    labels = torch.tensor([0, 1])
    tokens = engine.generate(labels, depth=2, seed=0, top_p=0.96).tokens
    exact, changed = (e.forced_logits(labels, tokens, depth=2).double() for e in (engine, other))
    spread = exact.std()
    assert found.largest == pytest.approx(((changed - exact).abs().max() / spread).item(), rel=1e-4)
    assert found.rms == pytest.approx(
        ((changed - exact).square().mean().sqrt() / spread).item(), rel=1e-4
    )
    assert 0 < found.rms < found.largest < 1
    moved = (exact.argmax(-1) != changed.argmax(-1)).double().mean().item()
    assert found.top_changed == pytest.approx(moved)
    greedy = [e.generate(labels, depth=2, cfg=4.0, top_k=1, seed=0).tokens for e in (engine, other)]
    assert found.greedy_changed == pytest.approx((greedy[0] != greedy[1]).double().mean().item())


def test_the_first_scale_that_changes_is_found(monkeypatch):
    model = small_model()
    engine = Engine(model.var, model.vae)
    generate = engine.generate

    def changed(*arguments, **options):
        made = generate(*arguments, **{**options, "kv_dtype": None})
        if options["kv_dtype"] is not None:
            made.tokens[1, 3] = (made.tokens[1, 3] + 1) % 24  # scale 1 has tokens 1..4
            made.tokens[1, 9] = (made.tokens[1, 9] + 1) % 24
        return made

    monkeypatch.setattr(engine, "generate", changed)
    assert greedy_change(engine, torch.arange(2), depth=4) == (2 / 28, 1, 1)


def test_an_engine_of_8_bits_has_nothing_to_compare_with():
    model = small_model()
    with pytest.raises(ValueError, match="must keep exact K/V"):
        measure_kv_error(Engine(model.var, model.vae, kv_dtype="fp8"))
    with pytest.raises(ValueError, match="images must be at least 1; got 0"):
        measure_kv_error(Engine(model.var, model.vae), images=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_measured_golden_models_are_the_golden_models(name):
    _, *ours = golden_models(name)
    for module, theirs in zip(ours, golden_weights.golden_model(name), strict=True):
        state = theirs.state_dict()
        assert module.config == theirs.config
        assert state.keys() == module.state_dict().keys()
        assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())


def test_the_packages_figures_are_those_of_the_committed_result():
    (path,) = RESULTS.glob("kv8-error-*.json")
    result = json.loads(path.read_text())
    assert json.loads(FIGURES.read_text()) == kv8.figures(result)
    assert result["environment"]["dirty"] is False


@pytest.mark.parametrize("name", ["digits", "golden no_l2norm"])
def test_measuring_again_gives_the_packages_figures(name):
    figures = json.loads(FIGURES.read_text())["rows"]
    for dtype, found in kv8.measure(*kv8.models()[name]).items():
        known = [
            row for row in figures if row["model"] == name and row["dtype"] == dtype_name(dtype)
        ]
        assert [row["depth"] for row in known] == [row.depth for row in found]
        for ours, theirs in zip(found, known, strict=True):
            # Backends round differently, and a drawn token may then be another: the sizes stay.
            assert ours.rms == pytest.approx(theirs["rms"], rel=0.1)
            assert ours.largest == pytest.approx(theirs["largest"], rel=0.3)
            assert ours.logits_std == pytest.approx(theirs["logits_std"], rel=0.02)
            assert ours.top_changed == pytest.approx(theirs["top_changed"], abs=0.01)


def test_info_measures_a_model_on_request(tmp_path, capsys):
    small_model().save_pretrained(tmp_path)
    code, printed, _ = run(capsys, "info", "--model", tmp_path, "--kv-dtype", "fp8", "--images", 2)
    assert code == 0
    rows = re.findall(r"│\s+(\d)\s+│\s+([\d.e-]+)\s+│\s+([\d.e-]+)\s+│", printed)
    assert [row[0] for row in rows] == ["4", "3", "2"]
    assert all(float(largest) > float(rms) > 0 for _, largest, rms in rows)
    assert "float32, 2 images" in printed
    code, printed, _ = run(capsys, "info", "--model", tmp_path)
    assert "8-bit" not in printed
    code, _, error = run(capsys, "info", "--model", tmp_path, "--images", 0)
    assert (code, "--images must be at least 1; got 0" in error) == (1, True)


def test_plan_prints_what_8_bits_save_and_what_they_change(capsys):
    code, printed, _ = run(capsys, "plan", "--model", "var-d30", "--kv-dtype", "fp8")
    assert code == 0
    lines = [line for line in printed.splitlines() if "MiB │" in line]
    numbers = [re.findall(r"[\d,.]+", line) for line in lines]
    # 65 bytes a token and head in place of 128.
    assert [[n[0], n[3], n[4]] for n in numbers] == [
        ["30", "12,390", "6,292"],
        ["16", "6,720", "3,412"],
        ["8", "3,480", "1,767"],
        ["4", "1,860", "945"],
        ["2", "1,860", "945"],
    ]
    assert "measured: python -m benchmarks.kv8" in printed
    assert len(re.findall(r"golden \w+", printed)) >= 6
    code, printed, _ = run(
        capsys, "plan", "--model", "var-d30", "--kv-dtype", "fp8", "--memory", 12
    )
    assert re.search(r"│\s+30 │.*│\s+yes │", printed)


def test_generate_paints_with_8_bits_and_says_so(tmp_path, capsys):
    small_model().save_pretrained(tmp_path / "model")
    code, printed, _ = run(
        capsys, "generate", "--model", tmp_path / "model", "--labels", 1, "--kv-dtype", "fp8",
        "--out", tmp_path / "a.png",
    )  # fmt: skip
    assert code == 0
    assert "K/V float8_e4m3fn" in printed
