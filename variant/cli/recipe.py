"""``variant recipe``: show recipes and check them."""

from __future__ import annotations

import sys

from variant.cli.options import Recipe as Options
from variant.cli.output import console
from variant.errors import UserError
from variant.training.recipe import load_recipe, recipe_names, recipe_problems, recipe_values
from variant.training.recipe_reference import recipe_toml
from variant.training.run_summary import RunSummary


def recipe(command: Options) -> None:
    """Print a recipe with every key, or its mistakes and what its run will be."""
    if not command.recipe:
        raise UserError(
            f"recipe {command.action}: needs the name of a packaged recipe "
            f"({', '.join(recipe_names())}) or a TOML file"
        )
    if command.action == "show":
        text = recipe_toml(load_recipe(command.recipe, overrides=command.overrides))
        sys.stdout.write(text)
    else:
        _check(command)


def _check(command: Options) -> None:
    out = console()
    problems = recipe_problems(recipe_values(command.recipe, command.overrides))
    if not problems:
        summary = RunSummary(load_recipe(command.recipe, overrides=command.overrides))
        for name, text in summary.lines():
            out.print(f"{name:12} {text}")
        problems = summary.problems
    for problem in problems:
        out.print(f"problem: {problem}")
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"{command.recipe}: has {count}, listed above")
