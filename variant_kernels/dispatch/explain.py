"""Why an op uses one backend and not another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from variant_kernels.dispatch import select
from variant_kernels.dispatch.request import Request
from variant_kernels.dispatch.support import BACKENDS


@dataclass(frozen=True)
class Choice:
    """A backend, the rule that selected it, and why each backend before it was not selected.

    rule: "preference order" or "asked for by name".
    """

    name: str
    rule: str
    others: dict[str, str]

    def __str__(self) -> str:
        reasons = (f"{name}: {reason}" for name, reason in self.others.items())
        return f"{self.name} ({'; '.join((self.rule, *reasons))})"


def resolve(
    op: str, backends: Mapping[str, select.Backend], request: Request, backend: str = "auto"
) -> Choice:
    """The choice that an op with these backends makes.

    Raises:
        ValueError: a backend asked for by name is unknown or cannot serve the request.
    """
    name = select.choose_name(op, backends, backend, request)
    named = select.requested_name(backend) != "auto"
    others = {}
    for other in BACKENDS:
        # By the op's own order; BACKENDS orders those that the op lacks.
        order = [*backends] if other in backends else BACKENDS
        if order.index(other) < order.index(name):
            reason = select.reason_against(backends, other, request) or "not asked for"
            others[other] = "interpreted" if select.for_tests(other) else reason
    return Choice(name, "asked for by name" if named else "preference order", others)
