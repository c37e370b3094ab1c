"""The schedule of ``--schedule``. Imports no torch."""

from __future__ import annotations

from variant.cli.messages import UNTRAINED
from variant.errors import UserError
from variant.models.config import VARConfig
from variant.paths import path_kind
from variant.schedule_files import NAME, load_schedule
from variant_kernels import DepthSchedule


def schedule_of(op: str, option: str, source: str, config: VARConfig) -> DepthSchedule:
    """The schedule that an option names, by a file or by the depths by scale.

    Args:
        op, option: the command and its option, for the message.
    Raises:
        UserError: as :func:`variant.load_schedule`.
    """
    try:
        return load_schedule(source, config)
    except UserError as error:
        remedy = ""
        if not NAME.fullmatch(source) and path_kind(source) is None:
            remedy = "; give a file that `variant search` wrote, or the depths by scale: 8x4-4-2"
        text = UNTRAINED.sub(f"; a file as {option} runs other layers untrained", str(error))
        raise UserError(f"{op}: {option} {text}{remedy}") from None
