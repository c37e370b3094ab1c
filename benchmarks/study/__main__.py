"""``python -m benchmarks.study run``, ``collect``, ``join`` and ``report``."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from benchmarks.study.collect import RESULTS, collect
from benchmarks.study.export import export
from benchmarks.study.join import join
from benchmarks.study.scheduler import end_with_parent, run_tasks
from benchmarks.study.settings import SMOKE, Study, load_study
from benchmarks.study.speed import measured_speed
from benchmarks.study.stages.shared import images_of
from benchmarks.study.tasks import Task, tasks_of
from variant.errors import UserError
from variant.folder_lock import locked_folder

LOCK = ".study.lock"


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["report"]:
        from benchmarks.study import report  # draws plots, which no run needs

        return report.main(words[1:])
    options = _parser().parse_args(words)
    torch.set_num_threads(1)
    try:
        profile = SMOKE if options.smoke else options.profile
        study = load_study(profile, tuple(options.only or ()))
        options.out.mkdir(parents=True, exist_ok=True)
        if options.command == "collect":
            for path in collect(study, options.out, options.results, keep=options.keep):
                print(f"wrote {path}", flush=True)
        elif options.command == "join":
            for path in join(study, options.out, options.results):
                print(f"wrote {path}", flush=True)
        elif options.command == "export":
            if options.run is None or options.to is None:
                raise UserError("study: export needs --run and --to")
            export(study, options.out, options.run, options.seed, options.to)
            print(f"wrote {options.to}", flush=True)
        elif options.command == "task":
            end_with_parent()
            _task(study, options)
        else:
            with locked_folder(options.out, LOCK):
                _run(study, options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("study: stopped; the same command continues", file=sys.stderr, flush=True)
        return 130
    return 0


def _run(study: Study, options: argparse.Namespace) -> None:
    def say(line: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)

    say(f"study: {len(study.runs())} runs, to {options.out}; measuring this machine's speed")
    tasks = _tasks(study, options)

    def command(task: Task) -> list[str]:
        words = [sys.executable, "-m", "benchmarks.study", "task", "--out", str(options.out)]
        words += ["--task", task.name]
        words += ["--only", *options.only] if options.only else []
        words += ["--smoke"] if options.smoke else []
        words += ["--profile", str(options.profile)] if options.profile else []
        return words

    run_tasks(tasks, command, options.out, options.jobs, say)
    say(f"study: complete; `python -m benchmarks.study collect --out {options.out}` comes next")


def _task(study: Study, options: argparse.Namespace) -> None:
    def report(what: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {options.task}: {what}", flush=True)

    task = next(task for task in _tasks(study, options) if task.name == options.task)
    task.execute(report)


def _tasks(study: Study, options: argparse.Namespace) -> list[Task]:
    speed = measured_speed(study, options.out, images_of(study).num_train)
    return tasks_of(study, options.out, speed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    parser.add_argument("command", choices=("run", "collect", "join", "export", "task"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once, of one thread each")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="parts and runs")
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny study of digits: the machinery"
    )
    parser.add_argument("--profile", type=Path, help="a TOML file of another, smaller study")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument(
        "--keep",
        action="store_true",
        help="with collect: keep the results of the same settings that --out lacks",
    )
    parser.add_argument("--run", help="the run to export")
    parser.add_argument("--seed", type=int, default=0, help="its seed")
    parser.add_argument("--to", type=Path, help="the model folder that is written")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
