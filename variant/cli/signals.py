"""Ctrl-C and SIGTERM of the process ``variant``: one line on standard error, never a traceback.

Before a command runs, and after it has finished, nothing has to be cleaned up: there a signal ends
the process at once. While a command runs, a signal raises in the main thread, so that temporary
files are removed; not inside an import, where an exception may be lost or, in the set-up of an
extension module (Triton's), end the process by ``std::terminate``: there it comes again a little
later.

Imports as little as possible: a signal that arrives before the handlers are installed prints
Python's traceback.
"""

from __future__ import annotations

import os
import signal

TYPE_CHECKING = False  # typing's would import typing
if TYPE_CHECKING:
    import sys
    from collections.abc import Callable
    from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A library may have lost the first two exceptions.
MAX_RAISED = 2
# Until a signal that cannot raise where it arrived comes again; imports end within 10 s.
LATER_SECONDS = 0.05
MAX_POSTPONED = 200

_received: list[int] = []
_postponed: list[int] = []


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived while a command was running."""


def exit_code(signum: int) -> int:
    """The code of a process that a signal ended, as shells give it: 130 for Ctrl-C."""
    return 128 + signum


def signum_of(stop: KeyboardInterrupt) -> int:
    """The signal that raised this exception."""
    return signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT


def received() -> int | None:
    """The last signal of this process that these handlers have seen."""
    return _received[-1] if _received else None


def exit_at_once() -> None:
    """From now on a signal prints one line and ends the process."""
    _install(_exit)


def raise_in_main_thread() -> None:
    """From now on a signal raises KeyboardInterrupt or :class:`Terminated`."""
    _install(_raise)


def _install(handler: Callable[[int, FrameType | None], None]) -> None:
    for signum in SIGNALS:
        # A process started with a signal ignored (nohup, a shell's background job) keeps that.
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, handler)


def _exit(signum: int, frame: FrameType | None) -> None:
    message = b"" if _received else b"variant: stopped.\n"
    try:  # noqa: SIM105  # contextlib is one more import
        os.write(2, message)
    except OSError:
        pass  # standard error is closed
    os._exit(exit_code(signum))


def _raise(signum: int, frame: FrameType | None) -> None:
    if _in_import(frame) and len(_postponed) < MAX_POSTPONED:
        _postponed.append(signum)
        _send_later(signum)
        return
    _received.append(signum)
    if len(_received) > MAX_RAISED:
        os._exit(exit_code(signum))
    raise Terminated if signum == signal.SIGTERM else KeyboardInterrupt


def on_unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    """A hook for exceptions that Python cannot raise, as in ``__del__``: a signal comes again."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt) and _received:
        # Not from here: the exception would be lost again.
        _send_later(_received.pop())


def _in_import(frame: FrameType | None) -> bool:
    """Whether this frame was called, however indirectly, by an import."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _send_later(signum: int) -> None:
    # Not threading.Timer: the main thread may hold the locks of threading.
    import _thread

    _thread.start_new_thread(_sleep_and_send, (signum,))


def _sleep_and_send(signum: int) -> None:
    import time

    time.sleep(LATER_SECONDS)
    os.kill(os.getpid(), signum)
