"""Damaged and hostile files and command-line arguments, given to the commands and the loaders.

A case makes one file or one command line from good ones. The command must end with 0, 1 or 2, and
with 1 print one line that names the file. It must run no code from a file, leave nothing
half-written, and end within seconds and within a bounded memory. The loaders raise UserError.

    python -m tests.robustness.hostile_files --seed 7 --cases 200
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.robustness import forked, hostile_contents
from tests.robustness.forked import GIB, Failed
from variant.cli.messages import plain

MODULE = "tests.robustness.hostile_files"
LIMITS = forked.Limits(cpu_seconds=15, wall_seconds=60, memory=GIB)
# Seconds of CPU after which a training that has begun is stopped.
TRAINING_SECONDS = 1.5
# One of so many cases has a process that reads images: it imports torch, which takes longer than
# the rest of a case.
CASES_PER_WORKER = 4
# How often each kind is drawn.
KINDS = {
    "config": 30,
    "safetensors": 20,
    "pth": 25,
    "recipe": 15,
    "image": 4,
    "idx": 6,
    "tokens": 10,
    "resume": 8,
    "arguments": 20,
}


@dataclass
class Hostile:
    """One case: a command line, or a loader and its arguments.

    named: texts of which the message holds one; empty if it names no file.
    """

    text: str
    words: list[str]
    named: tuple[str, ...] = ()
    loader: Callable[[], object] | None = None


class Files:
    """Good files, made once: a model folder, original .pth files, a recipe, a finished run."""

    def __init__(self, root: Path) -> None:
        from PIL import Image
        from small_models import small_model

        from variant.checkpoints.original_var import save_original
        from variant.cli.main import main

        self.root = root
        model = small_model()
        model.save_pretrained(root / "model")
        save_original(model.var, model.vae, root / "var.pth", root / "vae.pth")
        for part in ("train", "held_out"):
            for label in range(2):
                folder = root / "images" / part / f"class{label}"
                folder.mkdir(parents=True)
                for index in range(8 if part == "train" else 2):
                    shade = (200 * label, 20 * index, 100)
                    Image.new("RGB", (12, 10), shade).save(folder / f"{index}.png")
        self.recipe = hostile_contents.recipe(root / "images")
        self.set_workers(0)
        words = ["--recipe", str(root / "recipe.toml"), "--out", str(root / "run")]
        with contextlib.redirect_stdout(io.StringIO()):
            assert main(["train-vae", *words]) == 0
        hostile_contents.write_idx(root / "idx")
        words = ["--recipe", str(root / "recipe.toml"), "--vae", str(root / "run")]
        with contextlib.redirect_stdout(io.StringIO()):
            assert main(["tokenize", *words, "--passes", "2", "--out", str(root / "tokens")]) == 0
        words = ["--recipe", str(root / "recipe.toml"), "--out", str(root / "run")]
        # And one that was stopped after three of its four steps.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            words[-1] = str(root / "stopped")
            _stop_at(2, lambda: main(["train-vae", *words]))
        assert (root / "stopped" / "vae-last.pt").exists()

    def set_workers(self, number: int) -> None:
        """Write the recipe with that number of processes that read images."""
        self.recipe["data"]["workers"] = number
        (self.root / "recipe.toml").write_text(hostile_contents.to_toml(self.recipe))


def _stop_at(step: int, train: Callable[[], object]) -> None:
    """Sends this process SIGINT while that step of the VQ-VAE's training runs."""
    from variant.training.vae_task import VAETask

    original = VAETask.loss

    def loss(self: Any, indices: Any, epoch: int, current: int) -> Any:
        if current == step:
            signal.raise_signal(signal.SIGINT)
        return original(self, indices, epoch, current)

    VAETask.loss = loss
    try:
        train()
    finally:
        VAETask.loss = original


def build(files: Files, folder: Path, seed: int, case: int) -> Hostile:
    """The files of one case, in its own folder."""
    rng = forked.rng_of(seed, case)
    files.set_workers(int(case % CASES_PER_WORKER == 0))
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    return MAKERS[kind](files, folder, rng)


def _model_commands(rng: random.Random, model: Path, folder: Path) -> Hostile:
    """A command, or the loader, on a model folder."""
    to = [str(folder / name) for name in ("to-var.pth", "to-vae.pth")]
    words = rng.choice(
        (
            ["info", "--model", str(model)],
            ["plan", "--model", str(model)],
            ["generate", "--model", str(model), "--labels", "1", "--out", str(folder / "out.png")],
            ["convert", "--model", str(model), "--to-var", to[0], "--to-vae", to[1]],
            [],
        )
    )
    loader = None
    if not words:
        from variant import VARiant

        loader = lambda: VARiant.from_pretrained(str(model))  # noqa: E731
    return Hostile("", words, (str(model), model.name), loader)


def _config(files: Files, folder: Path, rng: random.Random) -> Hostile:
    model = Path(shutil.copytree(files.root / "model", folder / "model"))
    text = hostile_contents.spoil_json(rng, model / "config.json")
    case = _model_commands(rng, model, folder)
    case.text = f"config.json with {text}"
    return case


def _safetensors(files: Files, folder: Path, rng: random.Random) -> Hostile:
    model = Path(shutil.copytree(files.root / "model", folder / "model"))
    text = hostile_contents.spoil_safetensors(rng, model / "model.safetensors")
    case = _model_commands(rng, model, folder)
    case.text = f"model.safetensors with {text}"
    return case


def _pth(files: Files, folder: Path, rng: random.Random) -> Hostile:
    names = ["var.pth", "vae.pth"]
    for name in names:
        shutil.copy(files.root / name, folder / name)
    bad = rng.choice(names)
    text = hostile_contents.spoil_pth(rng, folder / bad, folder / "marker")
    var, vae = (str(folder / name) for name in names)
    words = ["convert", "--var", var, "--vae", vae, "--out", str(folder / "converted")]
    loader = None
    if rng.random() < 0.3:
        from variant import VARiant

        loader = lambda: VARiant.from_var_checkpoint(var, vae)  # noqa: E731
    return Hostile(f"{bad} with {text}", words, (bad, "var.pth", "vae.pth"), loader)


def _recipe(files: Files, folder: Path, rng: random.Random) -> Hostile:
    path = folder / "recipe.toml"
    text = hostile_contents.spoil_toml(rng, files.recipe, path)
    command = rng.choice(("train", "train-vae"))
    if command == "train":
        shutil.copytree(files.root / "run", folder / "run")
    words = [command, "--recipe", str(path), "--out", str(folder / "run")]
    # A path of the data is named with its key, a long one by its first characters.
    names = ("recipe", "data.", "tiny", "xxx", "passwd", "/dev/zero", str(folder))
    return Hostile(f"{command} of a recipe with {text}", words, names)


def _image(files: Files, folder: Path, rng: random.Random) -> Hostile:
    images = Path(shutil.copytree(files.root / "images", folder / "images"))
    part = rng.choice(("train", "held_out"))
    path = images / part / "class1" / "0.png"
    text = hostile_contents.spoil_image(rng, path)
    recipe = folder / "recipe.toml"
    workers = files.recipe["data"]["workers"]
    recipe.write_text(hostile_contents.to_toml(hostile_contents.recipe(images, workers)))
    words = ["train-vae", "--recipe", str(recipe), "--out", str(folder / "run")]
    return Hostile(f"train-vae with an image that is {text}", words, ("0.png", "class1"))


def _idx(files: Files, folder: Path, rng: random.Random) -> Hostile:
    idx = Path(shutil.copytree(files.root / "idx", folder / "idx"))
    name = rng.choice(sorted(path.name for path in idx.iterdir()))
    text = hostile_contents.spoil_idx(rng, idx / name)
    recipe = folder / "recipe.toml"
    values = hostile_contents.recipe(files.root / "images")
    values["data"] = {"kind": "idx", "workers": files.recipe["data"]["workers"]}
    values["data"] |= {path.name: str(path) for path in idx.iterdir()}
    recipe.write_text(hostile_contents.to_toml(values))
    words = ["train-vae", "--recipe", str(recipe), "--out", str(folder / "run")]
    return Hostile(f"train-vae with {name} that is {text}", words, (name, "held_out", "train"))


def _tokens(files: Files, folder: Path, rng: random.Random) -> Hostile:
    tokens = Path(shutil.copytree(files.root / "tokens", folder / "run-tokens"))
    shutil.copytree(files.root / "run", folder / "run")
    text = hostile_contents.spoil_tokens(rng, tokens)
    recipe, out = ["--recipe", str(files.root / "recipe.toml")], ["--out", str(folder / "run")]
    if rng.random() < 0.25:
        words = ["tokenize", *recipe, "--vae", str(folder / "run"), "--passes", "2"]
        words += ["--out", str(tokens)]
    else:
        words = ["train", *recipe, *out, "--data.kind", "tokens", "--data.tokens", str(tokens)]
    return Hostile(f"{words[0]} with {text}", words, ("run-tokens", "tiny"))


def _resume(files: Files, folder: Path, rng: random.Random) -> Hostile:
    shutil.copytree(files.root / rng.choice(("run", "stopped")), folder / "run")
    text = hostile_contents.spoil_checkpoint(rng, folder / "run", folder / "marker")
    recipe = str(files.root / "recipe.toml")
    words = ["train-vae", "--recipe", recipe, "--out", str(folder / "run"), "--resume"]
    return Hostile(f"train-vae --resume of {text}", words, ("run", "vae-last.pt", "tiny"))


def _arguments(files: Files, folder: Path, rng: random.Random) -> Hostile:
    words = hostile_contents.command_line(rng, files.root, folder)
    return Hostile("variant " + " ".join(words)[:300], words)


MAKERS: dict[str, Callable[[Files, Path, random.Random], Hostile]] = {
    "config": _config,
    "safetensors": _safetensors,
    "pth": _pth,
    "recipe": _recipe,
    "image": _image,
    "idx": _idx,
    "tokens": _tokens,
    "resume": _resume,
    "arguments": _arguments,
}


# --- the run and what must hold -------------------------------------------------------------------


def check(files: Files, seed: int, case: int) -> None:
    folder = Path(tempfile.mkdtemp(prefix=f"case{case}-", dir=files.root))
    try:
        hostile = build(files, folder, seed, case)
        before = _listing(folder)
        epochs = _epochs(folder)
        code, errors = _run(hostile)
        # The timer may also come when the last epoch is over and the model is written.
        if code == 130 and _epochs(folder) > epochs:
            code = 0
        if code == 130:
            raise Failed(f"{hostile.text}: not training after {TRAINING_SECONDS} s of CPU")
        _check_outcome(hostile, code, errors)
        if (folder / "marker").exists():
            raise Failed(f"{hostile.text}: code from the file was run")
        left = [p for p in _listing(folder) - before if p.endswith(".tmp")]
        if left:
            raise Failed(f"{hostile.text}: left {left}")
        made = [p for p in _listing(folder) - before if not p.startswith("run")]
        if code == 1 and made:
            raise Failed(f"{hostile.text}: failed, and left {sorted(made)[:5]}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _epochs(folder: Path) -> int:
    """Epochs that the runs below a folder have recorded."""
    return sum(len(file.read_bytes().splitlines()) for file in folder.rglob("*-metrics.jsonl"))


def _listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def _run(hostile: Hostile) -> tuple[int, str]:
    """Exit code and standard error of the command; of a loader 1 and the UserError's text."""
    import torch

    from variant.cli.main import main
    from variant.cli.messages import one_line_warnings
    from variant.errors import UserError

    if hostile.loader is not None:
        with standard_error(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                hostile.loader()
                return 0, ""
            except UserError as error:
                return 1, f"variant: error: {error}"
            except Exception as error:
                text = " ".join(str(error).split())[:200]
                kind = type(error).__name__
                raise Failed(
                    f"loader: {hostile.text}: {kind}: {text}; expected UserError"
                ) from None
    interrupted = False

    def interrupt(*_: object) -> None:
        nonlocal interrupted
        interrupted = True
        signal.raise_signal(signal.SIGINT)

    training = hostile.words[:1] in (["train"], ["train-vae"])
    if training:
        signal.signal(signal.SIGVTALRM, interrupt)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_VIRTUAL, TRAINING_SECONDS)
    try:
        with standard_error() as read:
            try:
                with one_line_warnings():
                    code = main(hostile.words)
            except SystemExit as stop:
                # A training that was stopped at the end of a step.
                code = 0 if stop.code in (130, None) else int(stop.code)
            return code, read()
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        if interrupted:
            # torch.no_grad() leaves gradients off if the signal comes while it is entered or left;
            # the command would end its process, here other cases follow.
            torch.set_grad_enabled(True)


@contextlib.contextmanager
def standard_error():
    """Everything that is written to the process's standard error, by C too."""
    # Through a pipe: limits on files must not cut it.
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 1 << 20)
    for end in (reading, writing):
        os.set_blocking(end, False)
    kept = os.dup(2)
    os.dup2(writing, 2)

    def read() -> str:
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        with contextlib.suppress(BlockingIOError):
            return os.read(reading, 1 << 20).decode(errors="replace")
        return ""

    try:
        yield read
    finally:
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        os.dup2(kept, 2)
        for end in (reading, writing, kept):
            os.close(end)


def own_lines(errors: str) -> list[str]:
    """Lines of standard error, without warnings of one line."""
    lines = [line for line in errors.splitlines() if line.strip()]
    return [line for line in lines if not line.startswith("variant: warning: ")]


def _check_outcome(hostile: Hostile, code: int, errors: str) -> None:
    what = hostile.text if hostile.loader is None else f"loader: {hostile.text}"
    if hostile.loader is None and hostile.words[0] not in hostile.text.split():
        what = f"{hostile.words[0]}: {what}"
    shown = " | ".join(line for line in errors.splitlines() if line.strip())[:300]
    if code not in (0, 1, 2):
        raise Failed(f"{what}: exit code {code}: {shown}")
    if "Traceback (most recent" in errors:
        raise Failed(f"{what}: a traceback: {shown}")
    if code == 0:
        return
    lines = own_lines(errors)
    if len(lines) != 1 or not lines[0].startswith("variant: error: "):
        raise Failed(f"{what}: {len(lines)} lines: {shown}")
    if "--debug shows where" in errors:
        raise Failed(f"{what}: an error that is not foreseen: {shown}")
    if code == 1 and hostile.named and not any(plain(name) in errors for name in hostile.named):
        raise Failed(f"{what}: the message does not name the file: {shown}")


def main() -> int:
    made: list[Files] = []
    folders: list[tempfile.TemporaryDirectory[str]] = []

    def extra(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--only", choices=sorted(KINDS), help="the only kind of file")

    def prepare(arguments: argparse.Namespace) -> str:
        folder = tempfile.TemporaryDirectory(prefix="hostile-files-")
        folders.append(folder)
        hostile_contents.import_everything()
        made.append(Files(Path(folder.name)))
        if arguments.only:
            for kind in set(KINDS) - {arguments.only}:
                del KINDS[kind]
        os.chdir(folder.name)
        return f" --only {arguments.only}" if arguments.only else ""

    sys.path[:0] = [os.getcwd(), str(Path(__file__).parent.parent)]
    return forked.main(
        MODULE,
        lambda seed, case: check(made[0], seed, case),
        forked.option("FILES", 240),
        LIMITS,
        extra=extra,
        prepare=prepare,
        describe=lambda seed, case: _describe(made[0], seed, case),
    )


def _describe(files: Files, seed: int, case: int) -> str:
    folder = Path(tempfile.mkdtemp(dir=files.root))
    try:
        return build(files, folder, seed, case).text
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    raise SystemExit(main())
