"""The error of 8-bit K/V: its measurement, the printed tables, the figures in the package."""

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
from variant_kernels.products import product_dtype

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def run(capsys, *words):
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_error_is_the_difference_of_two_engines():
    model = small_model()
    engine = Engine(model.var, model.vae)
    done = []
    (error,) = measure_kv_error(engine, images=2, depths=(2,), on_step=done.append)
    assert len(done) == STEPS_PER_DEPTH
    other = Engine(model.var, model.vae, kv_dtype="fp8")
    labels = torch.tensor([0, 1])
    tokens = engine.generate(labels, depth=2, seed=0, top_p=0.96).tokens
    exact, changed = (e.forced_logits(labels, tokens, depth=2).double() for e in (engine, other))
    spread = exact.std()
    assert error.largest == pytest.approx(((changed - exact).abs().max() / spread).item(), rel=1e-4)
    assert error.rms == pytest.approx(
        ((changed - exact).square().mean().sqrt() / spread).item(), rel=1e-4
    )
    assert 0 < error.rms < error.largest < 1
    moved = (exact.argmax(-1) != changed.argmax(-1)).double().mean().item()
    assert error.top_changed == pytest.approx(moved)
    greedy = [e.generate(labels, depth=2, cfg=4.0, top_k=1, seed=0).tokens for e in (engine, other)]
    assert error.greedy_changed == pytest.approx((greedy[0] != greedy[1]).double().mean().item())


def test_the_first_scale_that_changes_is_found(monkeypatch):
    model = small_model()
    engine = Engine(model.var, model.vae)
    generate = engine.generate

    def changed(*arguments, **options):
        result = generate(*arguments, **{**options, "kv_dtype": None})
        if options["kv_dtype"] is not None:
            result.tokens[1, 3] = (result.tokens[1, 3] + 1) % 24  # scale 1 has tokens 1..4
            result.tokens[1, 9] = (result.tokens[1, 9] + 1) % 24
        return result

    monkeypatch.setattr(engine, "generate", changed)
    assert greedy_change(engine, torch.arange(2), depth=4) == (2 / 28, 1, 1)


def test_equally_likely_tokens_are_no_change():
    model = small_model()
    with torch.no_grad():  # every logit is 0: a greedy token is drawn among all
        model.var.head.weight.zero_()
        model.var.head.bias.zero_()
    assert greedy_change(Engine(model.var, model.vae), torch.arange(2), depth=4) == (0, 0, None)


def test_an_engine_with_8_bit_kv_is_refused():
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


def test_the_figures_in_the_package_are_those_of_the_committed_result():
    (path,) = RESULTS.glob("kv8-error-*.json")
    result = json.loads(path.read_text())
    assert json.loads(FIGURES.read_text()) == kv8.figures(result)
    assert result["environment"]["dirty"] is False


@pytest.mark.parametrize("name", ["digits", "golden no_l2norm"])
def test_measuring_again_gives_the_figures_in_the_package(name):
    figures = json.loads(FIGURES.read_text())["rows"]
    for dtype, errors in kv8.measure(*kv8.models()[name]).items():
        # Where 16-bit products are emulated, an engine computes, and errs, as one of float32.
        computed = dtype_name(product_dtype("cpu", dtype))
        packaged = [row for row in figures if (row["model"], row["dtype"]) == (name, computed)]
        assert [row["depth"] for row in packaged] == [error.depth for error in errors]
        for ours, theirs in zip(errors, packaged, strict=True):
            # Backends round differently, and may then sample other tokens: only sizes are compared.
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
    assert (code, "--images must be an integer in [1, 1024]; got 0" in error) == (1, True)


def test_plan_prints_the_memory_and_the_error_of_8_bits(capsys):
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


def test_generate_with_8_bits_prints_the_dtype_of_kv(tmp_path, capsys):
    small_model().save_pretrained(tmp_path / "model")
    code, printed, _ = run(
        capsys, "generate", "--model", tmp_path / "model", "--labels", 1, "--kv-dtype", "fp8",
        "--out", tmp_path / "a.png",
    )  # fmt: skip
    assert code == 0
    assert "K/V float8_e4m3fn" in printed
