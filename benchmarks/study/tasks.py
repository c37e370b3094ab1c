"""The tasks of the study, in the order of their value, with what each needs and may cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.study.settings import BASE, Run, Study
from benchmarks.study.speed import Speed
from benchmarks.study.stages import files, measuring, searching, shared, training

Report = Callable[[str], None]
START = 5.0  # seconds until a process has imported everything
SEARCHED = 300.0  # forward passes of the full network that a search takes for each image


@dataclass(frozen=True)
class Task:
    """Something that one process does.

    needs: names of the tasks that come before.
    execute: does it; what is complete is not done again.
    is_done: whether it is complete. Asked only when all that it needs is.
    work: seconds of one core, as the measured speed predicts, without the start of a process.
    """

    name: str
    needs: tuple[str, ...]
    execute: Callable[[Report], None]
    is_done: Callable[[], bool]
    work: float

    @property
    def seconds(self) -> float:
        """Predicted seconds of one core."""
        return self.work + START


def tasks_of(study: Study, out: Path, speed: Speed) -> list[Task]:
    """Every task of a study."""
    runs = study.runs()
    tasks = [_vae(study, out, speed)]
    used = {run.tokens for run in runs if run.trains} | {"plain"}
    tasks += [_tokens(study, out, name, speed) for name in sorted(used)]
    tasks += [_classifier(study, out, name, speed) for name in shared.CLASSIFIERS]
    tasks.append(_real(study, out, speed))
    for run in runs:
        tasks += [_train(study, out, run, speed)] if run.name == BASE else []
        tasks.append((_search if run.search else _run)(study, out, run, speed))
    return _ordered(tasks, [_name(run) for run in runs])


def _ordered(tasks: list[Task], wanted: list[str]) -> list[Task]:
    """The wanted tasks in their order, each behind what it needs, and then the others."""
    by_name = {task.name: task for task in tasks}
    ordered: dict[str, Task] = {}

    def add(task: Task) -> None:
        for name in task.needs:
            add(by_name[name])
        ordered.setdefault(task.name, task)

    for name in (*wanted, *by_name):
        add(by_name[name])
    return list(ordered.values())


def _name(run: Run) -> str:
    return f"{run.name}/seed{run.seed}"


def _train_name(run: Run) -> str:
    return f"{BASE}-weights/seed{run.seed}"


def _vae(study: Study, out: Path, speed: Speed) -> Task:
    return Task(
        "vae",
        (),
        lambda report: shared.make_vae(study, out),
        lambda: files.is_done(out / "vae" / "vae.json", shared.vae_identity(study)),
        speed.vae_image * speed.images * study.recipe["vae_training"]["epochs"],
    )


def _tokens(study: Study, out: Path, name: str, speed: Speed) -> Task:
    done = out / "tokens" / name / "done.json"
    return Task(
        f"tokens/{name}",
        ("vae",),
        lambda report: shared.make_tokens(study, out, name),
        lambda: files.is_done(done, shared.tokens_identity(study, out, name)),
        speed.encoded_image * 1.3 * speed.images,
    )


def _classifier(study: Study, out: Path, name: str, speed: Speed) -> Task:
    path = out / "classifiers" / f"{name}.json"
    return Task(
        f"classifier/{name}",
        (),
        lambda report: shared.make_classifier(study, out, name),
        lambda: files.is_done(path, shared.classifier_identity(study, name)),
        speed.classifier_step * study.values["classifier_steps"],
    )


def _real(study: Study, out: Path, speed: Speed) -> Task:
    return Task(
        "real",
        ("vae", *(f"classifier/{name}" for name in shared.CLASSIFIERS)),
        lambda report: shared.make_real(study, out),
        lambda: files.is_done(out / "real.json", shared.real_identity(study, out)),
        30.0 + 2 * speed.encoded_image * study.values["generated"],
    )


def _train(study: Study, out: Path, run: Run, speed: Speed) -> Task:
    """The weights of a base, which other tasks wait for."""
    path = files.run_folder(out, run) / "train.json"
    return Task(
        _train_name(run),
        ("tokens/plain",),
        lambda report: training.train(study, out, run),
        lambda: files.is_done(path, training.training_identity(study, out, run)),
        speed.step * run.work,
    )


def _search(study: Study, out: Path, run: Run, speed: Speed) -> Task:
    trained = _train_name(run) if run.model == BASE else f"{run.model}/seed{run.seed}"
    wanted = searching.search_identity
    return Task(
        _name(run),
        ("vae", trained),
        lambda report: searching.measure_search(study, out, run, report),
        lambda: files.is_done(searching.search_file(out, run), wanted(study, out, run)),
        speed.evaluated_image * run.search * SEARCHED,
    )


def _run(study: Study, out: Path, run: Run, speed: Speed) -> Task:
    needs = [_train_name(run), "real"]
    if run.trains and run.tokens != "plain":
        needs.append(f"tokens/{run.tokens}")
    if run.model not in (None, BASE):
        needs.append(f"{run.model}/seed{run.seed}")
    seconds = speed.step * run.work * (run.trains and run.name != BASE)
    seconds += speed.evaluated_image * study.values["images"] * len(run.schedules) * 0.7
    seconds += speed.generated_image * study.values["generated"] * len(run.generate) * 0.8
    return Task(
        _name(run),
        tuple(needs),
        lambda report: measuring.measure(study, out, run, report),
        lambda: measuring.is_measured(study, out, run),
        seconds,
    )
