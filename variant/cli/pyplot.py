"""matplotlib, which is optional, and the pictures of ``--plot``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from variant.cli.output import check_file, checked_path
from variant.errors import UserError
from variant.files import atomic_write

ENDINGS = (".png", ".pdf", ".svg")


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


def check_plot(op: str, path: Path | None) -> None:
    """Fails before the work if the picture of ``--plot`` cannot be made; None is no picture.

    Raises:
        UserError: another ending, a place that cannot be written, or no matplotlib.
    """
    if path is None:
        return
    with checked_path(path):
        if path.suffix.lower() not in ENDINGS:
            raise UserError(f"{op}: --plot must end in {', '.join(ENDINGS)}; got {path}")
        check_file(path)
    pyplot(op)


def save_plot(plt: Any, figure: Any, path: Path) -> None:
    """Write a figure, whole or not at all, and close it.  Raises: UserError."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix[1:].lower())
    plt.close(figure)
