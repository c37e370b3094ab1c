"""A table of ptxas's output for each kernel: registers, shared memory and spills.

    python ptxas_report.py compile LOG nvcc ...      runs nvcc, keeps ptxas's lines in LOG
    python ptxas_report.py table --spills FILE [--on-spill fail|warn] LOG...
                                                     prints the table and each spill that is new

A spilled register costs memory traffic in the innermost loop, and only this report shows it.
spills.txt lists the accepted spills, one per line: architecture, kernel (a part of its name),
colon, reason.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
# Lines of ptxas -v that only repeat the table's contents.
CHATTER = re.compile(
    r"^ptxas info\s*:|bytes stack frame|^\s*Function properties for|^ptxas \S* ?info\s*:"
)


@dataclass(frozen=True)
class Kernel:
    """One kernel compiled for one architecture; bytes of shared memory are the static ones."""

    arch: str
    name: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int

    @property
    def spills(self) -> bool:
        return self.spill_store_bytes > 0 or self.spill_load_bytes > 0


@dataclass(frozen=True)
class Excuse:
    """One line of spills.txt."""

    arch: str
    part: str
    reason: str

    def covers(self, kernel: Kernel) -> bool:
        return self.arch == kernel.arch and self.part in kernel.name


def parse(text: str) -> list[Kernel]:
    """Every kernel that a log of `ptxas -v` describes.

    Raises:
        ValueError: a kernel has no line of registers, so the log has an unknown format.
    """
    kernels = []
    parts = re.split(r"(?=^.*Compiling entry function)", text, flags=re.MULTILINE)
    for part in parts:
        entry = ENTRY.search(part)
        if entry is None:
            continue
        used, spills, shared = USED.search(part), SPILLS.search(part), SHARED.search(part)
        if used is None or spills is None:
            raise ValueError(f"ptxas_report: no registers or spills given for {entry.group(1)}")
        kernels.append(
            Kernel(
                arch=entry.group(2),
                name=entry.group(1),
                registers=int(used.group(1)),
                shared_bytes=int(shared.group(1)) if shared else 0,
                stack_bytes=int(spills.group(1)),
                spill_store_bytes=int(spills.group(2)),
                spill_load_bytes=int(spills.group(3)),
            )
        )
    return kernels


def readable(names: list[str]) -> dict[str, str]:
    """C++ names without namespaces and argument lists; unchanged if c++filt is missing."""
    if not shutil.which("c++filt") or not names:
        return {name: name for name in names}
    # nvcc puts a hash of the file into the name of an anonymous namespace.
    shown = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return {name: _shorten(text) for name, text in zip(names, shown, strict=True)}


def _shorten(text: str) -> str:
    text = text.replace("(anonymous namespace)::", "").removeprefix("void ")
    text = re.sub(r"_GLOBAL__N_\w*::|\bvariant::", "", text)
    depth = 0
    for at, letter in enumerate(text):
        if letter == "(" and depth == 0:
            return text[:at]
        depth += {"<": 1, ">": -1}.get(letter, 0)
    return text


def read_excuses(text: str) -> list[Excuse]:
    """The lines of spills.txt.

    Raises:
        ValueError: a line without architecture, kernel and reason.
    """
    excuses = []
    for line in text.splitlines():
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        what, colon, reason = line.partition(": ")
        arch, _, part = what.partition(" ")
        if not (colon and part and reason.strip()):
            raise ValueError(f'spills.txt: expected "sm_NN kernel: reason"; got "{line}"')
        excuses.append(Excuse(arch, part.strip(), reason.strip()))
    return excuses


def table(kernels: list[Kernel]) -> str:
    """One line per kernel and architecture."""
    rows = [("kernel", "arch", "registers", "shared", "stack", "spill st/ld")]
    for k in sorted(kernels, key=lambda k: (k.name, k.arch)):
        rows.append(
            (
                k.name,
                k.arch,
                str(k.registers),
                str(k.shared_bytes),
                str(k.stack_bytes),
                f"{k.spill_store_bytes}/{k.spill_load_bytes}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def complaints(kernels: list[Kernel], excuses: list[Excuse]) -> list[str]:
    """Spills that spills.txt does not list, and lines of spills.txt that are no longer needed."""
    problems = [
        f"{k.name} spills registers on {k.arch} ({k.spill_store_bytes} bytes stored, "
        f"{k.spill_load_bytes} loaded): use fewer, or list it in spills.txt with the reason"
        for k in kernels
        if k.spills and not any(excuse.covers(k) for excuse in excuses)
    ]
    archs = {k.arch for k in kernels}
    problems += [
        f'spills.txt: "{excuse.arch} {excuse.part}" spills no more; remove the line'
        for excuse in excuses
        if excuse.arch in archs and not any(excuse.covers(k) and k.spills for k in kernels)
    ]
    return problems


def compile_and_keep(log: Path, command: list[str]) -> int:
    """Run nvcc; pass its diagnostics on to stderr and write ptxas's statistics to the log."""
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    for line in done.stderr.splitlines():
        if not CHATTER.search(line):
            print(line, file=sys.stderr)
    if done.returncode == 0:
        log.write_text(done.stderr)
    return done.returncode


def report(logs: list[Path], spills: Path, on_spill: str) -> int:
    """Print the table; return 1 if there are problems and ``on_spill`` is "fail"."""
    kernels = [kernel for log in logs for kernel in parse(log.read_text())]
    names = readable([kernel.name for kernel in kernels])
    kernels = [Kernel(**{**vars(k), "name": names[k.name]}) for k in kernels]
    print(table(kernels))
    problems = complaints(kernels, read_excuses(spills.read_text()))
    word = "error" if on_spill == "fail" else "warning"
    for line in problems:
        print(f"ptxas_report: {word}: {line}", file=sys.stderr)
    return 1 if problems and on_spill == "fail" else 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    compiling = commands.add_parser("compile")
    compiling.add_argument("log", type=Path)
    compiling.add_argument("nvcc", nargs=argparse.REMAINDER)
    printing = commands.add_parser("table")
    printing.add_argument("--spills", type=Path, required=True)
    # A build for a GPU whose spills were never measured must not fail: it warns.
    printing.add_argument("--on-spill", choices=("fail", "warn"), default="fail")
    printing.add_argument("logs", type=Path, nargs="+")
    options = parser.parse_args(arguments)
    if options.command == "compile":
        return compile_and_keep(options.log, options.nvcc)
    return report(options.logs, options.spills, options.on_spill)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
