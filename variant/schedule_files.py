"""Schedules as files, and by the name of their depths by scale.

A file holds a model's layers at every scale as JSON: ``{"format": "variant-schedule-1",
"full_depth": 8, "layers": [[0, 1, ..., 7], ..., [0, 7]]}``; a key "about" may say where it comes
from. ``variant search`` writes one. Imports no torch.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from variant.errors import UserError
from variant.models.config import VARConfig
from variant.models.depths import layers_of
from variant.paths import path_kind, read_json, shown
from variant_kernels.arguments import instance
from variant_kernels.plans.depth_schedule import MAX_SCALES, DepthSchedule, check_schedule
from variant_kernels.wording import counted

# 8x4-4-2: depth 8 at four scales, then 4, then 2.
PART = r"(\d{1,4})(?:x(\d{1,4}))?"
NAME = re.compile(rf"{PART}(?:-{PART})*", re.ASCII)


def load_schedule(source: str | os.PathLike[str], config: VARConfig | None = None) -> DepthSchedule:
    """The schedule in a file, or of the depths that a name lists by scale.

    ::

        schedule = variant.load_schedule("schedule.json")
        model.generate([3, 1, 4], depth=schedule)

    Args:
        source: path of a file; with ``config`` also a name such as "8x4-4-2", unless there is a
            file of that name: depth 8 at four scales, then 4, then 2, with the layers that the
            config records for these depths, or evenly chosen ones.
        config: of the model that the schedule must fit; None takes a schedule of any model.
    Raises:
        TypeError: an argument of another type.
        UserError: no such file, or not one of a schedule, or it does not fit the model; a name with
            depths that the model does not have or that rise. One line that names the file.
    """
    if not isinstance(source, str | os.PathLike):
        instance("load_schedule", "source", source, str, "It names a file")
    if config is not None:
        instance("load_schedule", "config", config, VARConfig)
    text = os.fspath(source)
    if not isinstance(text, str):
        instance("load_schedule", "source", text, str, "It names a file")
    try:
        if config is not None and NAME.fullmatch(text) and path_kind(text) is None:
            return _by_name(text, config)
        schedule = DepthSchedule.from_dict(read_json(text))
        if config is not None:
            check_schedule("", schedule, None, config.depth, len(config.patch_nums), "it")
        return schedule
    except (TypeError, ValueError) as error:
        message = re.sub(r"^(?:DepthSchedule\.\w+|VAR\w*\.\w+)?: ", "", str(error))
        raise UserError(f"{shown(text)}: {message}") from None


def save_schedule(
    path: str | os.PathLike[str], schedule: DepthSchedule, about: Mapping[str, Any] | None = None
) -> None:
    """Write a schedule's file, whole or not at all.

    Args:
        about: plain values that say where the schedule comes from.
    Raises:
        TypeError, ValueError: ``about`` holds what JSON cannot represent.
        UserError: it cannot be written.
    """
    from variant.files import atomic_write  # needs torch

    values = schedule.to_dict()
    if about is not None:
        values["about"] = dict(about)
    if found := _not_finite("about", about):
        raise ValueError(
            f"save_schedule: {found[0]} must be finite, as numbers of JSON are; got {found[1]}"
        )
    try:
        text = json.dumps(values, indent=1) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(
            "save_schedule: about must hold text, numbers, booleans, None, lists and dictionaries "
            f"alone; {error}"
        ) from None
    with atomic_write(Path(path)) as temporary:
        temporary.write_text(text)


def _not_finite(where: str, value: Any) -> tuple[str, float] | None:
    """The first place where a value holds a number that is not finite, and that number."""
    if isinstance(value, float):
        return None if math.isfinite(value) else (where, value)
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    places = (_not_finite(f"{where}[{key!r}]", item) for key, item in items)
    return next(filter(None, places), None)


def layers_by_scale(
    source: str, sizes: tuple[int, int] | None = None
) -> list[int] | list[list[int]]:
    """What a recipe's ``schedules`` hold in place of a file or a name.

    Args:
        sizes: layers and scales of the model that a file's schedule must fit; None takes any.
    Returns:
        The depth of each scale of a name such as "8x4-4-2", or the layers of each scale of a file.
    Raises:
        UserError: as :func:`load_schedule`.
    """
    if NAME.fullmatch(source) and path_kind(source) is None:
        try:
            return _depths(source)
        except ValueError as error:
            raise UserError(f"{shown(source)}: {error}") from None
    schedule = load_schedule(source)
    if sizes is not None:
        try:
            check_schedule("", schedule, None, *sizes, "it")
        except ValueError as error:
            raise UserError(f"{shown(source)}{error}") from None
    return [list(layers) for layers in schedule.layers]


def _depths(name: str) -> list[int]:
    """The depth of each scale; at most one more than there may be scales.

    Raises:
        ValueError: a depth of no scales.
    """
    depths: list[int] = []
    for part in name.split("-"):
        depth, _, count = part.partition("x")
        scales = int(count or 1)
        if not scales:
            raise ValueError(f"{part} must be a depth at one scale or more, as {depth}x1")
        depths += [int(depth)] * min(scales, MAX_SCALES + 1 - len(depths))
    return depths


def _by_name(name: str, config: VARConfig) -> DepthSchedule:
    """The schedule of a name.  Raises: ValueError, if the model has none such."""
    scales, depths = len(config.patch_nums), _depths(name)
    if len(depths) != scales:
        raise ValueError(
            f"must have one depth for each of the {counted(scales, 'scale')} of the model; it has "
            f"{len(depths)}, and there is no file of this name"
        )
    layers = [layers_of(config, depth, "") for depth in depths]
    return DepthSchedule.from_depths(layers, full_depth=config.depth)
