"""Names of the classes of a model: their check, and the labels of names."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Sequence
from typing import Any, cast

from variant_kernels.arguments import sequence, shown, typed

MAX_LENGTH = 255  # characters of a name, as many as the name of a folder may have
MAX_LISTED = 10  # names in a message
MAX_DIGITS = 100  # of a number on the command line


def check_class_names(op: str, names: object, num_classes: int) -> tuple[str, ...]:
    """The names of ``num_classes`` classes in the order of their labels, or none.

    Raises:
        TypeError: no list of texts.
        ValueError: another number of names, the same one twice, an empty or a very long one, or one
            that :func:`is_name` refuses.
    """
    items = sequence(names)
    if items is None or not all(isinstance(item, str) for item in items):
        raise TypeError(f"{op}: class_names must be a list of texts; got {typed(names)}")
    if items and len(items) != num_classes:
        raise ValueError(
            f"{op}: class_names must be as many as num_classes ({num_classes}); got {len(items)}"
        )
    for item in items:
        if not 1 <= len(item) <= MAX_LENGTH or not is_name(item):
            raise ValueError(
                f"{op}: class_names must have 1 to {MAX_LENGTH} characters of UTF-8 each, none of "
                f"them a control character; got {shown(item)}"
            )
    if len(set(items)) != len(items):
        twice = next(item for item in items if list(items).count(item) > 1)
        raise ValueError(f"{op}: class_names must differ; got {shown(twice)} twice")
    return tuple(items)


def is_text(name: str) -> bool:
    """Whether a name can be written as UTF-8; that of a folder need not be."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_name(name: str) -> bool:
    """Whether this is text that keeps to its line: a terminal obeys control characters."""
    return is_text(name) and not any(unicodedata.category(c) == "Cc" for c in name)


def label_of(op: str, name: str, word: str, names: Sequence[str]) -> int:
    """The label of a class by its name.

    Args:
        op, name: of the function and of its argument, for the message.
        names: of all classes; empty if the model has none.
    Raises:
        TypeError: the model has no names.  ValueError: no class has this name.
    """
    if not names:
        raise TypeError(
            f"{op}: {name} must be integers, as this model has no class names; got {typed(word)}"
        )
    if word not in names:
        raise ValueError(
            f"{op}: {name} must be names of classes; got {shown(word)}. Known: {listed(names)}"
        )
    return names.index(word)


def labels_of_words(op: str, name: str, words: Sequence[str], names: Sequence[str]) -> list[int]:
    """Labels of the words of a command line: names of classes, numbers, or several with commas.

    A number is a label, also where a class has it as its name. Folders 0 to 11 are the classes "0",
    "1", "10", "11", "2" and so on, so that number 2 is "10".

    Warns:
        RuntimeWarning: a number is the name of a class that has another number.
    Raises:
        ValueError: a word is no number, and no class has it as its name; or words of commas and
            spaces alone, which would mean every class.
    """
    parts = [
        part
        for word in words
        for part in ([word] if word in names else filter(None, map(str.strip, word.split(","))))
    ]
    if words and not parts:
        raise ValueError(f"{op}: {name} must name a class; got {shown(' '.join(words))}")
    other = next((part for part in parts if not _is_number(part)), None)
    if other is not None and not names:
        raise ValueError(
            f"{op}: {name} must be numbers, as this model has no class names; got {shown(other)}"
        )
    for part in dict.fromkeys(filter(_is_number, parts)):
        if part in names and names.index(part) != int(part):
            label = int(part)
            own = f" (named {shown(names[label])})" if 0 <= label < len(names) else ""
            warnings.warn(
                f"{op}: {name} {part} is class number {part}{own}; the class that is named {part} "
                f"has number {names.index(part)}",
                RuntimeWarning,
                stacklevel=2,
            )
    return [int(part) if _is_number(part) else label_of(op, name, part, names) for part in parts]


def numbered(op: str, labels: object, names: Sequence[str]) -> object:
    """Labels with the number in place of each name; anything without names as it is.

    Raises:
        TypeError, ValueError: as :func:`label_of`.
    """
    if getattr(getattr(labels, "dtype", None), "kind", "") in ("U", "O"):  # an array of numpy
        labels = cast("Any", labels).tolist()
    if isinstance(labels, str):
        labels = [labels]
    if not isinstance(labels, list | tuple) or not any(isinstance(x, str) for x in labels):
        return labels
    return [
        label_of(op, "labels", item, names) if isinstance(item, str) else item for item in labels
    ]


def listed(names: Sequence[str]) -> str:
    """The first of the names, and how many follow."""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(_plain(name) for name in names[:MAX_LISTED]) + more


def _plain(name: str) -> str:
    return name if name.isprintable() else repr(name)


def _is_number(word: str) -> bool:
    # Longer than any label: int() refuses thousands of digits.
    return word.isascii() and word.removeprefix("-").isdecimal() and len(word) < MAX_DIGITS
