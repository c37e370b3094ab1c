"""The model behind the predictions: calibration, counts, and the fit to a run.

The run in these tests is SYNTHETIC: the model itself wrote it, with other constants. No number in
it was measured.
"""

import json
import math
from dataclasses import replace

import pytest

from benchmarks import predict
from benchmarks.docs_results import _predictions
from benchmarks.prediction import attention, generation, peers, sampling, times, training
from benchmarks.prediction.fit import fit
from benchmarks.results import RUN, Result
from tests.machine_code import table
from variant.engine.planning import schedule_of
from variant.models.flops import ceiling, training_flop
from variant.models.presets import PAPER_BRIDGE, PATCH_NUMS_256, VAR_PRESETS
from variant_kernels import DepthSchedule

COMMITTED = predict.constants()
# Instructions of a tile as this project's forward kernel once had them, of the same class as the
# published one below: wgmma, cp.async, no overlap of products and softmax.
KERNEL = attention.Kernel("", "forward", 64, 128, 64, 8, 308, 446, 2, ahead=True, wgmma=True)


def test_calibrated_on_a_published_figure():
    """Triton's attention, head width 64, no mask, 16,384 tokens, H100: 403 TFLOP/s.

    Source: the figures beside FlashAttention-3 (arXiv 2407.08608).
    """
    pairs = 16384 // 64
    seconds = KERNEL.seconds(COMMITTED, [(pairs, 0)] * 128, copies=16)
    flops = 4 * 64 * 16384**2 * 16 / seconds
    assert flops == pytest.approx(403e12, rel=0.15)


def test_programs_run_in_rounds():
    assert attention.rounds([10.0], 132, 1) == 10
    assert attention.rounds([10.0], 133, 1) == 20
    # Two on a processor take turns: no faster, but a third round is saved.
    assert attention.rounds([10.0], 264, 2) == 20
    assert attention.rounds([10.0], 265, 2) == 40
    # Few programs have their processors for themselves.
    assert attention.rounds([10.0], 100, 2) == 10
    # The next program starts where one has ended.
    assert attention.rounds([30.0, *[10.0] * 262], 1, 1) == 30
    # Many rounds are not followed one by one; nothing is lost on the way.
    assert attention.rounds([10.0], 132 * 1000, 1) == pytest.approx(10_000)
    # Equal programs need no queue.
    for programs, copies, resident in ((3, 50, 1), (7, 100, 2), (5, 4000, 3)):
        cycles = [10.0] * programs
        nearly = [10.0 + 1e-9, *cycles[1:]]
        expected = attention.rounds(nearly, copies, resident)
        assert attention.rounds(cycles, copies, resident) == pytest.approx(expected)


def test_waiting_for_what_was_just_asked_for_costs_time():
    late = replace(KERNEL, ahead=False)
    extra = late.tile_cycles(COMMITTED, masked=False) - KERNEL.tile_cycles(COMMITTED, masked=False)
    assert extra == COMMITTED.exposed_cycles / 2
    alone = replace(late, programs=1)
    assert alone.tile_cycles(COMMITTED, masked=True) > late.tile_cycles(COMMITTED, masked=True)


def test_a_product_is_bound_by_its_weights_or_by_its_work():
    few = generation.gemm_seconds(COMMITTED, 2, 1920, 7680)
    weights = 2 * 1920 * 7680 / (COMMITTED.gemm_share * COMMITTED.copy_bytes)
    assert few == pytest.approx(COMMITTED.kernel_seconds + weights, rel=0.05)
    many = generation.gemm_seconds(COMMITTED, 32768, 1920, 7680)
    assert 1.0 <= many * COMMITTED.matrix_flops / (2 * 32768 * 1920 * 7680) < 1.1
    rows = [generation.gemm_seconds(COMMITTED, m, 1920, 1920) for m in (2, 64, 512, 4096, 32768)]
    assert rows == sorted(rows)


def test_every_attention_kernel_of_the_table_is_read():
    found = attention.kernels()
    assert {kernel.kind for kernel in found} == set(attention.PRODUCTS)
    assert {kernel.width for kernel in found} == {64, 128}
    for kernel in found:
        assert 0 < kernel.full <= kernel.masked
        assert kernel.programs >= 1


def test_attention_counts_visible_pairs():
    lengths = tuple(n * n for n in PATCH_NUMS_256)
    seconds = attention.block_causal_seconds(COMMITTED, "forward", lengths, 64, 64 * 30)
    pairs = sum(n * sum(lengths[: i + 1]) for i, n in enumerate(lengths))
    flops = times.attention_flop("680", "forward") / seconds
    assert flops == pytest.approx(4 * 64 * pairs * 64 * 30 / seconds)
    # No more than the tensor cores can do.
    assert flops < 2 * attention.FMA * attention.PROCESSORS * COMMITTED.clock_hz


def test_peers_are_calibrated_on_published_figures():
    """FlexAttention, head width 128, and FlashAttention-3, head width 64, on an H100.

    Sources: pytorch/benchmark pull request 2443; arXiv 2407.08608.
    """
    assert pytest.approx(408 / 477, abs=0.01) == COMMITTED.flex_share
    rate = attention.PROCESSORS * COMMITTED.clock_hz
    tile = 128 * 128 * 4 * 64
    long = [128 * peers.FLASH_PAIR["forward"] + peers.FLASH_PROGRAM] * 128
    assert tile * 128 * 128 / sum(long) * rate == pytest.approx(497e12, rel=0.05)
    whole = 8 * peers.FLASH_PAIR["backward"] + peers.FLASH_PROGRAM
    assert 2.5 * tile * 8 / whole * rate == pytest.approx(363e12, rel=0.02)
    causal = sum(range(1, 9)) * peers.FLASH_PAIR["forward"] + 8 * peers.FLASH_PROGRAM
    assert 4 * 64 * 1024 * 1025 / 2 / causal * rate == pytest.approx(265e12, rel=0.12)


@pytest.mark.parametrize("lengths", [[n * n for n in PATCH_NUMS_256], [1, 4, 123, 128, 256]])
@pytest.mark.parametrize(("kind", "block_q", "block_k"), [
    ("forward", 128, 128), ("dq", 128, 64), ("dkv", 64, 128), ("dkv", 64, 64),
])  # fmt: skip
def test_flex_attention_visits_every_block_with_a_visible_pair(lengths, kind, block_q, block_k):
    ends = [sum(lengths[: i + 1]) for i, n in enumerate(lengths) for _ in range(n)]
    blocks = range(-(-len(ends) // 128))
    seen = whole = 0
    for q in blocks:
        for k in blocks:
            pairs = sum(max(0, min(end, 128 * (k + 1)) - 128 * k) for end in ends[128 * q :][:128])
            seen += pairs > 0
            whole += pairs == 128 * 128
    tiles = peers._even_tiles(lengths, kind, block_q=block_q, block_k=block_k)
    parts = 128 // block_q * (128 // block_k)
    assert sum(pairs for pairs, _ in tiles) == seen * parts
    assert sum(masked for _, masked in tiles) == (seen - whole) * parts
    outer = block_k if kind == "dkv" else block_q
    assert len(tiles) == len(blocks) * (128 // outer)


def test_sampling_is_no_faster_than_memory_and_grows_with_rows():
    some = [sampling.sampling_seconds(COMMITTED, rows) for rows in (1, 132, 264, 396, 397, 16384)]
    assert some == sorted(some)
    assert some[0] == some[1] < some[2] < some[3] < some[4]
    assert some[-1] > 16384 * 4096 * 4 / COMMITTED.copy_bytes


def test_sampling_is_counted_in_the_machine_code_of_the_table():
    case = "sample_tokens/V 4096, filtered, for a graph, 4 warps, 1 stages"
    figures = table.read("3.6.0")[case]
    assert figures["programs"] == sampling.PROGRAMS
    counted = sampling.STRAIGHT + sampling.PROBE + sampling.TOP_K_SHRINK
    counted += sampling.HALVING + sampling.TOP_P_SHRINK
    # Besides: the branch of equal entries, and what fills up the function's end.
    assert 0.75 * figures["instructions"] < counted < figures["instructions"]


def test_a_training_step_takes_no_less_than_its_products():
    config = VAR_PRESETS[generation.MODEL]
    full = DepthSchedule.full(config.depth, config.layout.num_scales)
    roof = training_flop(config, full, 16) / COMMITTED.matrix_flops
    ours = training.training_seconds(COMMITTED, 16, 30)
    original = training.original_training_seconds(COMMITTED, 16)
    assert roof < ours < original
    assert training.training_seconds(COMMITTED, 16, 16) < ours


def test_a_generation_takes_no_less_than_its_roofline():
    config = VAR_PRESETS[generation.MODEL]
    full = generation.generation(COMMITTED, 64, 30)
    for depth in (16, 8, 4, 2):
        part = generation.generation(COMMITTED, 64, depth)
        assert part.tokens < full.tokens
        schedule = schedule_of(config, depth, PAPER_BRIDGE)
        # Attention and the last scales shrink less than linear work in no case, by more in none.
        assert full.tokens / part.tokens < 1.1 * ceiling(config, schedule)
    one = generation.generation(COMMITTED, 1, 30)
    assert one.tokens < full.tokens < 64 * one.tokens
    assert one.images > one.tokens


# Targets that the model has no part for, and what the synthetic run has of them.
MEASURED_ALONE = {
    "batch 64, a change of depth": 0.25,
    "batch 64, K/V bytes, over those of the plan": 1.125,
    "paged attention, last scale, batch 64, as fast as FlashInfer": 1.5,
}


def test_every_case_says_that_it_is_not_yet_measured():
    found = predict.cases(COMMITTED)
    assert len({case.name for case in found}) == len(found)
    assert all(case.cells()[3] == "not yet measured" for case in found)
    modelled = [case for case in found if case.name not in MEASURED_ALONE]
    assert all(math.isfinite(case.predicted) and case.predicted > 0 for case in modelled)
    others = [case for case in found if case.name in MEASURED_ALONE]
    assert [case.cells()[2] for case in others] == ["not modelled"] * len(MEASURED_ALONE)
    text = predict.text(found)
    assert text.splitlines()[0].split() == ["what", "target", "predicted", "measured"]


def test_a_predicted_miss_has_a_limit_and_what_is_met_has_none():
    found = {c.name: c for c in predict.cases(COMMITTED)}
    missed = {
        name for name, c in found.items()
        if c.predicted is not None and c.quantity.missed_by(c.predicted)
    }  # fmt: skip
    assert missed == predict.limits(COMMITTED).keys()
    lines = predict.misses(COMMITTED)
    assert len(lines) == len(missed)
    for line in lines:
        sentences = line.split(". ")
        assert all(one[0].isupper() or one[0].isdigit() for one in sentences[1:]), line


@pytest.mark.parametrize(("target", "met", "missed"), [
    ("at most 13 ms", 13.0, 13.1), ("at most 1.25 times", 1.25, 1.26),
    ("at least 90 %", 90.0, 89.0), ("faster", 1.01, 1.0),
])  # fmt: skip
def test_a_target_is_met_or_missed(target, met, missed):
    digits = 2 if "times" in target or target == "faster" else 1
    quantity = predict.Quantity("", target, "", lambda times: 0.0, digits)
    assert not quantity.missed_by(met)
    assert quantity.missed_by(missed)
    assert not predict.Quantity("", "", "", lambda times: 0.0).missed_by(1e9)


# --- a SYNTHETIC run ------------------------------------------------------------------------------


def synthetic_run(c):
    """What a run on a GPU would hold if it took exactly as long as the model with ``c`` says."""
    own = times.predicted(c)
    kernels = {}
    for length, (_, batch) in times.ATTENTION.items():
        for direction in times.DIRECTIONS:
            case = f"L{length}-batch{batch}-heads30-head_dim64-bfloat16-{direction}"
            kernels[case] = f"attention {length} {direction} "
    kernels |= {times.PAGED_CASE: "paged ", times.SAMPLING_CASE: "sampling "}
    results = []
    for case, stem in kernels.items():
        timings = {
            name.removeprefix(stem): {"median": seconds}
            for name, seconds in own.items()
            if name.startswith(stem)
        }
        if stem == "paged ":
            timings[times.FLASHINFER] = {"median": 1.5 * timings["triton"]["median"]}
        # The step without compiled peers comes first; the step with them times ours again.
        results += [{"kind": "kernel", "data": {"case": case, "implementations": some}}
                    for some in ({"triton": timings["triton"]}, timings)]  # fmt: skip
    rows, images = [], []
    for batch in times.BATCHES:
        original = {"peer": times.ORIGINAL, "ms": {"median": 1e3 * own["original 64"] / batch}}
        for depth in times.DEPTHS:
            of = f"{batch} {depth}"
            rows.append({
                "batch": batch, "depth": depth,
                "ms": {"median": 1e3 * own[f"generation {of}"] / batch},
                "gemms_ms": {"median": 1e3 * own[f"gemms {of}"] / batch},
                "kv_allocated_bytes": 9 * depth * batch, "kv_planned_bytes": 8 * depth * batch,
                "against": [original],
            })  # fmt: skip
            image = {"median": 1e3 * own[f"images {of}"] / batch}
            images.append({"batch": batch, "depth": depth, "ms": image})
    names = {"training 30": "depth 30", "training 16": "depth 16",
             "training original": times.ORIGINAL_TRAINING}  # fmt: skip
    steps = [{"implementation": to, "median": own[name]} for name, to in names.items()]
    results += [
        {"kind": "engine", "data": {"rows": rows}},
        {"kind": "engine", "data": {"images": images}},
        {"kind": "engine", "data": {"switch": [{"batch": 64, "ms": 0.25}]}},
        {"kind": "training", "data": {"batch": 16, "steps": steps}},
        {"kind": "tests", "data": {"passed": 1}},
    ]
    limits = {"start": {"gemm": {"bfloat16": c.matrix_flops}, "copy": c.copy_bytes}}
    return {"format": RUN, "SYNTHETIC": True, "complete": True, "limits": limits,
            "steps": [], "results": results}  # fmt: skip


SHARES = ("sampling_share", "training_share", "flex_share", "flash_share", "torch_calls_share",
          "original_share", "original_training_share")  # fmt: skip
OTHER = replace(
    COMMITTED,
    overlap=1.1,
    program_cycles=2000.0,
    matrix_flops=700e12,
    copy_bytes=4.0e12,
    gemm_share=0.7,
    row_share=0.8,
    row_seconds=4e-6,
    decoder_image_seconds=2e-3,
    **dict.fromkeys(SHARES, 1.3),
)


@pytest.fixture(scope="module")
def run():
    return synthetic_run(OTHER)


@pytest.fixture(scope="module")
def fitted(run):
    return fit(COMMITTED, run, "fitted to a SYNTHETIC run")


def test_measurements_stand_beside_predictions(run):
    for mine, theirs in zip(predict.cases(COMMITTED, run), predict.cases(OTHER), strict=True):
        expected = MEASURED_ALONE.get(mine.name, theirs.predicted)
        assert mine.measured == pytest.approx(expected, rel=1e-6), mine.name
        assert mine.cells()[3] != "not yet measured"


def test_a_fit_finds_the_constants_of_the_run(fitted):
    assert fitted.overlap == pytest.approx(OTHER.overlap, rel=0.02)
    assert fitted.program_cycles == OTHER.program_cycles
    assert fitted.copy_bytes == OTHER.copy_bytes
    assert fitted.matrix_flops == pytest.approx(OTHER.matrix_flops, rel=0.02)
    for name in ("gemm_share", "row_share", "row_seconds", "decoder_image_seconds", *SHARES):
        assert getattr(fitted, name) == pytest.approx(getattr(OTHER, name), rel=0.15), name


def test_a_fitted_model_predicts_the_run(run, fitted):
    for case in predict.cases(fitted, run):
        if case.name in MEASURED_ALONE:
            continue
        assert case.predicted == pytest.approx(case.measured, rel=0.05), case.name


def test_an_empty_run_leaves_the_constants_as_they_are():
    empty = {"format": RUN, "results": []}
    assert fit(COMMITTED, empty, COMMITTED.source) == COMMITTED
    assert times.measured(empty) == {}


def test_a_run_that_ended_early_fits_what_it_has(run):
    """Only the first steps of a run: no training step, no peers, batch 64 alone."""
    kept = [r for r in run["results"] if r["kind"] == "kernel"][:2]
    rows = {"rows": [{"batch": 64, "depth": 30, "ms": {"median": 7}, "gemms_ms": {"median": 5},
                      "kv_allocated_bytes": 2, "kv_planned_bytes": 2}]}  # fmt: skip
    part = {**run, "results": [*kept, {"kind": "engine", "data": rows}]}
    fitted = fit(COMMITTED, part, "fitted to a SYNTHETIC part of a run")
    assert fitted.original_training_share == COMMITTED.original_training_share
    by_name = {case.name: case for case in predict.cases(fitted, part)}
    case = by_name["batch 64, full depth, over its products alone"]
    assert case.measured == pytest.approx(1.4)
    assert case.predicted == pytest.approx(1.4, rel=0.01)
    assert by_name["batch 1, full depth"].measured is None


def test_the_page_shows_both_side_by_side(run):
    text = "\n".join(_predictions([Result("some-gpu", RUN, run)]))
    rows = [case.cells() for case in predict.cases(COMMITTED, run)]
    for cells in rows:
        assert f"| {' | '.join(cells)} |" in text
        assert predict.NOT_MEASURED not in cells


def test_the_command_writes_the_fitted_constants(run, tmp_path, capsys):
    path, out = tmp_path / "run.json", tmp_path / "constants.json"
    path.write_text(json.dumps(run))
    assert predict.main(["--fit", str(path), "--out", str(out)]) == 0
    assert "fitted to run.json" in capsys.readouterr().out
    assert predict.constants(out).source == "fitted to run.json"
    other = next(predict.ROOT.glob("benchmarks/results/kernels-adaln*.json"))
    assert predict.main(["--run", str(other)]) == 1
    assert "must be a run on a GPU" in capsys.readouterr().err
