"""Constructor arguments of the original that no tensor tells, such as the epsilon of its norms.

Each comes from the tensors where they tell it, else from the settings that the file holds, else
from the caller, else it is assumed; two sources that disagree are refused, and every assumed value
is named in one warning.
"""

from __future__ import annotations

import ast
import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from variant.errors import UserError
from variant.tensor_files import read_values, replace_tensors
from variant_kernels.arguments import boolean, integer, integers, real, typed

# In a setting that is a tensor: sides of token maps, at most one for each scale.
MAX_NUMBERS = 1024
# `quant_resi` below this has no residual convolutions in the original code.
NO_CONVOLUTION = 1e-6


def _num_heads(op: str, value: object) -> int:
    return integer(op, "num_heads", value, 1)


def _patch_nums(op: str, value: object) -> tuple[int, ...]:
    sides = integers(op, "patch_nums", value, 1)
    if not sides or any(a >= b for a, b in itertools.pairwise(sides)):
        raise ValueError(f"{op}: patch_nums must be ascending integers; got {typed(value)}")
    return sides


def _norm_eps(op: str, value: object) -> float:
    eps = real(op, "norm_eps", value, 0.0, 1.0)
    if eps == 0:
        raise ValueError(f"{op}: norm_eps must be positive; got {eps}")
    return eps


def _cond_drop_rate(op: str, value: object) -> float:
    return real(op, "cond_drop_rate", value, 0.0, 1.0)


def _drop_path_rate(op: str, value: object) -> float:
    rate = real(op, "drop_path_rate", value, 0.0, 1.0)
    if rate == 1:
        raise ValueError(f"{op}: drop_path_rate must be below 1; got {rate}")
    return rate


def _quant_resi(op: str, value: object) -> float:
    # The original takes the absolute value, and leaves the convolutions out near 0.
    weight = abs(real(op, "quant_resi", value, -1.0, 1.0))
    return 0.0 if weight <= NO_CONVOLUTION else weight


def _using_znorm(op: str, value: object) -> bool:
    return boolean(op, "using_znorm", value)


def _beta(op: str, value: object) -> float:
    return real(op, "beta", value, 0.0)


# The settings of the transformer and of the VQ-VAE, each with the check of its value.
VAR_SETTINGS: dict[str, Callable[[str, object], Any]] = {
    "num_heads": _num_heads,
    "patch_nums": _patch_nums,
    "norm_eps": _norm_eps,
    "cond_drop_rate": _cond_drop_rate,
    "drop_path_rate": _drop_path_rate,
}
VAE_SETTINGS: dict[str, Callable[[str, object], Any]] = {
    "quant_resi": _quant_resi,
    "using_znorm": _using_znorm,
    "beta": _beta,
}
CHECKS = VAR_SETTINGS | VAE_SETTINGS


@dataclass
class Settings:
    """The known settings of one model, and those that were assumed.

    Args:
        where: names the file or the object in messages.
        given: values of the caller; None is not given.
        told: (name, values) of each place in the file that holds settings; other keys are ignored.
        op: the caller's function, for messages about ``given``.
    Raises:
        TypeError, ValueError: a given value is of a wrong type or out of range.
        UserError: the same of a value in the file.
    """

    where: str
    given: Mapping[str, Any] = field(default_factory=dict)
    told: Sequence[tuple[str, Mapping[str, Any]]] = ()
    op: str = "from_var_checkpoint"
    assumed: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known: dict[str, list[tuple[str, Any]]] = {name: [] for name in CHECKS}
        for place, values in self.told:
            for name, check in CHECKS.items():
                if name in values:
                    try:
                        known[name].append((place, check(place, values[name])))
                    except (TypeError, ValueError) as error:
                        raise UserError(f"{self.where}: {error}") from None
        for name, value in self.given.items():
            if name not in CHECKS:
                raise TypeError(
                    f"{self.op}: unknown setting {name!r}; known are {', '.join(CHECKS)}"
                )
            if value is not None:
                known[name].append(("the argument", CHECKS[name](self.op, value)))
        self._known = known
        conflicts = [text for name in known if (text := _conflict(name, known[name]))]
        if conflicts:
            raise UserError(f"{self.where}: {'; '.join(conflicts)}")

    def value(self, name: str, default: Any, shown: Any = None, note: str = "") -> Any:
        """The value of a setting; ``default`` if no source has it, which :meth:`warn` then names.

        Args:
            shown: what the tensors tell; None is nothing.
            note: follows the assumed value in the warning.
        Raises:
            UserError: two sources disagree.
        """
        sources = [] if shown is None else [("the weights", shown)]
        sources += self._known[name]
        if not sources:
            if default is not None:
                self.assumed[name] = f"{name}={default}{note and f' ({note})'}"
            return default
        conflict = _conflict(name, sources)
        if conflict is not None:
            raise UserError(f"{self.where}: {conflict}")
        return sources[0][1]

    def warn(self, *others: Settings, stacklevel: int = 2) -> None:
        """One warning that lists every assumed value of these models; none if there are none.

        Args:
            others: settings of further models of the same call.
            stacklevel: as of ``warnings.warn``, from the caller of this method.
        """
        models = [settings for settings in (self, *others) if settings.assumed]
        if not models:
            return
        assumed = {name: text for settings in models for name, text in settings.assumed.items()}
        where = ", ".join(dict.fromkeys(settings.where for settings in models))
        remedy = "the arguments of these names"
        if self.op == "convert":
            remedy = ", ".join("--" + name.replace("_", "-") for name in assumed)
        warnings.warn(
            f"{where}: assumed {', '.join(assumed.values())}, because nothing tells them; give "
            f"{remedy} if they are wrong",
            stacklevel=stacklevel + 1,
        )


def _conflict(name: str, sources: Sequence[tuple[str, Any]]) -> str | None:
    """The first two places that disagree on a setting; None if there are none."""
    for place, other in sources[1:]:
        first, value = sources[0]
        if not _same(value, other):
            return f"{first} {_has(first)} {name} {value}, but {place} {_has(place)} {other}"
    return None


def _same(one: Any, other: Any) -> bool:
    """Whether two places tell the same; a number may have been rounded to float32 by one."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other


def _has(place: str) -> str:
    return "have" if place == "the weights" else "has"


def _small_values(tensor: Tensor) -> Tensor:
    """The values of a tensor of numbers; a large one, which is no setting, stays unread."""
    return read_values(tensor) if tensor.numel() <= MAX_NUMBERS else tensor


def settings_of_training(content: Mapping[Any, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The settings that a trainer checkpoint of the original holds beside its weights.

    The original's training script stores its command line under ``args``, as a dictionary or, in
    older versions, as the text of one, and the token maps under ``trainer/config``.

    Returns:
        (place, values) of each place that has some: those that no tensor tells, by the names of the
        constructor's arguments.
    """
    trainer, arguments = content.get("trainer"), content.get("args")
    config = trainer.get("config") if isinstance(trainer, Mapping) else None
    if isinstance(arguments, str):
        try:
            arguments = ast.literal_eval(arguments) if len(arguments) < 2**16 else None
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            arguments = None  # text of another form: its values count as unknown
    found = []
    for place, values in (("args", arguments), ("trainer/config", config)):
        if isinstance(values, Mapping):
            told = {name: values[name] for name in CHECKS if values.get(name) is not None}
            if told:
                small = replace_tensors(told, _small_values)
                found.append((f"the checkpoint's {place}", small))
    return found
