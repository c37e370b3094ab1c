"""Which backend an op would use, and why not another."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from variant_kernels import winners
from variant_kernels.dispatch.request import Request
from variant_kernels.dispatch.select import _asked_for, _interpreted, _reason, choose_name
from variant_kernels.winners import PREFERENCE


def explain(
    op: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    head_dim: int | None = 64,
    backend: str = "auto",
    **sizes: int,
) -> str:
    """Which backend ``op`` would use for such tensors, from where, and why not a faster one.

    ``explain("paged_attention", dtype=torch.bfloat16, rows=32, queries=256, keys=680)``; sizes are
    those of :class:`Request`. Without any, what most of the measured cases say.
    """
    choice = explained(op, device=device, dtype=dtype, head_dim=head_dim, backend=backend, **sizes)
    reasons = (f"{name}: {reason}" for name, reason in choice.others.items())
    return f"{choice.name} ({'; '.join((choice.source, *reasons))})"


MEASURED, PREFERRED, NAMED = "measured: ", "preference order", "asked for by name"


@dataclass(frozen=True)
class Choice:
    """A backend, what says so, and why each that would have come before it is not taken."""

    name: str
    source: str
    others: dict[str, str]


def explained(
    op: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    head_dim: int | None = 64,
    backend: str = "auto",
    **sizes: int,
) -> Choice:
    """What ``op`` would use for such tensors; arguments as for :func:`explain`.

    source: ``"measured: FILE.json"``, "preference order" or "asked for by name".
    Raises:
        ValueError: no such op or size, or a backend asked for by name cannot serve it.
    """
    from variant_kernels import ops

    tables = ops.tables()
    if op not in tables:
        raise ValueError(f"explain: op must be one of {', '.join(tables)}; got {op!r}")
    unknown = sorted(set(sizes) - set(winners.SIZES))
    if unknown:
        raise ValueError(
            f"explain: sizes must be among {', '.join(winners.SIZES)}; got {unknown[0]!r}"
        )
    # Where two dtypes count, as those of stream and rows in adaln_modulate, both are this one.
    request = Request(
        device,
        (dtype, dtype),
        head_dim,
        row=sizes.get("row"),
        page_size=sizes.get("page_size"),
        rows=sizes.get("rows"),
        queries=sizes.get("queries"),
        keys=sizes.get("keys"),
    )
    impls = tables[op]
    name = choose_name(op, impls, backend, request)
    case = winners.find(op, request)
    measured = case is not None and name in case.ranking
    if _asked_for(op, backend) != "auto":
        source, order = NAMED, ()
    elif case is not None and measured:
        source, order = MEASURED + ", ".join(case.sources), winners.order(op, request)
    else:
        source, order = PREFERRED, winners.preference(device)
    # Those of PREFERENCE too, some of which are not even asked on a CPU.
    others = {}
    for other in dict.fromkeys((*_before(order, name), *_before(PREFERENCE, name))):
        reason = _reason(impls, other, request)
        if reason is None:
            slower = case is not None and measured and other in case.ranking
            reason = "measured slower" if slower else "not asked for"
        others[other] = "interpreted" if _interpreted(other) else reason
    return Choice(name, source, others)


def _before(order: tuple[str, ...], name: str) -> tuple[str, ...]:
    return order[: order.index(name)] if name in order else ()
