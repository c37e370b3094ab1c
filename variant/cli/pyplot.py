"""matplotlib, which is optional, and the pictures of ``--plot``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from variant.cli.output import check_file, checked_path
from variant.errors import UserError
from variant.files import atomic_write
from variant.paths import open_regular

ENDINGS = (".png", ".pdf", ".svg")
# In every picture of --plot; another one is not replaced.
MARK = "variant --plot"
KEYS = {".png": "Software", ".pdf": "Creator", ".svg": "Creator"}
MAX_BYTES = 2**24  # in which the mark is looked for


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
        UserError: another ending, a place that cannot be written, a file that --plot did not
            write, or no matplotlib.
    """
    if path is None:
        return
    with checked_path(path):
        if path.suffix.lower() not in ENDINGS:
            raise UserError(f"{op}: --plot must end in {', '.join(ENDINGS)}; got {path}")
        check_file(path)
        if path.exists() and path.stat().st_size and not _is_own(path):
            raise UserError(
                f"{op}: --plot must name a new file or one that --plot wrote; {path} holds "
                "something else"
            )
    pyplot(op)


def _is_own(path: Path) -> bool:
    with open_regular(path) as file:
        return MARK.encode() in file.read(MAX_BYTES)


def save_plot(plt: Any, figure: Any, path: Path) -> None:
    """Write a figure, whole or not at all, and close it.  Raises: UserError."""
    ending = path.suffix.lower()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150, format=ending[1:], metadata={KEYS[ending]: MARK})
    plt.close(figure)
