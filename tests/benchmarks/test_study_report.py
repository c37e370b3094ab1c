"""The study's page: partial results, the committed page itself, and the README's table."""

import json
import math
import re

import pytest
from PIL import Image
from study_results import control, run, seeds, study_of, write

from benchmarks.study import report, report_plots, report_tables
from benchmarks.study.__main__ import main as study_main
from benchmarks.study.report_claims import CLAIMS, CONTROL, FIXED, SEARCH_BUDGETS
from benchmarks.study.report_data import FASHION_FD, FULL, LOSS, PARTS, Study, read_study
from benchmarks.study.report_readme import quality
from benchmarks.study.report_verdicts import points
from benchmarks.study.settings import load_study
from variant.errors import UserError
from variant.models.config import VARConfig

# --- reading ------------------------------------------------------------------------------------


def test_the_setting_is_that_of_the_files(tmp_path):
    data = {"dataset": "fashion-mnist", "held_out": 10000, "depth": 8, "width": 64,
            "patch_nums": [1, 2, 3], "floor": {"fashion_fd": 0.0123, "precision": 0.9},
            "reconstruction_floor": {"fashion_fd": 0.0456},
            "sampling": {"cfg": 1.5}, "classifier_accuracy": {"features": 0.915, "other": None},
            }  # fmt: skip
    text = report.page(read_study(write(tmp_path / "results", "base", [], data=data)))
    for row in ("against the other) | fashion-FD 0.0456 |",
                "| data | fashion-mnist |", "| held-out images | 10,000 |", "| 8, 64 |",
                "| fashion-FD 0.0123, precision 90.0 % |", "| features 91.5 % |", "| cfg 1.5 |",
                "| 1, 2, 3 |"):  # fmt: skip
        assert row in text
    assert "| setting | value |" not in report.page(Study())


def test_the_page_says_what_equal_work_is(tmp_path):
    runs = [run("p0", seed, loss=1.0, steps=600) for seed in (0, 1)]
    runs += [run("progressive", seed, loss=1.0, steps=1140 + 10 * seed) for seed in (0, 1)]
    text = report.page(study_of(tmp_path, ratios=runs))
    assert "has 600 steps, the progressive schedule has 1,140 to 1,150 steps. The seeds" in text
    assert "its run has more steps. The seeds" in report.page(Study())


def test_files_that_are_no_results_are_refused(tmp_path):
    folder = write(tmp_path / "results", "ratios", seeds("p0", [1.0]) * 2)
    with pytest.raises(UserError, match='"p0" of seed 0 is listed twice'):
        read_study(folder)
    write(folder, "ratios", seeds("p0", [math.nan]))
    with pytest.raises(UserError, match="NaN"):
        read_study(folder)
    write(folder, "ratios", [{"name": "p0"}])
    with pytest.raises(UserError, match='"seed"'):
        read_study(folder)
    write(folder, "ratios", [])
    (folder / "copy.json").write_text((folder / "ratios.json").read_text())
    with pytest.raises(UserError, match="another file"):
        read_study(folder)
    for text in ('{"part": "ratio"}', "[]", "{", '{"part": "ratios"}'):
        (folder / "copy.json").write_text(text)
        with pytest.raises(UserError, match=r"copy\.json"):
            read_study(folder)


# --- the page -----------------------------------------------------------------------------------

NEEDED = sorted(
    {
        (point.run, point.schedule)
        for claim in CLAIMS
        for point in points(claim.statement)
    }
)  # fmt: skip


def whole_study(tmp_path, beat=1.0):
    """Every run that a claim names, three seeds; the fixed ratios are better if ``beat`` is < 1."""
    base = {FULL: 2.0, "d4": 2.5, "d2": 3.0}
    by_run = {}
    for name, schedule in NEEDED:
        by_run.setdefault(name, {FULL: None})[schedule] = None
    runs = []
    for name, schedules in by_run.items():
        for seed in range(3):
            factor = beat if name in FIXED else 1.0
            loss = {s: factor * base.get(s, 2.7) + 0.01 * seed for s in schedules}
            curve = [[s, {FULL: 3 - s / 100, "d2": 4 - s / 100}] for s in (25, 50, 100)]
            cells = {s: {"n": 5000, "fashion_fd": 0.1 * v, "floor": 0.005} for s, v in loss.items()}
            norms = {"shared": 0.2, "full_only": 0.1}
            runs.append(run(name, seed, loss=loss, generated=cells, curve=curve,
                            gradient_norms=norms))  # fmt: skip
    pairs = [{"run": "p0.2", "against": "progressive", "schedule": "d2",
              "by_seed": [0.1, 0.2, 0.3], "se_by_seed": [0.01, 0.02, 0.03]}]  # fmt: skip
    write(tmp_path / "results", "ratios", runs, pairs=pairs)
    return control(tmp_path, [2.0, 2.2, 2.1], [0.2, 0.23, 0.21])


def test_contradictions_are_the_first_lines(tmp_path):
    study = whole_study(tmp_path, beat=0.5)
    first = report.page(study).split("## ")[0]
    assert "**Where the miniature contradicts the paper:**" in first
    text = '"No fixed ratio beats the progressive schedule at both depths"'
    by_loss = (
        "By held-out loss it **does not hold**: of 8 differences, 8 speak against it; 3 seeds."
    )
    assert f"- {text} (Figure 2a, section 3.3.2). {by_loss} By fashion-FD it **does not" in first
    assert first.count(text) == 1
    assert "so far" not in first


def test_without_contradictions_the_first_lines_say_so(tmp_path):
    study = whole_study(tmp_path, beat=2.0)
    first = report.page(study).split("## ")[0]
    assert '"No fixed ratio beats' not in first
    assert " have not run yet." in report.page(Study()).split("## ")[0]
    assert "**No run has decided any claim of the paper so far.**" in report.page(Study())


def test_no_verdict_is_invented_where_nothing_ran(tmp_path):
    for study in (Study(), read_study(tmp_path / "missing")):
        text = report.page(study)
        assert "**holds**" not in text
        assert "**does not hold**" not in text
        assert text.count("Not run yet.") == len(PARTS)
        assert "| It **has not run yet**. |" in text


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_alone_or_empty_makes_a_page(tmp_path, part):
    study = study_of(tmp_path, **{part: []})
    assert report.page(study).count("Not run yet.") == len(PARTS)
    names = ("searched kv=0.5", "grid kv=0.5") if part == "search" else (FULL, "d2")
    study = study_of(
        tmp_path, **{part: [run("p0", 0, loss=dict(zip(names, (2.5, 2.9), strict=True)))]}
    )
    row = "| `p0` | 1 | 600.00 | 60 | 2.5000 | 2.9000 |"
    if part == "search":
        row = "| `p0` | kv=0.5 | 1 | 2.5000 | 2.9000 | - | - | - | - |"
    assert row in report.page(study)


def test_verdicts_are_sentences_and_count_as_such(tmp_path):
    """One difference, several of both kinds, one seed, and the count above them."""
    sentence = r"It \*\*(holds|does not hold|is not resolved|has not run yet)\*\*(: [^|]+)?\."
    page = report.page(whole_study(tmp_path, beat=0.5))
    tables = [part.split("\n\n")[1] for part in page.split("**Verdicts**")[1:]]
    rows = [row for table in tables for row in table.splitlines()[2:]]
    cells = [cell for row in rows for cell in row.strip("| ").split(" | ")[2:] if cell != "-"]
    assert len(cells) == len(CLAIMS)
    for cell in cells:
        assert re.fullmatch(sentence, cell), cell
    first = page.split("## ")[0]
    assert re.search(r"Of these \d+ verdicts, \d+ hold, \d+ do not hold and \d+ are not", first)


def test_a_frozen_full_network_is_named_in_its_rows(tmp_path):
    """In every table: its loss is that of the start, and no merit of the training."""
    own = {"settings": {"schedule": {"zone_weights": "copies"}}}
    shared = {"settings": {"schedule": {"teacher": "frozen"}}}
    runs = [
        run(name, seed, loss=1.0, generated={FULL: {"n": 10, "fashion_fd": 0.1}}, **settings)
        for name, settings in (("copies", own), ("teacher-frozen", shared))
        for seed in (0, 1)
    ]
    pairs = [{"run": "copies", "against": "teacher-frozen", "schedule": FULL, "by_seed": [0.0]}]
    page = report.page(read_study(write(tmp_path / "results", "extras", runs, pairs=pairs)))
    rows = [line for line in page.splitlines() if line.startswith("| `copies`")]
    assert len(rows) == 3
    assert all(row.startswith("| `copies` (full network frozen) |") for row in rows)
    assert "| `copies` (full network frozen) | `teacher-frozen` | full |" in page
    assert "`teacher-frozen` (" not in page
    assert "The full network, frozen in `copies`, is better" in page


def test_numbers_of_fewer_seeds_say_so(tmp_path):
    """Rows, cells and verdicts; a schedule that equals another is no open question."""
    norms = {"gradient_norms": {"shared": 0.2, "full_only": 0.1}}
    runs = [
        *seeds("several", [{FULL: 2.0, "d4": 2.5, "d2": 3.0}, {FULL: 2.1, "d4": 2.7}], **norms),
        run("several", 2, loss={FULL: 2.2, "d4": 2.8}),
        *seeds("several-p0.8", [{FULL: 1.0, "d4": 2.0}, {FULL: 1.1, "d4": 2.2}]),
    ]
    key = "searched kv=0.4", "grid kv=0.4"
    searches = seeds("search-supernet", [dict.fromkeys(key, loss) for loss in (2.0, 2.1)])
    searches += seeds("search-untrained", [dict(zip(key, (2.0, x), strict=True)) for x in (2, 3)])
    del searches[3]["losses"]["grid kv=0.4"]
    control(tmp_path, [3.0, 3.3, 3.1], [0.2, 0.23, 0.21])
    page = report.page(study_of(tmp_path, extras=runs, ratios=runs, search=searches))
    assert (
        "| `several` | 3 | 600.00 | 60 | 2.1000 ± 0.0577 | 2.6667 ± 0.0882 | 3.0000 (1 seed) |"
        in page
    )
    assert "| `several` | 2 | 0.2000 ± 0.0000 |" in page
    assert "| `search-untrained` | kv=0.4 | 2 | 2.0000 ± 0.0000 | 2.0000 (1 seed) |" in page
    assert "d4 is better than with the progressive schedule and both depths" in page
    assert "| It **holds**: -0.5000 ± 0.0000, 2 seeds. |" in page
    beats = "On the trained subnets, at equal K/V bytes the search beats the best of"
    row = next(line for line in page.splitlines() if line.startswith(f"| {beats}"))
    assert row.endswith("| It **has not run yet**. |")
    for share in SEARCH_BUDGETS:
        for one in searches[:2]:
            one["losses"] |= {
                f"{kind} kv={share:g}": {"mean": 2.0} for kind in ("searched", "grid")
            }
    control(tmp_path / "all", [3.0, 3.3, 3.1], [0.2, 0.23, 0.21])
    page = report.page(study_of(tmp_path / "all", search=searches))
    row = next(line for line in page.splitlines() if line.startswith(f"| {beats}"))
    assert row.endswith("of 6 differences, 6 are zero in every seed; 2 seeds. |")


def test_every_table_has_a_name_that_the_page_explains(tmp_path):
    page = report.page(whole_study(tmp_path))
    ours, explained = page.split("| table | what it holds |")[1].split("\n\n", 1)[::-1]
    names = {line.split("*")[1] for line in explained.splitlines()[2:]}
    assert names == set(report_tables.TABLES)
    above = re.findall(r"\n([^\n]*)\n\n\| run \|", ours)
    assert above
    assert {line.strip("*") for line in above} <= names
    used = {
        name for section in report.SECTIONS.values()
        for name in re.findall(r"\*([A-Z][^*]+)\*", section.text)
    }  # fmt: skip
    assert used <= names
    assert used
    with pytest.raises(ValueError, match="named: name must be one of"):
        report_tables.named("Loss", [])


@pytest.mark.parametrize(
    ("alone", "what"),
    [
        (1.2, "the full network is worse than its start (+0.2000 ± 0.0000, 2 seeds)"),
        (0.9, "the full network is better than its start (-0.1000 ± 0.0000, 2 seeds)"),
        (1.0, "differs from its start by less than is resolved (+0.0000 ± 0.0000, 2 seeds)"),
    ],
)
def test_the_page_says_what_training_on_does_to_the_full_network(tmp_path, alone, what):
    """p = 0 is no improvement by itself: the rates of the runs are above the last one of base."""
    base = [run("base", seed, loss=1.0 + 0.5 * seed) for seed in (0, 1)]
    p0 = [run("p0", seed, loss=alone + 0.5 * seed) for seed in (0, 1)]
    broken = [run(CONTROL, seed, loss=3.0 + 0.6 * seed) for seed in (0, 1)]
    page = report.page(study_of(tmp_path, base=base, ratios=p0, control=broken))
    assert what in page
    assert f"Its held-out loss is {alone + 0.25:.4f} ± 0.2500, that of `base` 1.2500" in page
    for parts in ({"ratios": p0}, {"base": base}, {"base": base[:1], "ratios": p0[:1]}):
        name = "".join([*parts, str(len(parts.get("base", ())))])
        assert "The row `p0`" not in report.page(study_of(tmp_path / name, **parts))


def test_what_the_page_says_about_rates_is_true_of_the_settings():
    """Every run that trains the full network on begins above the rate at which base ended."""
    study = load_study()
    base = study.find("base", 0).recipe["optim"]
    last = base["learning_rate"] * base["final_ratio"]
    for own in (own for part in study.parts for own in part.runs if own.trains):
        optim = {**study.recipe["optim"], **own.recipe.get("optim", {})}
        assert own.name == "base" or optim["learning_rate"] > last, own.name


def test_every_claim_is_a_row_and_has_a_section():
    text = report.page(Study())
    assert len({(claim.text, claim.measure) for claim in CLAIMS}) == len(CLAIMS)
    for claim in CLAIMS:
        assert claim.part in report.SECTIONS
        assert f"| {claim.text} | {claim.paper or 'our question'} |" in text
    assert "FID" not in "".join(claim.measure for claim in CLAIMS)


def test_every_number_of_our_tables_comes_from_the_files(tmp_path):
    """Other results, other numbers: none of ours survives on the page of an empty folder."""
    text = report.page(whole_study(tmp_path))
    assert "| `p0.2` | `progressive` | d2 | 3 | +0.2000 ± 0.0577 | 0.0300 |" in text
    assert "0.2000 ± 0.0000" in text  # gradient norms
    empty = set(re.findall(r"\d+\.\d{3,}", report.page(Study())))
    assert not empty


def test_curves_of_seeds_are_joined_by_the_rank_of_their_points(tmp_path):
    """The seeds have 100 and 50 steps."""
    runs = [
        run("p1", 0, loss=1.0, curve=[[50, {FULL: 3.0}], [100, {FULL: 2.0, "d2": 5.0}]]),
        run("p1", 1, loss=1.0, steps=50, curve=[[20, {FULL: 5.0}], [50, {FULL: 3.0}]]),
        run("p0", 0, loss=1.0, curve=[[100, {FULL: 2.0}]]),
        run("p0", 1, loss=1.0, curve=None),
    ]
    curves = report_plots.curves_data(study_of(tmp_path, ratios=runs))
    assert curves == {"p1": {FULL: [[pytest.approx(0.45), 4.0], [1.0, 2.5]]}}


def test_the_pictures_know_what_they_show(tmp_path):
    study = whole_study(tmp_path)
    report_plots.draw_all(study, tmp_path)
    names = [name for name, *_ in report_plots.PLOTS]
    for name in names:
        assert report_plots.is_current(study, tmp_path / name)
        assert f"({name})" in report.page(study)
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 400
    other = whole_study(tmp_path, beat=0.9)
    assert not report_plots.is_current(other, tmp_path / names[0])
    report_plots.draw_all(Study(), tmp_path)  # nothing to show: no picture stays behind
    assert not any((tmp_path / name).exists() for name in names)
    assert "](study-" not in report.page(Study())


def test_the_command_writes_page_and_pictures(tmp_path, capsys):
    whole_study(tmp_path)
    out = tmp_path / "docs" / "study.md"
    words = ["--results", str(tmp_path / "results"), "--out", str(out)]
    assert study_main(["report", *words]) == 0
    assert out.read_text() == report.page(read_study(tmp_path / "results"))
    assert (out.parent / "study-plane.png").exists()
    assert str(out) in capsys.readouterr().out
    (tmp_path / "results" / "base.json").write_text("{")
    assert report.main(words) == 1
    assert "base.json: cannot be read as JSON" in capsys.readouterr().err


def test_the_committed_page_and_pictures_are_what_the_result_files_give():
    study = read_study(report.RESULTS)
    assert report.PAGE.read_text() == report.page(study), "run `make study-report`"
    shown = report_plots.pictures(study)
    for name, *_ in report_plots.PLOTS:
        path = report.PAGE.with_name(name)
        assert path.exists() == (name in shown), "run `make study-report`"
        assert name not in shown or report_plots.is_current(study, path), "run `make study-report`"


def test_the_differences_of_the_result_files_are_those_of_their_losses():
    """So is a difference that was kept from an earlier file; and all are of the same data."""
    study = read_study(report.RESULTS)
    first = study.parts["base"].data
    for key in ("settings", "data"):
        assert all(part.data[key] == first[key] for part in study.parts.values())
    for part in study.parts.values():
        for pair in part.data.get("pairs") or ():
            own = study.runs(pair["run"], part.name)
            against = study.runs(pair["against"], part.name) or study.runs(pair["against"])
            for seed, difference in zip(pair["seeds"], pair["by_seed"], strict=True):
                here, there = (runs[seed].value(LOSS, pair["schedule"]) for runs in (own, against))
                assert difference == pytest.approx(here - there, abs=3e-5), (part.name, pair)


# --- the study's settings and the README --------------------------------------------------------


def test_every_claim_is_about_runs_of_the_settings():
    """A name that no run has would stay "not run yet" for ever."""
    parts = load_study().parts
    for claim in CLAIMS:
        for point in points(claim.statement):
            runs = [
                own
                for part in parts
                for own in part.runs
                if own.name == point.run and point.part in (None, part.name)
            ]
            assert len({own.seed for own in runs}) >= 2, point
            if all(own.search for own in runs):
                assert re.fullmatch(r"(searched|grid|even) (kv|work)=0\.[4-9]", point.schedule)
                continue
            assert all(point.schedule in own.schedules for own in runs), point
            if point.metric is FASHION_FD:
                assert any(point.schedule in own.generate for own in runs), point
            assert point.at is None or any(own.trains for own in runs), point
    assert {part.name for part in parts} == set(PARTS)


def test_what_training_costs_the_full_network_is_judged_at_equal_work():
    """The base has trained less, so that a harm and what further training gains would add up."""
    study = load_study()
    ours = [c for c in CLAIMS if c.part == "training-free" and c.paper]
    paper = [claim for claim in ours if "full network" in claim.text]
    assert paper
    for claim in paper:
        works = [study.find(name, 0).work for name in names_of(claim, study)]
        assert len(set(works)) == 1, claim.text
        assert all(study.find(name, 0).trains for name in names_of(claim, study)), claim.text


def names_of(claim, study):
    """The runs of a claim, each by the name that has its results."""
    same = {run.name: run.same_as for part in study.parts for run in part.runs if run.same_as}
    return [same.get(point.run, point.run) for point in points(claim.statement)]


def optimiser(run):
    return run.recipe.get("optim", {}), run.tokens, run.work


def test_what_is_compared_across_ratios_has_the_same_optimiser():
    """Or the ratio and the learning rate would change together."""
    study = load_study()
    allowed = {"progressive", "progressive-rate0"}  # here the rate itself is the question
    for claim in (claim for claim in CLAIMS if claim.part == "ratios"):
        names = {point.run for point in points(claim.statement)}
        kinds = {json.dumps(optimiser(study.find(name, 0)), sort_keys=True) for name in names}
        assert len(kinds) == 1 or names == allowed, claim.text
    compared = {frozenset(p.run for p in points(c.statement)) for c in CLAIMS}
    for name in ("p0.5-rate0", "p0.8-rate0"):
        assert frozenset((name, "progressive-rate0")) in compared


def supernet(name, seed, loss, depths=(4, 2), **others):
    losses = {FULL: loss, "d4": loss + 0.1, "d2": loss + 0.3}
    cells = {s: {"n": 100, "fashion_fd": 0.2 + v, "floor": 0.05, "seconds": 10 * v}
             for s, v in losses.items()}  # fmt: skip
    settings = {"schedule": {"depths": list(depths)}}
    return run(name, seed, loss=losses, generated=cells, settings=settings, **others)


def test_the_readme_shows_the_best_run_of_all_depths(tmp_path):
    runs = [supernet("several", seed, 2.0 + seed / 10) for seed in (0, 1)]
    runs += [supernet("several-p0.8", seed, 1.9 + seed / 10) for seed in (0, 1)]
    runs += [supernet("teacher", 0, 1.0, depths=[2])]
    runs += [{**supernet("unfinished", 0, 1.0), "generated": None}]
    # Seeds that one of the two lacks decide nothing; nor are losses without images shown.
    runs += [supernet("several", 2, 0.5)]
    runs += [{**supernet("several-p0.8", 3, 0.5), "generated": None}]
    config = VARConfig(
        depth=8, embed_dim=64, num_heads=4, patch_nums=(1, 2, 3, 4, 6, 8), num_classes=10,
        vocab_size=256, vae_channels=8,
    )  # fmt: skip
    text = quality(study_of(tmp_path, extras=runs), config, 3)
    assert "miniature `several-p0.8` of the [study]" in text
    assert "mean of 2 seeds ± standard error" in text
    assert "Fréchet distance of 100 images" in text
    assert "two halves of the real images are at 0.0500." in text
    assert "no FID;" in text
    # The plan of an image with guidance: 2 sequences, K and V, 64 channels of 4 bytes a token.
    assert "| 8 | 1.9500 ± 0.0500 | 2.1500 ± 0.0500 | 195.0 ms | 704 KiB |" in text
    assert "| 2 | 2.2500 ± 0.0500 | 2.4500 ± 0.0500 | 225.0 ms | 224 KiB |" in text
    assert quality(Study(), config, 3) == ""
    # Times and the floor are of one machine.
    about = {"machine": "another", "versions": {}, "data": {}}
    write(tmp_path / "results", "extras", runs, joined={"1": about})
    text = quality(read_study(tmp_path / "results"), config, 3)
    assert "mean of 2 seeds ± standard error (1 of another VQ-VAE)" in text
    assert "| 8 | 1.9500 ± 0.0500 | 2.1500 ± 0.0500 | 190.0 ms | 704 KiB |" in text
