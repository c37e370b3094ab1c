"""How messages name settings that differ."""

import pytest

from variant.differences import change_texts, differences, listed


def test_every_value_of_nested_settings_is_compared():
    old = {"seed": 0, "data": {"hflip": 0.5, "mixup": 0.2}, "gone": None, "list": [1]}
    new = {"seed": 1, "data": {"hflip": 0.5, "mixup": 0.1}, "new": "x", "list": {"a": 1}}
    assert list(differences(old, new)) == [
        ("seed", 0, 1),
        ("data.mixup", 0.2, 0.1),
        ("list", [1], {"a": 1}),
        ("new", None, "x"),
    ]


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (0, 1.5, "0 -> 1.5"),
        (None, "a\nb", r"None -> 'a\nb'"),
        ("x" * 70, "y" * 70, f"'{'x' * 59}... -> '{'y' * 59}..."),
        # Shortened from their beginnings, these would be equal.
        (
            list(range(1000)),
            [*range(500), 7, *range(501, 1000)],
            "...496, 497, 498, 499, 500, 501, 502, 503, 504, 505, 506, 507, ... -> "
            "...496, 497, 498, 499, 7, 501, 502, 503, 504, 505, 506, 507, 50...",
        ),
        ([1] * 30, [1] * 31, f"...{' 1,' * 6} 1] -> ...{' 1,' * 7} 1]"),
    ],
)
def test_long_values_are_shown_where_they_differ(before, after, text):
    (shown,) = change_texts([("key", before, after)])
    assert shown == f"key {text}"


def test_of_many_texts_the_first_are_listed():
    assert listed(["a", "b"]) == listed(["a", "b"], 2) == "a, b"
    assert listed(["a", "b", "c"], 2, "; ") == "a; b and 1 more"
