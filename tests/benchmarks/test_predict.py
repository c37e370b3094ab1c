"""The model behind the predictions: calibration, counts, and the fit to a run.

The run in these tests is SYNTHETIC: the model itself wrote it, with other constants. No number in
it was measured.
"""

import json
import math
from dataclasses import replace

import pytest

from benchmarks import predict
from benchmarks.results import RUN
from variant.models.flops import ceiling
from variant.models.presets import PAPER_BRIDGE, PATCH_NUMS_256, VAR_PRESETS

COMMITTED = predict.constants()
# Instructions of a tile as this project's forward kernel once had them, of the same class as the
# published one below: wgmma, cp.async, no overlap of products and softmax.
KERNEL = predict.Kernel("", "forward", 64, 128, 64, 8, 308, 446, 2, ahead=True, wgmma=True)


def test_calibrated_on_a_published_figure():
    """Triton's attention, head width 64, no mask, 16,384 tokens, H100: 403 TFLOP/s.

    Source: the figures beside FlashAttention-3 (arXiv 2407.08608).
    """
    pairs = 16384 // 64
    seconds = KERNEL.seconds(COMMITTED, [(pairs, 0)] * 128, copies=16)
    flops = 4 * 64 * 16384**2 * 16 / seconds
    assert flops == pytest.approx(403e12, rel=0.15)


def test_programs_run_in_rounds():
    assert predict.rounds([10.0], 132, 1) == 10
    assert predict.rounds([10.0], 133, 1) == 20
    # Two on a processor take turns: no faster, but a third round is saved.
    assert predict.rounds([10.0], 264, 2) == 20
    assert predict.rounds([10.0], 265, 2) == 40
    # Few programs have their processors for themselves.
    assert predict.rounds([10.0], 100, 2) == 10
    # The next program starts where one has ended.
    assert predict.rounds([30.0, *[10.0] * 262], 1, 1) == 30
    # Many rounds are not followed one by one; nothing is lost on the way.
    assert predict.rounds([10.0], 132 * 1000, 1) == pytest.approx(10_000)


def test_waiting_for_what_was_just_asked_for_costs_time():
    late = replace(KERNEL, ahead=False)
    extra = late.tile_cycles(COMMITTED, masked=False) - KERNEL.tile_cycles(COMMITTED, masked=False)
    assert extra == COMMITTED.exposed_cycles / 2
    alone = replace(late, programs=1)
    assert alone.tile_cycles(COMMITTED, masked=True) > late.tile_cycles(COMMITTED, masked=True)


def test_a_product_is_bound_by_its_weights_or_by_its_work():
    few = predict.gemm_seconds(COMMITTED, 2, 1920, 7680)
    weights = 2 * 1920 * 7680 / (COMMITTED.gemm_share * COMMITTED.copy_bytes)
    assert few == pytest.approx(COMMITTED.kernel_seconds + weights, rel=0.05)
    many = predict.gemm_seconds(COMMITTED, 32768, 1920, 7680)
    assert 1.0 <= many * COMMITTED.matrix_flops / (2 * 32768 * 1920 * 7680) < 1.1
    rows = [predict.gemm_seconds(COMMITTED, m, 1920, 1920) for m in (2, 64, 512, 4096, 32768)]
    assert rows == sorted(rows)


def test_every_attention_kernel_of_the_table_is_read():
    found = predict.kernels()
    assert {kernel.kind for kernel in found} == set(predict.PRODUCTS)
    assert {kernel.width for kernel in found} == {64, 128}
    for kernel in found:
        assert 0 < kernel.full <= kernel.masked
        assert kernel.programs >= 1


def test_attention_counts_visible_pairs():
    lengths = tuple(n * n for n in PATCH_NUMS_256)
    seconds = predict.block_causal_seconds(COMMITTED, "forward", lengths, 64, 64 * 30)
    pairs = sum(n * sum(lengths[: i + 1]) for i, n in enumerate(lengths))
    flops = predict.block_causal_flops(COMMITTED, "forward", PATCH_NUMS_256, 64, 64 * 30)
    assert flops == pytest.approx(4 * 64 * pairs * 64 * 30 / seconds)
    # No more than the tensor cores can do.
    assert flops < 2 * predict.FMA * predict.PROCESSORS * COMMITTED.clock_hz


def test_a_generation_takes_no_less_than_its_roofline():
    config = VAR_PRESETS[predict.MODEL]
    full = predict.generation(COMMITTED, 64, 30)
    for depth in (16, 8, 4, 2):
        part = predict.generation(COMMITTED, 64, depth)
        assert part.tokens < full.tokens
        schedule = predict.schedule_of(config, depth, PAPER_BRIDGE)
        # Attention and the last scales shrink less than linear work in no case, by more in none.
        assert full.tokens / part.tokens < 1.1 * ceiling(config, schedule)
    one = predict.generation(COMMITTED, 1, 30)
    assert one.tokens < full.tokens < 64 * one.tokens
    assert one.images > one.tokens


def test_every_case_says_that_it_is_not_yet_measured():
    found = predict.cases(COMMITTED)
    assert len({case.name for case in found}) == len(found)
    assert all(case.cells()[3] == "not yet measured" for case in found)
    assert all(math.isfinite(case.predicted) and case.predicted > 0 for case in found)
    text = predict.text(found)
    assert text.splitlines()[0].split() == ["what", "target", "predicted", "measured"]


# --- a SYNTHETIC run ------------------------------------------------------------------------------


def synthetic_run(c):
    """What a run on a GPU would hold if it took exactly as long as the model with ``c`` says."""
    config = VAR_PRESETS[predict.MODEL]
    attention = {case.name: case.predicted * 1e12 for case in predict._attention_cases(c)}
    kernels = []
    for length, _, batch, direction, _ in predict._ATTENTION_TARGETS:
        if direction == "backward":
            continue
        stem = f"L{length}-batch{batch}-heads30-head_dim64-bfloat16"
        forward, backward = (
            predict._attention_flop(name) / attention[name]
            for name in (predict._attention_name(length, d) for d in ("forward", "backward"))
        )
        kernels += [(f"{stem}-forward", forward), (f"{stem}-forward+backward", forward + backward)]
    paged = predict._attention_flop(predict.PAGED) / attention[predict.PAGED]
    kernels.append(("layout256-scale9-rows128-heads30-bfloat16", paged))
    rows, images = [], []
    for batch in (1, 64):
        full = predict.generation(c, batch, 30)
        for depth in (30, 16, 8, 4, 2):
            part = predict.generation(c, batch, depth)
            rows.append({
                "batch": batch, "depth": depth, "ms": {"median": 1e3 * part.tokens / batch},
                "gemms_ms": {"median": 1e3 * part.gemms / batch},
                "speed_up": full.tokens / part.tokens,
                "ceiling": ceiling(config, predict.schedule_of(config, depth, PAPER_BRIDGE)),
            })  # fmt: skip
        images.append({"batch": batch, "depth": 30, "ms": {"median": 1e3 * full.images / batch}})
    results = [
        {"kind": "kernel", "data": {"case": name, "implementations": {"triton": {"median": s}}}}
        for name, s in kernels
    ]
    results += [
        {"kind": "engine", "data": {"rows": rows}},
        {"kind": "engine", "data": {"images": images}},
        {"kind": "tests", "data": {"passed": 1}},
    ]
    limits = {"start": {"gemm": {"bfloat16": c.matrix_flops}, "copy": c.copy_bytes}}
    return {"format": RUN, "SYNTHETIC": True, "complete": True, "limits": limits,
            "steps": [], "results": results}  # fmt: skip


OTHER = replace(
    COMMITTED,
    overlap=1.1,
    program_cycles=2000.0,
    matrix_flops=700e12,
    copy_bytes=4.0e12,
    gemm_share=0.7,
    row_share=0.8,
    row_seconds=4e-6,
)


@pytest.fixture(scope="module")
def run():
    return synthetic_run(OTHER)


@pytest.fixture(scope="module")
def fitted(run):
    return predict.fit(COMMITTED, run, "fitted to a SYNTHETIC run")


def test_measurements_stand_beside_predictions(run):
    for mine, theirs in zip(predict.cases(COMMITTED, run), predict.cases(OTHER), strict=True):
        assert mine.measured == pytest.approx(theirs.predicted, rel=1e-6), mine.name
        assert mine.cells()[3] != "not yet measured"


def test_a_fit_finds_the_constants_of_the_run(fitted):
    assert fitted.overlap == pytest.approx(OTHER.overlap, rel=0.02)
    assert fitted.program_cycles == OTHER.program_cycles
    assert fitted.copy_bytes == OTHER.copy_bytes
    assert fitted.matrix_flops == pytest.approx(OTHER.matrix_flops, rel=0.02)
    for name in ("gemm_share", "row_share", "row_seconds"):
        assert getattr(fitted, name) == pytest.approx(getattr(OTHER, name), rel=0.15), name


def test_a_fitted_model_predicts_the_run(run, fitted):
    for case in predict.cases(fitted, run):
        assert case.predicted == pytest.approx(case.measured, rel=0.05), case.name


def test_an_empty_run_leaves_the_constants_as_they_are():
    empty = {"format": RUN, "results": []}
    assert predict.fit(COMMITTED, empty, COMMITTED.source) == COMMITTED
    assert predict.measured(empty) == {}


def test_the_command_writes_the_fitted_constants(run, tmp_path, capsys):
    path, out = tmp_path / "run.json", tmp_path / "constants.json"
    path.write_text(json.dumps(run))
    assert predict.main(["--fit", str(path), "--out", str(out)]) == 0
    assert "fitted to run.json" in capsys.readouterr().out
    assert predict.constants(out).source == "fitted to run.json"
    other = next(predict.ROOT.glob("benchmarks/results/kernels-adaln*.json"))
    assert predict.main(["--run", str(other)]) == 1
    assert "must be a run on a GPU" in capsys.readouterr().err
