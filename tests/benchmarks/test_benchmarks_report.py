"""Result files: the page with its pictures, and the comparison, which uses ratios only."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_models import small_model

from benchmarks import compare, plots, report
from benchmarks.report import duration
from benchmarks.results import DROPIN, ENGINE, KERNELS, read, read_all
from variant.bench.engine_bench import BenchConfig, measure
from variant.bench.environment import environment
from variant.errors import UserError
from variant_kernels.products import has_products

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
LIMITS = {"gemm": {"float32": 1e11, "bfloat16": 4e11}, "copy": 3e10}
SLOW_LIMITS = {"gemm": {"float32": 5e9}, "copy": 1e9}
STEADY = {"start": LIMITS, "end": LIMITS, "drift": {"copy": 1.0, "gemm float32": 0.9}}


def case(op, name, ratios, peer, **others):
    """One case whose peer takes a millisecond; ratios: of each implementation to the peer."""
    return {
        "op": op, "case": name, "device": "cpu", "isa": "avx512", "dtype": "float32",
        "flop": 2e6, "bytes": 1e5, "bound": "compute", "limit_seconds": 2e-5, "peer": peer,
        "implementations": {
            name: {
                "ours": name == "cpu", "rounds": 20, "iterations": 1, "median": 1e-3 / ratio,
                "quartiles": [0.9e-3 / ratio, 1.1e-3 / ratio], "ratio_to_peer": ratio,
                "ratio_quartiles": [ratio * 0.95, ratio * 1.05],
            }
            for name, ratio in ratios.items()
        },
        **others,
    }  # fmt: skip


def kernels():
    cases = [
        case(
            "paged_attention",
            f"layout256-scale{scale}-rows2-float32",
            {"cpu": 2.0, "reference": 0.1, "sdpa": 1.0},
            "sdpa",
        )
        for scale in (0, 1, 2)
    ]
    large = {"cpu": 3.0, "eager": 1.0}
    cases.append(case("adaln_modulate", "d16-large", large, "eager", flop=0, bound="memory"))
    return {
        "format": KERNELS,
        "quick": False,
        "environment": environment(["pytest", "benchmarks"]),
        "limits": {"cpu": STEADY},
        "cases": cases,
    }


@pytest.fixture(scope="module")
def engine():
    model = small_model()
    return {
        "format": ENGINE,
        "model": "small",
        "weights": "random",
        "bridge": 1,
        "sampling": {"cfg": 1.5, "top_k": 9, "top_p": 0.96},
        "environment": environment(["variant", "bench"]),
        "limits": STEADY,
        "memory": [
            {"who": "ours float32", "depth": 4, "batch": 1, "loaded": 3e8, "peak": 4e8},
            {"who": "plain loop float32", "depth": 4, "batch": 1, "loaded": 3e8, "peak": 5e8},
        ],
        **measure(
            model.var,
            model.vae,
            BenchConfig(1, torch.float32, (4, 2), runs=2, top_k=9, decoder=True, kv_dtype="fp8"),
        ),
    }


def test_a_page_says_how_many_runs_there_were_and_nothing_twice(engine):
    page = "\n".join(report.PARTS[ENGINE](engine))
    assert "medians of 2 interleaved runs." in page
    once = copy.deepcopy(engine)
    difference = {"what": "theirs against ours", "largest": 0.02, "mean": 0.003, "spread": 1.2}
    once["logits"] = [difference, difference]
    for row in once["rows"]:
        row["ms"]["rounds"] = 1
        row["ms"]["quartiles"] = [12.25, 12.25]
    page = "\n".join(report.PARTS[ENGINE](once))
    assert "; one run of each, without a spread." in page
    assert "12.2 to 12.2" not in page
    assert page.count("theirs against ours") == 1


def write(path, data):
    path.write_text(json.dumps(data))
    return str(path)


# --- the verdict --------------------------------------------------------------------------------


def test_a_slower_machine_is_no_regression_and_a_lower_ratio_is(tmp_path, capsys):
    old, new = kernels(), kernels()
    for one in new["cases"]:
        for timing in one["implementations"].values():
            timing["median"] *= 7
    paths = write(tmp_path / "old.json", old), write(tmp_path / "new.json", new)
    assert compare.main(list(paths)) == 0
    assert "4 ratios compared, tolerance 10%: 0 slower, 0 faster" in capsys.readouterr().out
    new["cases"][0]["implementations"]["cpu"]["ratio_to_peer"] = 1.7
    new["cases"][1]["implementations"]["cpu"]["ratio_to_peer"] = 2.5
    write(tmp_path / "new.json", new)
    assert compare.main(list(paths)) == 1
    printed = capsys.readouterr().out
    assert (
        "slower: paged_attention, cpu, layout256-scale0-rows2-float32: cpu against sdpa: "
        "2.00 -> 1.70 (-15%)" in printed
    )
    assert "1 slower, 1 faster, 0 missing" in printed
    assert compare.main([*paths, "--tolerance", "0.2"]) == 0


def test_a_missing_case_is_reported(tmp_path, capsys):
    old, new = kernels(), kernels()
    del new["cases"][0]
    paths = [write(tmp_path / "old.json", old), write(tmp_path / "new.json", new)]
    assert compare.main(paths) == 1
    assert "missing: paged_attention, cpu, layout256-scale0" in capsys.readouterr().out
    assert compare.main([*paths, "--partial"]) == 0
    assert "missing: paged_attention, cpu, layout256-scale0" in capsys.readouterr().out
    assert compare.main(paths[::-1]) == 0, "a new case is none that is missing"


def test_another_machine_is_named(tmp_path, capsys):
    old, new = kernels(), kernels()
    new["environment"]["isa"] = "another"
    paths = [write(tmp_path / "old.json", old), write(tmp_path / "new.json", new)]
    assert compare.main(paths) == 0
    isa = old["environment"]["isa"]
    assert f"not the same machine: isa: {isa} / another" in capsys.readouterr().out


def test_engine_results_are_compared_by_peer_and_by_own_full_depth(tmp_path, engine, capsys):
    new = copy.deepcopy(engine)
    shallow = new["rows"][1]
    shallow["speed_up"] *= 0.5
    paths = [write(tmp_path / "old.json", engine), write(tmp_path / "new.json", new)]
    assert compare.main(paths) == 1
    printed = capsys.readouterr().out
    assert "slower: small, batch 1, float32, depth 2: over own full depth" in printed
    # Each peer at two depths and of the decoder, and one shallow depth.
    peers = 1 + has_products("cpu", torch.bfloat16)  # autocast, where it is no emulation
    assert f"{3 * peers + 1} ratios compared" in printed


def test_a_run_in_parts_is_one_result(tmp_path, engine):
    folder = tmp_path / "parts"
    folder.mkdir()
    whole = kernels()
    parts = [{**whole, "cases": whole["cases"][a:b]} for a, b in ((0, 1), (1, 4))]
    for index, part in enumerate(parts):
        write(folder / f"{index}.json", part)
    assert compare.main([write(tmp_path / "whole.json", whole), str(folder)]) == 0
    assert len(read_all(folder)) == 2


def test_what_is_no_result_is_refused(tmp_path, engine, capsys):
    foreign, empty = write(tmp_path / "foreign.json", {"format": "other"}), tmp_path / "empty"
    empty.mkdir()
    good = write(tmp_path / "good.json", kernels())
    other = write(tmp_path / "engine.json", engine)
    for words, message in (
        ([foreign, good], "must be a result of one of `pytest benchmarks --json`"),
        ([str(tmp_path / "none.json"), good], "cannot be read as JSON"),
        ([str(empty), good], "holds no .json file"),
        ([good, good, "--tolerance", "1.5"], r"--tolerance must be in [0, 1); got 1.5"),
        ([good, other], "the two results have no case in common"),
    ):
        assert compare.main(words) == 1
        assert message in capsys.readouterr().err
    write(tmp_path / "list.json", [1])
    with pytest.raises(UserError, match="got None"):
        read(tmp_path / "list.json")


# --- the page -----------------------------------------------------------------------------------


def test_the_page_shows_both_kinds_with_their_pictures(tmp_path, engine, capsys):
    out = tmp_path / "page"
    words = [write(tmp_path / "kernels.json", kernels()), write(tmp_path / "engine.json", engine)]
    assert report.main([*words, "--out", str(out)]) == 0
    assert f"wrote {out}/report.md" in capsys.readouterr().out
    text = (out / "report.md").read_text()
    pictures = re.findall(r"!\[.+\]\((.+)\)", text)
    assert pictures == [
        "kernels-cpu-attention.png", "kernels-cpu-roofline.png", "kernels-cpu-bandwidth.png",
        "engine-latency.png", "engine-memory.png", "engine-scales.png",
    ]  # fmt: skip
    for name in pictures:
        width, height = Image.open(out / name).size
        assert width > 600
        assert height > 300
    assert "| d16-large | cpu | 333 us | 1.00 ms | 3.00 |" in text
    assert "reference 10.0 ms" in text
    assert "### float32, batch 1" in text
    assert "MiB (equal)" in text
    assert "Depth 4 with 8-bit K/V: " in text
    assert "Depth 2 with 8-bit K/V: " in text
    assert "variant bench`" in text  # after variables of the environment, if any are set
    columns = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert min(columns) > 4


@pytest.fixture
def axes(monkeypatch):
    """axes(plot, result): the visible axes of a figure that ``plot`` would save."""
    saved = []
    monkeypatch.setattr(plots, "save", lambda figure, path: saved.append(figure) or path)

    def draw(plot, result):
        with plots.plt.rc_context(plots.STYLE):
            if plot(result, "cpu", Path("unused.png")) is None:
                return []
        figure = saved.pop()
        figure.canvas.draw()
        plots.plt.close(figure)
        return [axis for axis in figure.axes if axis.get_visible()]

    return draw


def test_scales_have_integer_ticks_and_a_single_scale_has_no_panel(axes):
    result = kernels()
    alone = "layout256-kv8-scale9-rows2-float32"
    result["cases"].append(case("paged_attention", alone, {"cpu": 2.0, "sdpa": 1.0}, "sdpa"))
    (panel,) = axes(plots.attention_by_scale, result)
    assert panel.get_title("left") == "256 pixels, 2 rows, float32"
    assert all(tick == int(tick) for tick in panel.get_xticks())
    assert axes(plots.attention_by_scale, {**result, "cases": result["cases"][-1:]}) == []


def test_a_roofline_labels_several_rates(axes):
    # Ours twice as fast as the peer: less than a factor of 10 on the axis.
    (panel,) = axes(plots.roofline, {**kernels(), "limits": {"cpu": {"start": SLOW_LIMITS}}})
    low, high = panel.get_ylim()
    labelled = [tick for tick in panel.get_yticks() if low <= tick <= high]
    assert len(labelled) >= 3


def test_every_committed_result_is_shown(tmp_path, capsys, monkeypatch):
    # Every figure is made; to write them all takes ten times as long.
    monkeypatch.setattr(plots, "save", lambda figure, path: plots.plt.close(figure) or path)
    results = Path(report.__file__).parent / "results"
    assert report.main([str(results), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    for path in results.glob("*.json"):
        assert path.stem in text, path.name


def test_a_run_that_was_stopped_still_makes_a_page(tmp_path, engine):
    stopped = {**engine, "limits": {"start": LIMITS}, "memory": [], "decoder": []}
    path = write(tmp_path / "stopped.json", stopped)
    assert report.main([path, "--out", str(tmp_path / "page")]) == 0
    assert "the run was stopped before its end" in (tmp_path / "page" / "report.md").read_text()


def test_a_page_of_nothing_is_refused(tmp_path, capsys):
    assert report.main(["--out", str(tmp_path)]) == 1
    assert "report: error: name at least one result file" in capsys.readouterr().err


def test_durations_have_three_digits():
    assert [duration(x) for x in (1.5, 0.25, 12.3e-3, 4.5e-6, 0.01e-6)] == [
        "1.50 s", "250 ms", "12.3 ms", "4.50 us", "0.01 us",
    ]  # fmt: skip


def test_drop_in_and_training_files_are_shown_and_compared(tmp_path, capsys):
    from benchmarks.training_step import main as train

    steps = tmp_path / "steps.json"
    small = ["--model", "digits", "--batch", "1", "--device", "cpu", "--dtype", "float32"]
    small += ["--depths", "8", "2", "--bridge", "4", "--runs", "2"]
    assert train([*small, "--json", str(steps)]) == 0
    implementations = {
        name: {"median": seconds, "quartiles": [seconds, seconds],
               "ratio_to_original": 2.0 / seconds, "ratio_quartiles": [0.5, 4.0],
               "peak_mib": 1.0, "note": ""}
        for name, seconds in {"original": 2.0, "patch": 1.0}.items()
    }  # fmt: skip
    dropin = write(
        tmp_path / "dropin.json",
        {
            "format": DROPIN,
            "environment": environment(),
            "family": "var",
            "size": "small",
            "results": [
                {"dtype": "float32", "rounds": 2, "keep_copies": False,
                 "implementations": implementations,
                 "depth": {"depth": 2, "gained": 1.5, "ceiling": 2.0}}
            ],
        },
    )  # fmt: skip
    assert report.main([str(steps), dropin, "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "One optimiser step of digits" in text
    assert "`patch` at depth 2 is 1.50 times as fast as at full depth; its products with" in text
    assert "weights are 2.00 times fewer FLOP." in text
    (kv8,) = RESULTS.glob("kv8-error-*.json")
    assert report.main([str(kv8), "--out", str(tmp_path / "kv8")]) == 0
    page = (tmp_path / "kv8" / "report.md").read_text()
    assert "The error of 8-bit K/V" in page
    assert page.count("| digits |") == 6
    capsys.readouterr()
    assert compare.main([dropin, dropin]) == 0
    assert compare.main([str(steps), str(steps)]) == 0
    assert capsys.readouterr().out.count("1 ratios compared") == 2
