"""``variant recipe``: write, show and check recipes."""

from __future__ import annotations

import re
import shlex
import sys
import warnings
from pathlib import Path

from variant.cli.options import Recipe as Options
from variant.cli.output import check_file, console
from variant.cli.words import option_words
from variant.errors import UserError
from variant.files import atomic_write
from variant.paths import printable
from variant.training.new_recipe import Parts, find_parts, new_recipe, remove_split, split
from variant.training.overrides import known_overrides, override
from variant.training.recipe import (
    Recipe,
    load_recipe,
    parse_recipe,
    recipe_names,
    recipe_problems,
    recipe_values,
)
from variant.training.recipe_reference import recipe_toml
from variant.training.run_summary import RunSummary
from variant_kernels.wording import counted

MAX_PROBLEMS = 100  # that are listed
NEW_OPTIONS = ("data", "out", "base", "split")


def recipe(command: Options) -> None:
    """Write a recipe for a folder of images; print one with every key; or check one."""
    if command.action == "new":
        _new(command)
        return
    given = [f"--{name}" for name in NEW_OPTIONS if getattr(command, name) is not None]
    if given:
        raise UserError(f"recipe {command.action}: {given[0]} is for `variant recipe new`")
    if not command.recipe:
        raise UserError(
            f"recipe {command.action}: needs the name of a packaged recipe "
            f"({', '.join(recipe_names())}) or a TOML file"
        )
    if command.action == "show":
        text = recipe_toml(load_recipe(command.recipe, overrides=command.overrides))
        _print_toml(text)
    else:
        _check(command)


def _new(command: Options) -> None:
    if command.data is None:
        raise UserError("recipe new: needs --data FOLDER, the folder of images")
    if command.recipe:
        raise UserError(
            f"recipe new: takes no name; got {command.recipe}. --base names a recipe whose sizes "
            "are taken, --out the file to write"
        )
    if command.out is not None:
        if str(command.out) in recipe_names():
            raise UserError(
                f"recipe new: --out {command.out} is the name of a packaged recipe, which is taken "
                f"in place of a file; give another name, as {command.out}.toml"
            )
        if command.out.exists():
            raise UserError(f"{command.out}: exists; choose another file, or remove it")
        check_file(command.out)
    if command.base is not None:
        load_recipe(command.base)  # refused before links are made
    folder = command.data
    if command.split is not None:
        split(folder, command.split)
        folder = command.split
    try:
        parts = find_parts(folder)
        name = command.out.stem if command.out is not None else folder.resolve().name
        made = new_recipe(name, parts, command.base)
        if command.overrides:
            made = parse_recipe(override(made.to_dict(), command.overrides, Recipe), name)
    except BaseException:
        if command.split is not None:
            remove_split(command.split)
        raise
    text = _header(command, parts, made) + "\n" + recipe_toml(made, every_key=False)
    summary = RunSummary(made)
    for problem in summary.problems:  # of a base whose run is too long or large for these images
        warnings.warn(f"recipe new: change before training: {problem}", RuntimeWarning, 2)
    if command.out is None:
        _print_toml(text)
        return
    with atomic_write(command.out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    out = console()
    for title, line in summary.lines():
        out.print(f"{title:12} {line}")
    out.print(f"wrote {command.out}; next: {_commands(command.out, made)[0]}")


def _print_toml(text: str) -> None:
    """Print TOML with an escape for each character that standard output cannot encode.

    The stream's own replacement, ``\\xe9``, is no TOML. In comments an escape has no meaning, but
    does no harm.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = re.sub(r"[^\0-\x7f]", lambda match: f"\\U{ord(match[0]):08x}", text)
    sys.stdout.write(text)


def _header(command: Options, parts: Parts, made: Recipe) -> str:
    classes = counted(len(parts.classes), "class")
    lines = [
        f"Written by `variant recipe new` for {parts.num_train:,} training and "
        f"{counted(parts.num_held_out, 'held-out image')} in {classes}.",
        f"Sizes are those of {command.base}."
        if command.base
        else "The sizes are a starting point for as many images; they have not been tuned.",
        "Keys that are left out have their defaults; `variant recipe show FILE` prints all.",
        "Train with:",
        *(f"  {text}" for text in _commands(command.out or Path("FILE.toml"), made)),
    ]
    # A path may hold a line break, which ends a comment, and what TOML has in none.
    return "".join("# {}\n".format(printable(line).replace("\n", "\\n")) for line in lines)


def _commands(path: Path, made: Recipe) -> list[str]:
    """The commands that train the recipe of a file."""
    words = [*option_words("--recipe", path), "--out", f"runs/{path.stem}"]
    names = ("train",) if made.vae_training.weights is not None else ("train-vae", "train")
    return [shlex.join(["variant", name, *words]) for name in names]


def _check(command: Options) -> None:
    out = console()
    known, problems = known_overrides(command.overrides, Recipe)
    problems += recipe_problems(recipe_values(command.recipe, known))
    if not problems:
        summary = RunSummary(load_recipe(command.recipe, overrides=command.overrides))
        for name, text in summary.lines():
            out.print(f"{name:12} {text}")
        problems = summary.problems
    for problem in problems[:MAX_PROBLEMS]:
        out.print(f"problem: {problem}")
    if problems:
        count = counted(len(problems), "problem")
        more = "" if len(problems) <= MAX_PROBLEMS else f" as far as the first {MAX_PROBLEMS}"
        raise UserError(f"{command.recipe}: has {count}, listed above{more}")
