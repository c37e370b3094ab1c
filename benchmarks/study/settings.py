"""The settings of the study: the TOML files of ``settings/`` as plain dataclasses."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from variant.errors import UserError
from variant.training.recipe import Recipe, parse_recipe

FOLDER = Path(__file__).parent / "settings"
RECIPE, STUDY = FOLDER / "recipe.toml", FOLDER / "study.toml"
SMOKE = FOLDER / "profiles" / "smoke.toml"
BASE = "base"
# full, d2 with the run's bridge, d2 with another one, d2 at some scales of the full network.
SCHEDULE = re.compile(
    r"full|d(?P<depth>\d+)(?:@b(?P<bridge>\d+)|@(?P<zone>early|middle|late|all))?"
)


@dataclass(frozen=True)
class Run:
    """One run of one seed.

    part: whose result file it belongs to.
    phases: relative lengths of the three phases of training; () trains nothing.
    work: of the training, in steps of the full network.  epoch: steps of an epoch.
    recipe: keys of the base recipe that it changes.
    tokens: name of the tokens that it is trained on.
    model: the run whose model is measured, for a run that trains nothing.
    same_as: the run whose results these are, for a row of several parts; both measure the same.
    schedules, generate: schedules of the losses, and those that generate images.
    permuted: the classes are permuted, so that the run is wrong.
    kv_dtype: of keys and values.
    search: images of ``variant search`` on the run's model; 0 searches nothing.
    """

    part: str
    name: str
    seed: int
    schedules: tuple[str, ...]
    generate: tuple[str, ...]
    phases: tuple[int, ...] = ()
    work: float = 0.0
    epoch: int = 10
    recipe: dict[str, Any] = field(default_factory=dict)
    tokens: str = "plain"
    model: str | None = None
    same_as: str | None = None
    permuted: bool = False
    kv_dtype: str | None = None
    search: int = 0

    @property
    def trains(self) -> bool:
        return bool(self.phases)

    def overrides(self) -> dict[str, Any]:
        """What makes the run another than its neighbours, for its row of the results."""
        values: dict[str, Any] = {"phases": list(self.phases), "work": self.work, **self.recipe}
        for name in ("model", "same_as", "kv_dtype"):
            if getattr(self, name) is not None:
                values[name] = getattr(self, name)
        if self.search:
            values["search"] = self.search
        if self.permuted:
            values["permuted"] = True
        if self.tokens != "plain":
            values["tokens"] = self.tokens
        return values


@dataclass(frozen=True)
class Part:
    """One result file.

    pairs: (run, against) of every paired difference.
    """

    name: str
    title: str
    runs: tuple[Run, ...]
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Study:
    """All settings.  values: of study.toml and the profile.  recipe: values of the base recipe."""

    values: dict[str, Any]
    recipe: dict[str, Any]
    parts: tuple[Part, ...]

    def runs(self) -> list[Run]:
        """Every run that has something to do, in the order of their value: part by part."""
        return [run for part in self.parts for run in part.runs if run.same_as is None]

    def find(self, name: str, seed: int) -> Run:
        """The run of a name that has results of its own."""
        for run in self.runs():
            if run.name == name and run.seed == seed:
                return run
        raise UserError(f"study: there is no run {name} of seed {seed}")

    def recipe_of(self, changes: Mapping[str, Any]) -> Recipe:
        """The base recipe with some keys changed."""
        return parse_recipe(merged(self.recipe, changes), "study")


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries, the second over the first; neither is changed."""
    result = copy.deepcopy(dict(values))
    for key, value in changes.items():
        is_section = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if is_section else copy.deepcopy(value)
    return result


def identity(*values: Any) -> str:
    """SHA-256 of plain values: equal values are the same run, whatever commit reads them."""
    text = json.dumps(values, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def load_study(profile: Path | None = None, only: tuple[str, ...] = ()) -> Study:
    """The study of the settings.

    Args:
        profile: a TOML file whose [study] and [recipe] replace values, for a smaller study.
        only: names of parts and runs; their bases are kept. () is everything.
    Raises:
        UserError: a name that there is not, or a run that cannot be.
    """
    changes = _read(profile) if profile is not None else {}
    values = merged(_read(STUDY), changes.get("study", {}))
    recipe = _read(RECIPE)
    if "data" in changes.get("recipe", {}):
        recipe["data"] = {}  # other data have other keys
    recipe = merged(recipe, changes.get("recipe", {}))
    parts = tuple(_part(name, values) for name in values["parts"])
    study = Study(values, recipe, parts)
    for part in parts:
        for run in part.runs:
            _check(study, run)
    return _only(study, only) if only else study


def _read(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text("utf-8"))


def _part(name: str, values: Mapping[str, Any]) -> Part:
    table = _read(FOLDER / f"{name}.toml")
    limits = values.get("runs", {}).get(name)
    entries = [run for run in table["run"] if limits is None or run["name"] in limits]
    runs = tuple(_run(name, table, entry, values, s) for s in values["seeds"] for entry in entries)
    names = [entry["name"] for entry in entries]
    against = table.get("against")
    pairs: list[tuple[str, str]] = []
    if against is not None and against in names:
        pairs += [(run, str(against)) for run in names if run != against]
    pairs += [(run, other) for run, other in table.get("pairs", []) if run in names]
    return Part(name, table["title"], runs, tuple(pairs))


def _run(
    part: str,
    table: Mapping[str, Any],
    entry: Mapping[str, Any],
    values: Mapping[str, Any],
    seed: int,
) -> Run:
    keys = {**{key: table[key] for key in ("schedules", "generate")}, **entry}
    keys["recipe"] = merged(table.get("recipe", {}), entry.get("recipe", {}))
    if "phases" in keys:
        keys = {"work": values["work"], "epoch": values["epoch"], **keys}
        if part == BASE:
            keys |= values.get("base", {})
    else:
        keys["recipe"] = {}
    for name in ("schedules", "generate", "phases"):
        keys[name] = tuple(keys.get(name, ()))
    return Run(part=part, seed=seed, **keys)


def _check(study: Study, run: Run) -> None:
    for name in (*run.schedules, *run.generate):
        if SCHEDULE.fullmatch(name) is None:
            raise UserError(f"study: {run.name}: there is no schedule {name}")
    if run.tokens not in study.values["tokens"]:
        raise UserError(f"study: {run.name}: there are no tokens {run.tokens}")
    other = run.same_as or run.model
    if other is not None:
        source = study.find(other, run.seed)
        missing = [] if run.same_as is None else set(run.schedules) - set(source.schedules)
        if missing:
            raise UserError(f"study: {run.name}: {other} does not measure {sorted(missing)}")
    elif not run.trains:
        raise UserError(f"study: {run.name}: must train, or name the run whose model it measures")


def _only(study: Study, names: tuple[str, ...]) -> Study:
    known = {part.name for part in study.parts} | {run.name for run in study.runs()}
    unknown = sorted(set(names) - known)
    if unknown:
        raise UserError(f"study: there is no {unknown[0]}; there are {', '.join(sorted(known))}")
    needed = {BASE}
    for part in study.parts:
        for run in part.runs:
            if part.name in names or run.name in names:
                needed |= {name for name in (run.name, run.model, run.same_as) if name is not None}
    parts = tuple(
        Part(p.name, p.title, tuple(r for r in p.runs if r.name in needed), p.pairs)
        for p in study.parts
    )
    return Study(study.values, study.recipe, tuple(part for part in parts if part.runs))
