"""The reference of recipe keys, and recipes printed as TOML."""

import dataclasses
import itertools
import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from variant.errors import UserError
from variant.models.config import to_plain
from variant.training.recipe import Recipe, load_recipe, recipe_names
from variant.training.recipe_reference import (
    documented,
    nested_sections,
    recipe_toml,
    reference,
    sections,
    toml_value,
    type_text,
)

ROOT = Path(__file__).parents[2]
TITLES = [section.title for section in sections()]


def documented_keys(title):
    """{key: default} of one table of the page."""
    text = (ROOT / "docs" / "recipes.md").read_text()
    heading = f"`[{title}]`" if title else "Top level"
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \| ([^|]+?) \|", section, re.MULTILINE))


def written_default(field):
    if dataclasses.is_dataclass(field.default_factory):
        return "its own"
    if field.default_factory is not dataclasses.MISSING:
        return json.dumps(to_plain(field.default_factory()))
    if field.default is dataclasses.MISSING:
        return "-"
    value = to_plain(field.default)
    return "none" if value is None else json.dumps(value)


def test_the_page_has_every_section_and_every_key():
    top = {field.name for field in dataclasses.fields(Recipe)} - set(TITLES)
    every = [part for section in sections() for part in (section, *nested_sections(section))]
    assert {"vae_training.perceptual", "vae_training.adversary"} <= {each.title for each in every}
    for section in every:
        fields = [f for f in dataclasses.fields(section.kind) if section.title or f.name in top]
        expected = {field.name: written_default(field) for field in fields}
        assert documented_keys(section.title) == expected, section.title
    assert {field.name for field in dataclasses.fields(Recipe)} == set(TITLES[1:]) | top


def test_every_number_of_every_section_has_a_range_or_choices():
    every = [part for section in sections() for part in (section, *nested_sections(section))]
    assert {"vae", "schedule", "vae_training.adversary"} <= {section.title for section in every}
    without = [
        f"{section.title}.{key.name}: {key.values}"
        for section in every
        for key in section.keys
        if re.search(r"integer|number", key.values) and not re.search(r"[<>=\[]| or \d", key.values)
    ]
    assert without == []


def test_ranges_of_the_vq_vae_are_those_that_it_checks():
    """The bounds stand once, in the types of the fields."""
    values = {
        key.name: key.values for each in sections() if each.title == "vae" for key in each.keys
    }
    assert values["ch_mult"] == "list of integers, in [1, 64]"
    assert values["patch_nums"] == "list of integers, >= 1"
    assert values["in_channels"] == "integer, 1 or 3"
    config = load_recipe("digits").vae
    for name in ("vocab_size", "z_channels", "num_res_blocks", "share_quant_resi", "quant_resi",
                 "quant_conv_ks", "beta"):  # fmt: skip
        low, high = re.search(r"in \[(\S+), (\S+)\]$", values[name]).groups()
        low, high = (float(text.replace(",", "")) for text in (low, high))
        kind = type(getattr(config, name))
        for value in (low, high):
            if (name, value) != ("share_quant_resi", high):  # more than there are scales
                dataclasses.replace(config, **{name: kind(value)})
        for value in (low - 1, high + 1):
            with pytest.raises(ValueError, match=f"{name} must be .* in "):
                dataclasses.replace(config, **{name: kind(value)})


@pytest.mark.parametrize(
    ("override", "least", "most"),
    [("schedule.depths=[{}]", 2, 8), ("schedule.bridge={}", 0, 6), ("schedule.bridges=[{}]", 0, 6)],
)
def test_ranges_of_a_schedule_are_those_of_its_model(override, least, most):
    assert len(load_recipe("digits").vae.patch_nums) == 6 or most == 8
    for value in (least, most):
        load_recipe("digits", overrides=(override.format(value),))
    for value in (least - 1, most + 1):
        with pytest.raises(UserError, match="must be "):
            load_recipe("digits", overrides=(override.format(value),))


def test_the_page_is_what_the_dataclasses_give():
    text = (ROOT / "docs" / "recipes.md").read_text()
    assert text == reference(), "docs/recipes.md: run `make docs-results`"


@pytest.mark.parametrize(
    "section",
    [part for section in sections() for part in (section, *nested_sections(section))],
    ids=lambda section: section.title,
)
def test_every_key_and_section_is_documented(section):
    assert [key.name for key in section.keys if len(key.text) < 5] == []
    texts = [key.text for key in section.keys]
    assert len(set(texts)) == len(texts)  # of its own, not one for several keys
    assert len(section.text) > 10
    assert section.kind.__name__ not in section.text


def test_keys_are_read_from_a_docstring():
    @dataclass
    class Sample:
        """Two things.

        first: a number,
            of two lines: here.  second, third: both
            at once.

        More words, fourth: is no key here.
        """

        first: int
        second: int
        third: int

    assert documented(Sample) == (
        "Two things",
        {
            "first": "a number, of two lines: here",
            "second": "both at once",
            "third": "both at once",
        },
    )


def test_a_recipe_is_printed_without_docstrings(monkeypatch, tmp_path):
    # As under python -OO.
    recipe = load_recipe("digits")
    for section in sections():
        monkeypatch.setattr(section.kind, "__doc__", None)
    sections.cache_clear()
    try:
        (tmp_path / "digits.toml").write_text(recipe_toml(recipe))
    finally:
        sections.cache_clear()
    assert load_recipe(str(tmp_path / "digits.toml")) == recipe


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (int, "integer"),
        (float | None, "number"),
        (tuple[int, ...], "list of integers"),
        (tuple[tuple[int, ...], ...], "list of lists of integers"),
        (bool, "true or false"),
    ],
)
def test_a_type_has_words(hint, text):
    assert type_text(hint) == text


@pytest.mark.parametrize("name", recipe_names())
def test_a_printed_recipe_has_every_key_and_loads_as_the_same(name, tmp_path):
    recipe = load_recipe(name)
    text = recipe_toml(recipe)
    path = tmp_path / "printed.toml"
    path.write_text(text)
    assert load_recipe(path) == recipe
    for section in sections():
        for key in section.keys:
            if key.values != "section":
                assert re.search(rf"^(# )?{key.name} (= |\(not set)", text, re.MULTILINE), key


def test_every_line_of_a_printed_recipe_is_a_key_with_its_comment():
    lines = recipe_toml(load_recipe("digits")).splitlines()
    for before, line in itertools.pairwise(lines):
        if re.match(r"\w+ = ", line):
            assert before.startswith("# "), line


@pytest.mark.parametrize(
    "value",
    ["plain", 'a "b" \\ c', "tab\t line\n", "é\x7f\x01 🙂", 1, True, 0.1, 1e-300, [[1], []]],
)
def test_values_survive_toml(value):
    assert tomllib.loads(f"x = {toml_value(value)}") == {"x": value}
