"""Functions that ``torch.compile`` calls without tracing them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch._compile import _disable_dynamo

# Torch's error with fullgraph=True has it.
REASON = (
    "variant_kernels calls it outside of graphs, because its result depends on values or on the "
    "state of a generation; compile with fullgraph=False, export with strict=False"
)
Call = TypeVar("Call", bound=Callable[..., Any])


def untraced(function: Call) -> Call:
    """``torch.compile`` calls the function and does not trace it.

    The state of a generation changes with each call, so each call would be compiled anew (a patched
    model of two tiny layers, without code generation, two generations: 37 and 7.4 s traced, 17 and
    0.06 s like this, 7 and 0.03 s for the original code). Without torch.compile, torch._dynamo is
    not imported: 2 s of CPU, which torch.compiler.disable takes.
    """
    skipped: Any = _disable_dynamo(function)
    # As torch.compiler.disable(reason=...) sets them.
    skipped._torchdynamo_disable, skipped._torchdynamo_disable_msg = True, REASON

    @wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            return skipped(*arguments, **options)
        return function(*arguments, **options)

    return cast("Call", call)
