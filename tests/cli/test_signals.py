"""Ctrl-C and SIGTERM at any moment of the process: one line, the shell's exit code, no traceback.

A child sends the signal to itself at its n-th import, or when it renames the n-th file: at the same
place on every machine, however loaded.
"""

import signal
import subprocess
import sys
import threading

import pytest

from variant.cli import signals

CHILD = """
import os, sys
nth, signum, event, *words = sys.argv[1:]
left = int(nth)
def hook(name, arguments):
    global left
    if name == event and not (name == "os.rename" and not str(arguments[1]).endswith(".png")):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), int(signum))
sys.argv = ["variant", *words]
from variant.cli.entry import main
sys.addaudithook(hook)
sys.exit(main())
"""


def child(nth, signum, event, *words):
    """The finished process."""
    return subprocess.run(
        [sys.executable, "-c", CHILD, str(nth), str(int(signum)), event, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def is_stopped(done, signum):
    assert done.returncode == 128 + signum, done.stderr
    assert done.stderr.startswith("variant: stopped.")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("nth", "signum", "words"),
    [
        (1, signal.SIGINT, ("plan",)),
        (1, signal.SIGTERM, ("plan",)),
        (40, signal.SIGINT, ("plan", "--help")),
        (150, signal.SIGTERM, ("plan",)),
        (250, signal.SIGINT, ("train",)),
        (300, signal.SIGTERM, ("info",)),
        (700, signal.SIGINT, ("generate",)),
        (1100, signal.SIGINT, ("bench",)),
    ],
)
def test_a_signal_during_the_imports_is_one_line(nth, signum, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    is_stopped(child(nth, signum, "import", *words), signum)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    # That both have the handler is told during the imports too.
    "signum",
    [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.nightly)],
)
def test_a_signal_during_the_work_is_one_line_and_keeps_what_is_written(signum, model, tmp_path):
    words = ("generate", "--model", model, "--labels", 1, "--count", 9, "--max-batch", 3)
    done = child(5, signum, "os.rename", *words, "--out", tmp_path / "o")
    is_stopped(done, signum)
    assert " of 9 images in " in done.stderr
    names = {path.name for path in (tmp_path / "o").iterdir()}
    assert "00003_class1.png" in names
    assert "00005_class1.png" not in names
    assert not [name for name in names if name.endswith(".tmp")]


def test_a_process_that_ignores_a_signal_goes_on_ignoring_it(monkeypatch):
    monkeypatch.setattr(signals.signal, "getsignal", lambda signum: signal.SIG_IGN)
    monkeypatch.setattr(signals.signal, "signal", lambda *_: pytest.fail("was installed"))
    signals.exit_at_once()


def test_an_exception_that_was_lost_comes_again(monkeypatch):
    sent = threading.Event()
    monkeypatch.setattr(signals.os, "kill", lambda pid, signum: sent.set())
    monkeypatch.setattr(signals, "_received", [signal.SIGINT])
    lost = type("Lost", (), {"exc_type": KeyboardInterrupt})()
    signals.on_unraisable(lost)
    assert sent.wait(10)
    assert signals.received() is None


@pytest.mark.parametrize(("signum", "name"), [(2, "KeyboardInterrupt"), (15, "Terminated")])
def test_a_signal_inside_an_import_raises_after_it(signum, name, tmp_path):
    # The set-up of an extension module (Triton's) ends the process when an exception comes in it.
    (tmp_path / "interrupted.py").write_text(
        f"import os, time\nos.kill(os.getpid(), {signum})\ntime.sleep(0.2)\ndone = True\n"
    )
    script = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from variant.cli import signals; signals.raise_in_main_thread()\n"
        "try: import interrupted; time.sleep(20)\n"
        "except KeyboardInterrupt as stop: print(type(stop).__name__, interrupted.done)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{name} True\n", "")


def test_the_entry_imports_little_before_its_handlers():
    script = (
        "import sys; before = set(sys.modules); import variant.cli.signals; "
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", script],
        capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    loaded = set(done.stdout.split())
    assert "variant.cli.signals" in loaded
    assert not loaded & {"typing", "threading", "contextlib", "importlib.util", "pathlib", "torch"}
