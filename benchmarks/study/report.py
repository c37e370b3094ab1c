"""Write ``docs/study.md`` and its plots from the study's result files.

    python -m benchmarks.study report

A verdict follows from the numbers by the rule in ``report_verdicts.py``; nothing on the page is
written by hand but the words around the numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from benchmarks.report import table
from benchmarks.study import report_plots, report_tables
from benchmarks.study.report_claims import (
    CLAIMS,
    CONTROL,
    CONTROL_REFERENCE,
    Claim,
    by,
    control_claims,
    judged,
    usable_metrics,
)
from benchmarks.study.report_data import (
    FASHION_FD,
    FULL,
    LOSS,
    METRICS,
    Metric,
    Part,
    Study,
    read_study,
)
from benchmarks.study.report_tables import joined_seeds
from benchmarks.study.report_verdicts import (
    CHANCE,
    ERRORS,
    Evidence,
    Point,
    Verdict,
    better,
    chance_within,
    judge,
    needed_errors,
    sums_by_seed,
)
from variant.errors import UserError
from variant.files import atomic_write

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
PAGE = ROOT / "docs" / "study.md"

# What the study cannot say, whatever its results are.
LIMITS = """\
- **Scale.** The model is a miniature: fewer layers, a narrower width, fewer tokens and fewer steps
  than VAR-d30. An effect that needs a large model or long training does not show here, and an
  effect that shows here may vanish there.
- **ImageNet.** The images are Fashion-MNIST: ten classes, grey, 32x32 pixels.
- **Classifier features.** fashion-FD, precision and recall use the features of a small classifier
  that was trained on the training images, joined with the class. Their numbers compare runs of this
  page with each other and nothing else: they are no FID and stand beside no published number.
  Accuracy is that of another classifier.
- **Held-out loss** is measured with the real tokens of all earlier scales as input. It does not see
  errors that add up over the scales of a generation.
"""


@dataclass(frozen=True)
class Section:
    """A part of the study on the page.

    tables: ours.  papers: names of the paper's tables.  text: what stands above the tables.
    numbers: a sentence with numbers of the files, below the text; "" while there are none.
    """

    title: str
    tables: tuple[Callable[[Study, Part], list[str]], ...]
    papers: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ()
    text: str = ""
    numbers: Callable[[Study], str] = lambda study: ""


def _alone(study: Study) -> str:
    """What becomes of the full network if it is trained on alone."""
    start, alone = Point("base"), Point("p0")
    usable = usable_metrics(study)
    by_loss = judge(better(start, alone), study, usable)
    if by_loss.error is None:
        return ""
    shared = sums_by_seed(better(start, alone), study)
    losses = [
        report_tables.estimate(LOSS, [study.values(LOSS, name, FULL)[seed] for seed in shared])
        for name in (alone.run, start.run)
    ]
    by_distance = judge(by(better(start, alone), FASHION_FD), study, usable)
    what = {
        Verdict.HOLDS: "is worse than its start",
        Verdict.DOES_NOT_HOLD: "is better than its start",
    }
    texts = [
        f"by {metric.name} the full network "
        + what.get(evidence.verdict, "differs from its start by less than is resolved")
        + f" ({_difference(metric, _negated(evidence))})"
        for metric, evidence in ((LOSS, by_loss), (FASHION_FD, by_distance))
        if evidence.mean is not None
    ]
    return (
        f"The row `p0` (p = 0) is the run of fine-tuning the full network alone, from `base`: "
        f"{'; '.join(texts)}. Its held-out loss is {losses[0]}, that of `base` {losses[1]}. All "
        "runs of this page that train the full network further, `p0` too, begin at a learning rate "
        "above that at which `base` ended ([settings](../benchmarks/study/settings)). So a loss "
        "above that of `base` does not by itself show that a subnet has done harm; one above that "
        "of `p0`, at the same rates, does."
    )


def _negated(evidence: Evidence) -> Evidence:
    return replace(evidence, mean=None if evidence.mean is None else 0 - evidence.mean)


LOSSES = report_tables.losses, report_tables.differences
SECTIONS: Mapping[str, Section] = {
    "base": Section(
        "The model that all runs start from", (*LOSSES, report_tables.generated),
        text="Trained at full depth only.",
    ),
    "zones": Section(
        "Where a subnet runs (Table 1)",
        (*LOSSES, report_tables.losses_per_layer_token, report_tables.losses_by_scale,
         report_tables.generated), ("table1",),
        text="The model of full depth, without training: the subnet runs at the early, the middle "
        "or the late scales, and all other scales run every layer. The mean loss over tokens "
        "weighs the late scales most, because they hold most tokens (*Losses*). What a saved "
        "layer-token costs (*Losses per layer-token*) and the fashion-FD (*Generated images*) do "
        "not weigh scales by their tokens.",
    ),
    "training-free": Section(
        "Training-free and joint training (Table 4)",
        (*LOSSES, report_tables.generated), ("table4",),
        text="Joint training of the full network and a subnet also trains the full network "
        "further. Whether the subnet harms it is therefore judged against the run `p0`, which "
        "starts from the same weights and does equal work at full depth only. `joint-d2` is the "
        "run `progressive`.",
    ),
    "bridges": Section(
        "Bridges (Tables 5 and 8)",
        (*LOSSES, report_tables.losses_by_scale, report_tables.generated,
         report_tables.gradient_norms), ("table5", "table8"),
        text="The bridge is the number of first scales that always run every layer: run `bridge4` "
        "has 4 of them in training, and at its schedule `d2`. A step with a wider bridge costs "
        "more, so that at equal work such a run has fewer steps. `bridge3` is the run "
        "`progressive`.",
    ),
    "ratios": Section(
        "How often the subnet is trained (Figures 2a, 2b, 2c)",
        (*LOSSES, report_tables.generated, report_tables.gradient_norms),
        ("figure2a", "figure2b", "figure2c"), tuple(name for name, *_ in report_plots.PLOTS),
        text="p is the probability of a step at the subnet's depth. All runs start from the same "
        "model of their seed and do equal work. Where the learning rate falls to 0 (`*-rate0`), "
        "the schedules are compared at the same rate.",
        numbers=_alone,
    ),
    "extras": Section(
        "Variants of the training", (*LOSSES, report_tables.generated),
        text="With weights of the subnet's own (`copies`, `lora*`, `adaln`) all else is frozen: "
        "their full network is `base`, unchanged. What is frozen counts for the passes that it "
        "has: layers of the bridge for a forward pass, frozen layers of the subnet and the head "
        "for no gradients of weights. So these runs have more steps. Their learning rates were set "
        "once and not tuned: a better one may change their verdicts. `teacher-frozen` and "
        "`teacher-ema` train the full network; frozen, or a moving average, is the teacher that "
        "the subnet learns from.",
    ),
    "augmentation": Section(
        "Augmentation and mixup", (*LOSSES, report_tables.generated),
        text="Only the fine-tuning sees augmented images, for less than one pass; the base that it "
        "starts from was trained on plain ones. What augmentation does over many passes, against "
        "overfitting, this part cannot show.",
    ),
    "kv8": Section(
        "8-bit K/V", (*LOSSES, report_tables.generated),
        text="`exact` is the run `several`, `kv8` the same weights with K and V in 8 bits.",
    ),
    "search": Section(
        "Searched layers and depths", (report_tables.searched,),
        text="`variant search` on the full network that never trained a subnet, and on the "
        "supernet of several depths. A budget is a share of the full network's peak K/V bytes or "
        "of the work of its layers and head. Beside the searched schedule stand the best of the "
        "depths 8, 4 and 2 after any bridge (`depth and bridge`), and the best schedule of evenly "
        "chosen or trained layers with any depth at each scale, which may also be another depth "
        "after a bridge. Half of the images choose all three, the other half is measured. Depths "
        "are those of the first seed; 8x4-5-2 is depth 8 at four scales, then 5, then 2.",
    ),
    "control": Section(
        "Control: labels permuted", (*LOSSES, report_tables.generated),
        text="A run that was broken on purpose. A metric that does not find it worse at every "
        "depth decides no verdict on this page.",
    ),
}  # fmt: skip


def page(study: Study) -> str:
    """The text of ``docs/study.md``."""
    usable = usable_metrics(study)
    found = judged(CLAIMS, study, usable)
    lines = ["# The study in miniature", "", *_first_lines(found)]
    lines += ["## What this page cannot say", "", LIMITS, *_method(study, usable)]
    lines += report_tables.setting(study)
    for name, section in SECTIONS.items():
        lines += _section(name, section, study, found)
    lines += _paper_against_itself()
    return "\n".join(lines).rstrip() + "\n"


def _first_lines(found: Sequence[tuple[Claim, Evidence]]) -> list[str]:
    """What the miniature contradicts of the paper, and the counts of all verdicts."""
    ours = [(claim, evidence) for claim, evidence in found if claim.paper]
    by_claim: dict[tuple[str, str], list[tuple[Claim, Evidence]]] = {}
    for claim, evidence in ours:
        by_claim.setdefault((claim.text, claim.paper or ""), []).append((claim, evidence))
    against = {
        key: rows
        for key, rows in by_claim.items()
        if any(evidence.verdict is Verdict.DOES_NOT_HOLD for _, evidence in rows)
    }
    if against:
        lines = ["**Where the miniature contradicts the paper:**", ""]
        for (text, where), rows in against.items():
            verdicts = " ".join(
                f"By {claim.measure} {_verdict(claim, evidence)}" for claim, evidence in rows
            )
            lines.append(f'- "{text}" ({where}). {verdicts}')
    elif any(pair[1].verdict is Verdict.HOLDS for pair in ours):
        lines = ["**The miniature contradicts no claim of the paper so far.**"]
    else:
        lines = ["**No run has decided any claim of the paper so far.**"]
    count = {v: sum(evidence.verdict is v for _, evidence in ours) for v in Verdict}
    counts = _listed(
        f"{'none' if count[v] == 0 else count[v]} {PLURAL[v] if count[v] != 1 else SINGULAR[v]}"
        for v in Verdict
        if count[v] or v is not Verdict.NOT_RUN
    )
    what = f"{len(by_claim)} claims of the paper are judged here, most by two metrics"
    return [*lines, "", f"{what}. Of these {len(ours)} verdicts, {counts}.", ""]


# A verdict on one claim, and on several, as a verb.
SINGULAR = {
    Verdict.HOLDS: "holds",
    Verdict.DOES_NOT_HOLD: "does not hold",
    Verdict.NOT_RESOLVED: "is not resolved",
    Verdict.NOT_RUN: "has not run yet",
}
PLURAL = {
    Verdict.HOLDS: "hold",
    Verdict.DOES_NOT_HOLD: "do not hold",
    Verdict.NOT_RESOLVED: "are not resolved",
    Verdict.NOT_RUN: "have not run yet",
}


def _listed(parts: Iterable[str]) -> str:
    """a, b and c."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def _method(study: Study, usable: frozenset[Metric]) -> list[str]:
    chances = " and ".join(
        f"{100 * (1 - chance_within(ERRORS, n)):.0f} % of such cases with {n} seeds" for n in (3, 2)
    )
    needed = ", ".join(f"{needed_errors(3, n):.1f} of {n}" for n in (2, 4, 8))
    return [
        "## How to read it",
        "",
        "`make study-report` writes this page and its plots from the files in "
        "[benchmarks/study/results](../benchmarks/study); do not edit it. The paper's numbers are "
        "in [paper_tables.json](../benchmarks/study/paper_tables.json), its claims in "
        "[report_claims.py](../benchmarks/study/report_claims.py).",
        "",
        "Schedules: `full` runs every layer at every scale; `d4` and `d2` run 4 and 2 layers at "
        "the scales after the bridge, whose width is 3 scales unless the run says otherwise; "
        "`d2@b5` has a bridge of 5. `d4@early`, `d4@middle` and `d4@late` run 4 layers at a third "
        "of the scales and all layers at the others; `d4@all` has no bridge.",
        "",
        *report_tables.explained(),
        "Numbers are means over seeds; those after ± are one standard error over seeds. A number "
        "of fewer seeds than its row says so. Where the full network of a run was frozen, its rows "
        "say so.",
        "",
        f'A claim "{Verdict.HOLDS.value}" or "{Verdict.DOES_NOT_HOLD.value}" if the mean '
        f"difference, paired by seed, is at least {ERRORS:g} standard errors over seeds, and "
        f'is "{Verdict.NOT_RESOLVED.value}" if it is less or there is one seed. This test is weak: '
        f"where there is no difference, it finds one in {chances}. A verdict is followed by the "
        "difference that decides it, oriented so that a negative one supports the claim.",
        "",
        'A claim about several differences ("each", "no", "some", "both") needs more where one of '
        'them decides alone, such as a single step against "each further scale": besides the '
        f"{ERRORS:g} standard errors, the quantile of Student's t with n - 1 degrees of freedom "
        f"for n seeds, at {100 * CHANCE:.0f} % over the number of differences that can decide "
        f"(Bonferroni). With 3 seeds that is {needed} differences, in standard errors. The verdict "
        f"that needs every difference asks {ERRORS:g} standard errors of each.",
        "",
        "Equal work is equal FLOP of the forward and backward passes, not equal steps or time: "
        f"{_steps(study)}. The seeds differ in the weights and the order of training and in the "
        f"random numbers of generation; {_shared(study)} Seconds of a "
        "training are wall time of a machine that did other work as well: they compare nothing.",
        "",
        "The floor of a distance is that of one half of the real held-out images against the "
        "other. The reconstruction floor is that of images that the VQ-VAE encoded and decoded: "
        "what a transformer that gave the right tokens would score.",
        "",
        _control_line(study, usable),
        "",
    ]


def _shared(study: Study) -> str:
    """What the seeds share, and which do not."""
    joined = sorted({seed for part in study.parts.values() for seed in joined_seeds(part)})
    if not joined:
        return (
            "they share the VQ-VAE, the tokens and the classifiers, so that an error over seeds "
            "does not hold what another VQ-VAE would change."
        )
    names = f"seed{'s' * (len(joined) > 1)} {_listed(map(str, joined))}"
    has = "has a VQ-VAE, tokens, classifiers and a base of its own"
    if len(joined) > 1:
        has = "have VQ-VAEs, tokens, classifiers and bases of their own"
    return (
        f"all but {names} share the VQ-VAE, the tokens and the classifiers. {names.capitalize()}, "
        f"made on another machine, {has}. All differences are paired by seed, so that they compare "
        "runs of one VQ-VAE; means of rows that have other seeds do not compare."
    )


def _steps(study: Study) -> str:
    """The steps of some runs of equal work, as far as they were made."""
    names = {"p0": "the full network alone", "progressive": "the progressive schedule",
             "p1": "p = 1"}  # fmt: skip
    found = {
        text: sorted(run.data["steps"] for run in study.runs(name, "ratios").values())
        for name, text in names.items()
    }
    made = [
        f"{text} has {' to '.join(f'{n:,}' for n in dict.fromkeys((steps[0], steps[-1])))} steps"
        for text, steps in found.items()
        if steps
    ]
    return ", ".join(made) or "a step of a subnet costs less, so that its run has more steps"


def _control_line(study: Study, usable: frozenset[Metric]) -> str:
    if not study.runs(CONTROL, "control"):
        return "The control (labels permuted) has not run: no metric decides a verdict yet."
    evidence = [one for by in control_claims(study).values() for one in by.values()]
    if max(one.seeds for one in evidence) == 1:
        return (
            "The control (labels permuted) has run with one seed: no metric decides a verdict "
            "until it has run with two."
        )
    yes = ", ".join(metric.name for metric in METRICS if metric in usable) or "none"
    no = ", ".join(metric.name for metric in METRICS if metric not in usable) or "none"
    return f"Metrics that flag the control (labels permuted): {yes}. Metrics that do not: {no}."


def _section(
    name: str, section: Section, study: Study, found: Sequence[tuple[Claim, Evidence]]
) -> list[str]:
    lines = [f"## {section.title}", ""]
    for text in (section.text, section.numbers(study)):
        lines += [text, ""] if text else []
    part = study.parts.get(name)
    if part is None or not part.runs:
        lines += ["Not run yet.", ""]
    else:
        for make in section.tables:
            lines += make(study, part)
    shown = report_plots.pictures(study)
    for picture in section.pictures:
        if picture in shown:
            lines += [f"![{shown[picture]}]({picture})", ""]
    for table_name in section.papers:
        lines += report_tables.paper(table_name)
    if name == "control":
        lines += _control_table(study)
    lines += _verdicts([pair for pair in found if pair[0].part == name])
    if part is not None:
        lines += report_tables.commands(part)
    return lines


def _control_table(study: Study) -> list[str]:
    rows = []
    for metric, by_schedule in control_claims(study).items():
        for schedule, evidence in by_schedule.items():
            answer = {Verdict.HOLDS: "yes", Verdict.NOT_RUN: Verdict.NOT_RUN.value}
            numbers = _difference(metric, evidence) or "-"
            rows.append([metric.name, schedule, numbers, answer.get(evidence.verdict, "no")])
    reference = f"difference of `{CONTROL_REFERENCE}` from it"
    columns = ["metric", "schedule", f"{reference} (negative: better)", "flagged"]
    return report_tables.named(report_tables.CONTROLLED, table(columns, rows))


def _verdicts(found: Sequence[tuple[Claim, Evidence]]) -> list[str]:
    """One row for each claim, one column for each metric that judges it."""
    measures = list(dict.fromkeys(claim.measure for claim, _ in found))
    rows: dict[tuple[str, str], list[str]] = {}
    for claim, evidence in found:
        row = rows.setdefault((claim.text, claim.paper or "our question"), ["-"] * len(measures))
        sentence = _verdict(claim, evidence)
        row[measures.index(claim.measure)] = sentence[0].upper() + sentence[1:]
    if not rows:
        return []
    columns = ["claim", "where", *(f"by {measure}" for measure in measures)]
    cells = [[*key, *cells] for key, cells in rows.items()]
    return report_tables.named(report_tables.VERDICTS, table(columns, cells))


def _verdict(claim: Claim, evidence: Evidence) -> str:
    """A sentence, whose "it" is the claim."""
    details = [text for text in (_numbers(claim, evidence), evidence.reason) if text]
    sentence = f"it **{SINGULAR[evidence.verdict]}**"
    return sentence + (f": {'; '.join(details)}." if details else ".")


def _numbers(claim: Claim, evidence: Evidence) -> str:
    """The difference with its error; of several differences, how many of each verdict."""
    if not evidence.parts:
        metric = next((m for m in report_tables.ALL_METRICS if m.name == claim.measure), None)
        return _difference(metric, evidence) if metric else ""
    if evidence.verdict is Verdict.NOT_RUN:
        return ""
    leaves = _leaves(evidence)
    verbs = {
        Verdict.HOLDS: ("supports it", "support it"),
        Verdict.DOES_NOT_HOLD: ("speaks against it", "speak against it"),
        Verdict.NOT_RESOLVED: ("is not resolved", "are not resolved"),
        Verdict.NOT_RUN: ("has not run", "have not run"),
        None: ("is zero in every seed", "are zero in every seed"),  # e.g. of equal schedules
    }
    found = [None if (leaf.mean, leaf.error) == (0, 0) else leaf.verdict for leaf in leaves]
    counts = {verdict: found.count(verdict) for verdict in verbs}
    texts = _listed(
        f"{count} {verbs[verdict][count > 1]}" for verdict, count in counts.items() if count
    )
    seeds = sorted({leaf.seeds for leaf in leaves if leaf.seeds})
    few = "" if seeds[0] == seeds[-1] else f"{seeds[0]} to "
    return f"of {len(leaves)} differences, {texts}; {few}{_seeds(seeds[-1])}"


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def _leaves(evidence: Evidence) -> list[Evidence]:
    if not evidence.parts:
        return [evidence]
    return [leaf for part in evidence.parts for leaf in _leaves(part)]


def _difference(metric: Metric, evidence: Evidence) -> str:
    if evidence.mean is None:
        return ""
    mean = metric.text(evidence.mean, signed=True)
    if evidence.error is None:
        return mean
    return f"{mean} ± {metric.text(evidence.error)}, {_seeds(evidence.seeds)}"


def _paper_against_itself() -> list[str]:
    lines = ["## Where the paper disagrees with itself", ""]
    rows = report_tables.PAPER["disagreements"]
    return [*lines, *(f"- {row['text']} ({row['source']})" for row in rows)]


@dataclass
class Options:
    """Write docs/study.md and its plots from the study's result files.

    Example: python -m benchmarks.study report
    """

    results: Path = RESULTS
    """Folder of the result files."""
    out: Path = PAGE
    """The page; its plots are written beside it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page; 0, or 1 if a result file cannot be used."""
    options = tyro.cli(Options, args=argv)
    try:
        study = read_study(options.results)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report_plots.draw_all(study, options.out.parent)
    with atomic_write(options.out) as temporary:
        temporary.write_text(page(study))
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
