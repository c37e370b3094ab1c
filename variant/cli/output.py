"""Shared by several commands: consoles, tables, sizes as text, files to write. Imports no torch."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from variant.bench.result_file import result_text, write_result
from variant.errors import UserError
from variant.paths import foreign_name, path_kind, printable, shown
from variant_kernels.wording import counted

# Room in a file's name for what a temporary file or folder of ``variant.files`` adds to it; the
# usual limit is 255 bytes.
NAME_BYTES, TEMPORARY_BYTES = 255, 24
STANDARD_OUTPUT = Path("-")
UNBOUNDED = 10_000  # columns, more than any table has
CUT = "…"  # rich writes it in place of what it cuts
# How a file of --json begins. Any other file may be a model's config.json, and is not replaced.
RESULT = re.compile(
    rb'\s*\{\s*"format": "variant-(?:plan|train-plan|info|generated|sampled|eval|eval-depths|'
    rb'eval-compare|search|engine-bench|warm)-\d+"'
)
RESULT_BYTES = 200
# Commands whose work several processes share: torchrun starts them.
SHARED = ("sample", "tokenize", "train", "train-vae")


class _Console(Console):
    """rich's console; a closed standard output is an error like any other."""

    def on_broken_pipe(self) -> None:
        """In place of an exit without a message."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE), "standard output")

    def render_str(self, text: str, **options: Any) -> Text:
        """As rich does, of texts and of the cells of tables, which may come from any file."""
        return super().render_str(printable(text), **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich prints; but a table is so wide that no number is cut, even if its lines wrap."""
        width = self.width
        try:
            for each in objects:
                if isinstance(each, Table):
                    self._widen(each)
            super().print(*objects, **options)
        finally:
            self.width = width

    def _widen(self, rows: Table) -> None:
        """Set the least width, from the present one on, at which rich cuts nothing."""
        needed = Measurement.get(self, self.options.update(max_width=UNBOUNDED), rows)
        self.width = max(self.width, needed.minimum)
        while self.width < needed.maximum and any(
            CUT in segment.text for line in self.render_lines(rows) for segment in line
        ):
            self.width += 1


def console(json_file: Path | None = None, *, stderr: bool = False, command: str = "") -> Console:
    """Standard output; plain and 120 columns wide where it is not a terminal.

    Of the processes that share a command's work, only the first prints there.

    Args:
        command: its name. The variable RANK says nothing to a command that shares no work: clusters
            set it for everything that runs on a machine.
        json_file: that of ``--json``. If it is standard output, nothing else may be printed there.
        stderr: print on standard error in that case, and not nowhere.
    """
    for_machines = json_file == STANDARD_OUTPUT
    # No markup and no emoji: file names may hold brackets, or a word between colons.
    out = _Console(
        highlight=False,
        soft_wrap=True,
        markup=False,
        emoji=False,
        quiet=(for_machines and not stderr)
        or (command in SHARED and os.environ.get("RANK", "0") != "0"),
        stderr=for_machines and stderr,
    )
    if not out.is_terminal:
        out.width = 120
    return out


def table(title: str, *columns: str) -> Table:
    """A table whose columns are right-aligned numbers."""
    result = Table(title=Text(printable(title)), title_justify="left", header_style="bold")
    for column in columns:
        result.add_column(column, justify="right")
    return result


def mebibytes(count: float) -> str:
    """``1,860 MiB``; small sizes in KiB, smaller ones in bytes."""
    if count < 2**10:
        return counted(round(count), "byte")
    if count < 2**20:
        return f"{count / 2**10:,.0f} KiB"
    return f"{count / 2**20:,.1f} MiB" if count < 100 * 2**20 else f"{count / 2**20:,.0f} MiB"


def check_file(path: Path) -> None:
    """Fails before the work if a file cannot be written there; creates nothing.

    Raises:
        UserError: it cannot.
    """
    # In these folders new files cannot be made or mean something else; /dev/stdout is a link.
    folders = os.path.realpath(path), f"{os.path.realpath(path.parent)}/"
    system = any(map(_is_system, folders))
    if system or (path.exists() and not path.is_file()):
        what = "is a folder" if path.is_dir() else "is no plain file"
        raise UserError(f"{path}: cannot be written: {what}")
    check_folder(path.parent, path)


def _is_system(path: str) -> bool:
    return path.startswith(("/dev/", "/proc/", "/sys/")) and not path.startswith("/dev/shm/")


def check_named(op: str, out: Path, ending: str) -> None:
    """Refuses an ending without a name, as of ``--out $NAME.png``: it would be a hidden folder.

    Raises:
        UserError: it is one.
    """
    if out.name.lower() == ending:
        raise UserError(f"{op}: --out must have a name before {ending}; got {out}")


def has_ending(path: Path) -> bool:
    """Whether a name ends like that of a file, as x.gif; run-0.5 and v1.0 are names of folders."""
    return re.fullmatch(r"\.[A-Za-z]\w{0,15}", path.suffix) is not None


def check_folder(path: Path, target: Path | None = None) -> None:
    """Fails before the work if a file cannot be written to this folder, which may not exist yet.

    Args:
        target: the file, for the message.
    Raises:
        UserError: it cannot.
    """
    nearest = path
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        reason = "no permission" if nearest.is_dir() else "is not a folder"
        raise UserError(f"{target or path}: cannot be written: {nearest}: {reason}")


def check_own_folder(op: str, folder: Path, is_own: Callable[[str], bool]) -> None:
    """Fails before the work if files of a command would be mixed with files of another kind.

    Args:
        folder: of ``--out``, which may not exist yet.
        is_own: whether the command writes files of this name into its folder.
    Raises:
        UserError: the folder holds files, but none of this command and not only results of --json.
    """
    other = foreign_name(folder, is_own, lambda name: not _is_result(folder / name))
    if other is not None:
        raise UserError(
            f"{op}: --out must be a new folder or one of an earlier `variant {op}`; {folder} holds "
            f"{shown(other)}"
        )


def _is_result(path: Path) -> bool:
    """Whether ``--json`` wrote a file."""
    if path_kind(path) != "file":
        return False
    with path.open("rb") as file:
        return RESULT.match(file.read(RESULT_BYTES)) is not None


@contextmanager
def checked_path(path: Path) -> Iterator[None]:
    """Turns what the system says about a path within the block into a UserError."""
    try:
        longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
        if longest > NAME_BYTES - TEMPORARY_BYTES:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def check_json(op: str, path: Path | None) -> None:
    """Fails before the work if the file of ``--json`` cannot be written, or must not.

    Raises:
        UserError: it cannot, or it exists and holds anything but an earlier result.
    """
    if path is None or path == STANDARD_OUTPUT:
        return
    with checked_path(path):
        if not path.name:
            raise UserError(f"{op}: --json must name a file, or - for standard output; got {path}")
        check_file(path)
        if path.exists() and path.stat().st_size and not _is_result(path):
            raise UserError(
                f"{op}: --json must name a new file or one that --json wrote; {path} holds "
                "something else"
            )


def check_apart(
    op: str,
    files: Mapping[str, Path | None],
    out: Path | None = None,
    is_own: Callable[[str], bool] = lambda name: False,
) -> None:
    """Fails before the work if one file is to be written twice.

    Args:
        files: option -> its file; None and standard output are left out.
        out: folder of ``--out``.
        is_own: whether the command writes files of this name into that folder.
    Raises:
        UserError: two options name one file, or one names a file that ``--out`` writes.
    """
    seen = {} if out is None else {os.path.realpath(out): "--out"}
    for option, path in files.items():
        if path is None or path == STANDARD_OUTPUT:
            continue
        target = os.path.realpath(path)
        if target in seen:
            raise UserError(f"{op}: {option} and {seen[target]} must differ; got {path} twice")
        seen[target] = option
        folder, name = os.path.split(target)
        if out is not None and folder == os.path.realpath(out) and is_own(name):
            raise UserError(f"{op}: {option} must be no file that --out writes itself; got {path}")


def write_json(path: Path | None, value: Mapping[str, Any]) -> None:
    """Write the result of a command where ``--json`` asked for it; None does nothing.

    Raises:
        UserError: the file cannot be written.
    """
    if path is None:
        return
    if path == STANDARD_OUTPUT:
        sys.stdout.write(result_text(value))
        sys.stdout.flush()
    else:
        write_result(path, value)
