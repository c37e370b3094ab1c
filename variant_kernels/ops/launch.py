"""Calls of a backend's launcher. Backends of plain torch run outside ``torch.autocast``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._C import _DisableAutocast, _is_any_autocast_enabled

from variant_kernels.dispatch.select import Launcher

# Their products would have autocast's dtype, and not that of the tensors.
PLAIN_TORCH = ("reference", "flex")


def launch(
    backend: str,
    launcher: Launcher,
    arguments: dict[str, Any],
    complete: Callable[[Launcher, dict[str, Any]], Any] | None,
) -> Any:
    """What the launcher of this backend returns.

    Args:
        complete: calls the launcher, where arguments or results need completing.
    """
    if backend in PLAIN_TORCH and _is_any_autocast_enabled():
        with _DisableAutocast():
            return launch(backend, launcher, arguments, complete)
    return launcher(**arguments) if complete is None else complete(launcher, arguments)
