"""The process ``variant``: signals, standard streams and the exit code around ``main``.

Importing this module installs the handlers of signals, so only a process of its own may do it.
"""

from variant.cli import signals

signals.exit_at_once()

import contextlib  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402


def main() -> int:
    """Run the command of ``sys.argv``.

    Returns:
        The exit code: that of :func:`variant.cli.main.main`, or 1 if standard output cannot be
        written.
    """
    _open_streams()
    from variant.cli.main import main as run_command
    from variant.cli.messages import one_line_warnings

    sys.unraisablehook = _unraisable
    try:
        try:
            with one_line_warnings(*sys.argv[1:2]):
                code = run_command(before_work=signals.raise_in_main_thread)
        finally:
            signals.exit_at_once()
    except SystemExit as stop:  # --help, wrong usage, an interrupted training
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:  # a second signal, while the first was being reported
        code = signals.exit_code(signals.received() or signal.SIGINT)
    return _close_output(code)


def _open_streams() -> None:
    """Streams that can be written: closed ones become /dev/null, and any text can be encoded."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        else:
            # A file name may hold what the terminal's encoding does not have.
            stream.reconfigure(errors="backslashreplace")


def _close_output(code: int) -> int:
    """Flush standard output; the code, or 1 if that fails."""
    try:
        sys.stdout.flush()
    except OSError as error:
        if code == 0:
            code = 1
            with contextlib.suppress(OSError):
                print(
                    f"variant: error: standard output: {error.strerror or error}", file=sys.stderr
                )
    # Python flushes again at its exit, and would report the same error by a traceback.
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


def _unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        signals.on_unraisable(unraisable)
    else:
        sys.__unraisablehook__(unraisable)
