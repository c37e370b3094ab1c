"""matplotlib, which is optional."""

from __future__ import annotations

from typing import Any

from variant.errors import UserError


def pyplot(op: str) -> Any:
    """matplotlib without a display.

    Args:
        op: the command, for the message.
    Raises:
        UserError: it is not installed.
    """
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError(f"{op}: --plot needs matplotlib; pip install matplotlib") from None
    return plt
