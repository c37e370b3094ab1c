"""Trainings and generations that are stopped by SIGINT, SIGTERM or SIGKILL at random moments.

A training is stopped and resumed until it ends; its weights, moments, losses and random state then
equal those of an undisturbed run, bit by bit. A stopped generation leaves no damaged picture.

    python -m tests.robustness.signals --seed 7 --cases 6
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.robustness import forked, hostile_contents
from tests.robustness.forked import Failed

MODULE = "tests.robustness.signals"
LIMITS = forked.Limits(cpu_seconds=120, wall_seconds=500)
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
# Signals of one training; then it runs to its end.
MOST_SIGNALS = 6
COMMANDS = ("train-vae", "train", "generate")


class Files:
    """A recipe, and the folders of its undisturbed runs with the seconds that they took."""

    def __init__(self, root: Path, only: str | None) -> None:
        from PIL import Image
        from small_models import small_model

        self.root, self.only = root, only
        for part in ("train", "held_out"):
            for label in range(2):
                folder = root / "images" / part / f"class{label}"
                folder.mkdir(parents=True)
                for index in range(8 if part == "train" else 2):
                    shade = (200 * label, 20 * index, 100)
                    Image.new("RGB", (12, 10), shade).save(folder / f"{index}.png")
        recipe = hostile_contents.recipe(root / "images", workers=1)
        recipe["vae_training"]["epochs"] = 8
        recipe["schedule"] |= {"joint": 5, "transition": 5, "refinement": 5}
        self.recipe = root / "recipe.toml"
        self.recipe.write_text(hostile_contents.to_toml(recipe))
        small_model().save_pretrained(root / "model")
        self.seconds: dict[str, float] = {}
        for command in () if only == "generate" else ("train-vae", "train"):
            if command == "train" and only == "train-vae":
                break
            if command == "train":
                shutil.copytree(root / "train-vae", root / "train")
            started = time.monotonic()
            code, text = run(self._training(command, root / command), root, None, 0)
            assert code == 0, text
            self.seconds[command] = time.monotonic() - started
        self.seconds["generate"] = 0.5

    def _training(self, command: str, out: Path) -> list[str]:
        return [command, "--recipe", str(self.recipe), "--out", str(out)]

    def words(self, command: str, out: Path) -> list[str]:
        if command != "generate":
            return self._training(command, out)
        words = ["generate", "--model", str(self.root / "model"), "--count", "40", "--overwrite"]
        return [*words, "--out", str(out)]


def run(
    words: list[str], folder: Path, number: signal.Signals | None, after: float
) -> tuple[int, str]:
    """A command in a forked child that gets a signal after some seconds.

    Returns:
        The exit code, negative for a signal, and standard error.
    """
    errors = folder / "errors.txt"
    errors.write_text("")  # a signal may come before the child opens it
    child = os.fork()
    if child == 0:
        code = 70
        try:
            for stream, path in ((1, os.devnull), (2, str(errors))):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            sys.argv = ["variant", *words]
            # The process that users start: its handlers of signals too.
            from variant.cli.entry import main

            code = main()
        except KeyboardInterrupt:  # before main's handlers: of this harness, not of the command
            code = 128 + signal.SIGINT
        finally:
            os._exit(code)
    if number is not None:
        time.sleep(after)
        os.kill(child, number)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), errors.read_text()


def check(files: Files, seed: int, case: int) -> None:
    rng = forked.rng_of(seed, case)
    command = files.only or COMMANDS[case % len(COMMANDS)]
    folder = Path(tempfile.mkdtemp(prefix=f"signals{case}-", dir=files.root))
    try:
        if command == "generate":
            _check_generation(files, folder, rng)
        else:
            _check_training(files, command, folder, rng)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_training(files: Files, command: str, folder: Path, rng: random.Random) -> None:
    out = folder / "run"
    if command == "train":
        shutil.copytree(files.root / "train-vae", out)
    kind = "vae" if command == "train-vae" else "var"
    sent: list[str] = []
    while True:
        resume = ["--resume"] if (out / f"{kind}-last.pt").exists() else []
        number = rng.choice(SIGNALS) if len(sent) < MOST_SIGNALS else None
        after = rng.uniform(0, files.seconds[command])
        code, text = run([*files.words(command, out), *resume], folder, number, after)
        if number is not None:
            sent.append(f"{number.name} after {after:.2f} s")
        what = f"{command} with {', '.join(sent)}"
        _check_exit(what, code, text, number)
        if code == 0:
            break
    _check_equal(what, files.root / command, out, kind)
    left = [path.name for path in out.iterdir() if path.name.endswith(".tmp")]
    if left:
        raise Failed(f"{what}: leaves {left}")


def _check_exit(what: str, code: int, text: str, number: signal.Signals | None) -> None:
    """0; 128 + the signal's number, or death by it; one line at most."""
    allowed = {0} if number is None else {0, 128 + number, -number}
    lines = [line for line in text.splitlines() if line.strip()]
    if code not in allowed or len(lines) > 1:
        shown = " | ".join(lines)[:200]
        raise Failed(f"{what}: exit code {code}, expected one of {sorted(allowed)}: {shown}")


def _check_equal(what: str, expected: Path, out: Path, kind: str) -> None:
    import torch
    from safetensors.torch import load_file

    for path in sorted(expected.glob("*.safetensors")):
        ours, theirs = load_file(out / path.name), load_file(path)
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[k], theirs[k]) for k in ours):
            raise Failed(f"{what}: {path.name} differs from that of an undisturbed run")
    states = [torch.load(p / f"{kind}-last.pt", weights_only=True) for p in (out, expected)]
    for state in states:
        for name in ("seconds", "log"):  # measured
            state.pop(name)
        for entry in state["history"]:
            entry.pop("seconds")
    difference = _difference(*states)
    if difference:
        raise Failed(f"{what}: {kind}-last.pt differs from an undisturbed run's in {difference}")


def _difference(a: Any, b: Any, where: str = "") -> str:
    """The first place in which two trees of plain values and tensors differ; empty if none."""
    import torch

    if isinstance(a, torch.Tensor):
        return "" if isinstance(b, torch.Tensor) and torch.equal(a, b) else where
    if type(a) is not type(b):
        return where
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return where
        return next(filter(None, (_difference(a[k], b[k], f"{where}/{k}") for k in a)), "")
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return where
        pairs = enumerate(zip(a, b, strict=True))
        return next(filter(None, (_difference(x, y, f"{where}/{i}") for i, (x, y) in pairs)), "")
    return "" if a == b or (a != a and b != b) else where


def _check_generation(files: Files, folder: Path, rng: random.Random) -> None:
    from PIL import Image

    for _ in range(4):
        out = folder / rng.choice(("many", "one.png"))
        number, after = rng.choice(SIGNALS), rng.uniform(0, files.seconds["generate"])
        code, text = run(files.words("generate", out), folder, number, after)
        what = f"generate --out {out.name} with {number.name} after {after:.2f} s"
        _check_exit(what, code, text, number)
        pictures = [path for path in folder.rglob("*.png") if not path.name.startswith(".")]
        for path in pictures:
            try:
                with Image.open(path) as image:
                    image.load()
            except OSError as error:
                raise Failed(f"{what}: {path.name} is damaged: {error}") from None
        left = [path.name for path in folder.rglob("*.tmp")]
        if left and number == signal.SIGINT:
            raise Failed(f"{what}: leaves {left}")
        for path in folder.rglob("*.tmp"):
            path.unlink()


def main() -> int:
    made: list[Files] = []
    folders: list[tempfile.TemporaryDirectory[str]] = []

    def prepare(arguments: argparse.Namespace) -> str:
        folder = tempfile.TemporaryDirectory(prefix="signals-")
        folders.append(folder)
        hostile_contents.import_everything()
        made.append(Files(Path(folder.name), arguments.only))
        os.chdir(folder.name)
        return f" --only {arguments.only}" if arguments.only else ""

    def extra(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--only", choices=COMMANDS, help="the only command")

    sys.path[:0] = [os.getcwd(), str(Path(__file__).parent.parent)]
    return forked.main(
        MODULE,
        lambda seed, case: check(made[0], seed, case),
        forked.option("SIGNALS", 3),
        LIMITS,
        extra=extra,
        prepare=prepare,
    )


if __name__ == "__main__":
    raise SystemExit(main())
