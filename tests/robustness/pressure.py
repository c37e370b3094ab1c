"""Many threads, many generations, files that cannot grow and memory that runs out.

python -m tests.robustness.pressure --seed 7 --cases 40
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.robustness import forked, hostile_contents
from tests.robustness.forked import MIB, Failed
from tests.robustness.hostile_files import own_lines, standard_error

MODULE = "tests.robustness.pressure"
# A child each: where oneDNN once had too little memory for a primitive, it has none of that shape
# until the process ends ("could not create a primitive").
LIMITS = forked.Limits(cpu_seconds=120, wall_seconds=500, memory=4 * forked.GIB, cases_per_child=1)
# Growth of resident memory that so many generations may show: fragments of the allocator.
GROWTH = 8 * MIB
GENERATIONS = 150


class Files:
    """A small model and its engine, and good files for the commands."""

    def __init__(self, root: Path) -> None:
        from PIL import Image
        from small_models import small_model

        from variant.checkpoints.original_var import save_original

        self.root = root
        self.model = small_model()
        self.model.save_pretrained(root / "model")
        save_original(self.model.var, self.model.vae, root / "var.pth", root / "vae.pth")
        for part in ("train", "held_out"):
            for label in range(2):
                folder = root / "images" / part / f"class{label}"
                folder.mkdir(parents=True)
                for index in range(4):
                    Image.new("RGB", (12, 10), (200 * label, 20 * index, 9)).save(
                        folder / f"{index}.png"
                    )
        recipe = hostile_contents.recipe(root / "images", workers=1)
        (root / "recipe.toml").write_text(hostile_contents.to_toml(recipe))
        # What a command imports at its first run must not fail for lack of memory.
        for words in self.commands(root / "first"):
            code, text = _command(words)
            assert code == 0, text

    def commands(self, folder: Path) -> list[list[str]]:
        """Commands that write files."""
        root = self.root
        convert = ["convert", "--var", str(root / "var.pth"), "--vae", str(root / "vae.pth")]
        back = ["convert", "--model", str(root / "model")]
        return [
            ["generate", "--model", str(root / "model"), "--out", str(folder / "one.png")],
            ["generate", "--model", str(root / "model"), "--out", str(folder / "many")],
            ["train-vae", "--recipe", str(root / "recipe.toml"), "--out", str(folder / "run")],
            [*convert, "--out", str(folder / "converted")],
            [*back, "--to-var", str(folder / "a.pth"), "--to-vae", str(folder / "b.pth")],
        ]


def _options(rng: random.Random) -> dict[str, Any]:
    """Arguments of one generation."""
    labels = [rng.randrange(5) for _ in range(rng.randint(1, 4))]
    return {
        "labels": labels,
        "seed": rng.randrange(1000),
        "depth": rng.choice((None, 2, 3)),
        "cfg": rng.choice((0.0, 1.5)),
        "top_k": rng.choice((0, 5)),
        "max_batch": rng.choice((None, 2)),
        "kv_dtype": rng.choice((None, None, "fp8")),
    }


def check_threads(files: Files, rng: random.Random) -> None:
    """Threads with one engine draw what one thread draws."""
    import torch

    requests = [_options(rng) for _ in range(24)]
    engine = files.model.engine(rng.choice((torch.float32, torch.bfloat16)))

    def tokens(request: dict[str, Any]) -> Any:
        return engine.generate(**request, decode=False).tokens

    expected = [tokens(request) for request in requests]
    threads = rng.choice((2, 4))
    with ThreadPoolExecutor(threads) as pool:
        results = list(pool.map(tokens, requests))
    for request, ours, theirs in zip(requests, results, expected, strict=True):
        if not torch.equal(ours, theirs):
            raise Failed(f"{threads} threads with one engine: other tokens for {request}")


def check_growth(files: Files, folder: Path, rng: random.Random) -> None:
    """Resident memory does not grow with the number of generations."""
    import torch

    # The same ones again: matrix libraries keep code for each new shape.
    dtypes = (torch.float32, torch.bfloat16)
    requests = [(rng.choice(dtypes), _options(rng)) for _ in range(GENERATIONS)]

    def generate() -> int:
        for dtype, options in requests:
            files.model.engine(dtype).generate(**options)
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = generate()
    after = generate()
    if after - before > GROWTH:
        raise Failed(
            f"{GENERATIONS} generations took {(after - before) / MIB:.1f} MiB more; allowed "
            f"{GROWTH / MIB:.0f} MiB"
        )


def check_full_disk(files: Files, folder: Path, rng: random.Random) -> None:
    """A file that cannot be written whole: one line that names it, and nothing half-written."""
    words = rng.choice(files.commands(folder))
    limit = round(10 ** rng.uniform(0.5, 6))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with _limit(resource.RLIMIT_FSIZE, limit):
        code, text = _command(words)
    what = f"{words[0]} --out {Path(words[-1]).name} with files of {limit} bytes at most"
    _check_exit(what, code, text)
    if code == 1 and not names_place(text, folder):
        raise Failed(f"{what}: the message does not name the file: {text[:300]}")
    left = [path.name for path in folder.rglob("*.tmp")]
    if left:
        raise Failed(f"{what}: leaves {left}")
    _check_whole(what, folder)


def names_place(text: str, folder: Path) -> bool:
    """Whether a message names a file in the folder, or where a file without a name lies.

    Locks of processes that read images lie in shared memory; the list of what they read is an
    unnamed temporary file.
    """
    unnamed = f"{tempfile.gettempdir()}: the list of what workers read"
    return any(place in text for place in (str(folder), "/dev/shm", unnamed))


def _check_whole(what: str, folder: Path) -> None:
    """Whatever lies in the folder can be read."""
    import torch
    from PIL import Image
    from safetensors.torch import load_file

    readers: dict[str, Callable[[Path], object]] = {
        ".png": lambda path: Image.open(path).load(),
        ".safetensors": load_file,
        ".pt": lambda path: torch.load(path, weights_only=True),
        ".pth": lambda path: torch.load(path, weights_only=True),
    }
    for path in folder.rglob("*"):
        if path.suffix in readers and path.is_file():
            try:
                readers[path.suffix](path)
            except Exception as error:
                raise Failed(f"{what}: {path.name} is half-written: {error}") from None


def check_low_memory(files: Files, folder: Path, rng: random.Random) -> None:
    """Little memory: the command ends with one line; nothing crashes."""
    # Not a training: torch's autograd ends the process where it cannot start its thread.
    words = rng.choice([words for words in files.commands(folder) if words[0] != "train-vae"])
    if words[0] == "generate":
        words = [*words, "--count", str(rng.choice((1, 100, 3000)))]
    more = round(10 ** rng.uniform(5, 8.7))
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    with _limit(resource.RLIMIT_AS, now + more):
        code, text = _command(words)
    what = f"{' '.join(words[:1] + words[3:])} with {more / MIB:.1f} MiB more"
    _check_exit(what, code, text)
    _check_whole(what, folder)


@contextlib.contextmanager
def _limit(kind: int, soft: int) -> Iterator[None]:
    _, hard = resource.getrlimit(kind)
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def _command(words: list[str]) -> tuple[int, str]:
    from variant.cli.main import main
    from variant.cli.messages import one_line_warnings

    with (
        standard_error() as read,
        contextlib.redirect_stdout(io.StringIO()),
        one_line_warnings(),
    ):
        try:
            code = main(words)
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, read()


def _check_exit(what: str, code: int, text: str) -> None:
    lines = [line for line in own_lines(text) if not line.startswith("variant: warning: ")]
    shown = " | ".join(lines)[:300]
    if code not in (0, 1) or (code == 1 and len(lines) != 1):
        raise Failed(f"{what}: exit code {code}, {len(lines)} lines: {shown}")
    if code == 1 and "--debug shows where" in text:
        raise Failed(f"{what}: an error that is not foreseen: {shown}")


# check_threads is a test of test_pressure.py and runs in pytest's own process: torch's set-up of
# threads is not reliable in a forked one.
KINDS = {
    "growth": check_growth,
    "full disk": check_full_disk,
    "low memory": check_low_memory,
}
# Most cases are quick ones. One of growth takes as long as 24 of them, and draws every option.
ORDER = ("growth", *("full disk", "low memory") * 20)


def check(files: Files, seed: int, case: int) -> None:
    folder = Path(tempfile.mkdtemp(prefix=f"pressure{case}-", dir=files.root))
    try:
        KINDS[ORDER[case % len(ORDER)]](files, folder, forked.rng_of(seed, case))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    made: list[Files] = []
    folders: list[tempfile.TemporaryDirectory[str]] = []

    def prepare(arguments: argparse.Namespace) -> str:
        folder = tempfile.TemporaryDirectory(prefix="pressure-")
        folders.append(folder)
        hostile_contents.import_everything()
        made.append(Files(Path(folder.name)))
        os.chdir(folder.name)
        return ""

    sys.path[:0] = [os.getcwd(), str(Path(__file__).parent.parent)]
    return forked.main(
        MODULE,
        lambda seed, case: check(made[0], seed, case),
        forked.option("PRESSURE", 40),
        LIMITS,
        prepare=prepare,
        describe=lambda seed, case: ORDER[case % len(ORDER)],
    )


if __name__ == "__main__":
    raise SystemExit(main())
