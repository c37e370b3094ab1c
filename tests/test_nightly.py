"""``make nightly`` in parts, with a double of make that records its calls."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.nightly import ROOT, Records, all_parts, run, table

PARTS = ["one", "two TESTS=x", "three"]


@pytest.fixture
def make(tmp_path):
    """Writes its arguments and the seed down; parts named in the file ``bad`` fail."""
    program = tmp_path / "make"
    program.write_text(
        f"#!/bin/sh\ncd {tmp_path}\nshift\n"
        'echo "$* $VARIANT_ROBUSTNESS_SEED" >>calls; echo output of "$1"\n'
        '[ "$1" = waits ] && sleep 60\n'
        '! grep -qx "$1" bad 2>/dev/null\n'
    )
    program.chmod(0o755)
    return program


def calls(make) -> list[str]:
    return [line.rsplit(" ", 1)[0] for line in (make.parent / "calls").read_text().splitlines()]


def test_goes_on_after_a_failed_part_and_with_it_next_time(make, tmp_path, capsys):
    (tmp_path / "bad").write_text("one\n")
    records = Records(tmp_path / "nightly", "state")
    assert run(PARTS, records, str(make)) == ["one"]
    assert calls(make) == PARTS
    assert "FAILED with status 1: make one" in capsys.readouterr().out
    assert (records.folder / "01-two.log").read_text() == "output of two\n"
    first, *others = table(PARTS, records, ["one"]).splitlines()[1:]
    assert first == " failed  one"
    assert [line.split("  ")[-1] for line in others] == PARTS[1:]
    assert all(float(line.split()[0]) >= 0 for line in others)

    (tmp_path / "bad").unlink()
    assert run(PARTS, Records(tmp_path / "nightly", "state"), str(make)) == []
    assert calls(make) == [*PARTS, "one"]
    assert "1 of 3 parts" in capsys.readouterr().out


def test_other_sources_run_every_part_and_know_how_long_it_takes(make, tmp_path, capsys):
    run(PARTS, Records(tmp_path / "nightly", "state"), str(make))
    before = tmp_path / "nightly" / "seconds.json"
    before.write_text(json.dumps(dict.fromkeys(PARTS, 3600)))
    capsys.readouterr()
    run([*PARTS, "four"], Records(tmp_path / "nightly", "other"), str(make))
    assert calls(make) == [*PARTS, *PARTS, "four"]
    assert "(known: 3 h 00 min for 3 of 4)" in capsys.readouterr().out


def test_the_seed_stays_over_midnight(make, tmp_path):
    Records(tmp_path / "nightly", "state")
    (tmp_path / "nightly" / "state" / "seed").write_text("20010203")
    run(["one"], Records(tmp_path / "nightly", "state"), str(make))
    assert (tmp_path / "calls").read_text() == "one 20010203\n"


def test_a_signal_ends_the_part_and_keeps_what_passed(make, tmp_path):
    program = (
        "from pathlib import Path\n"
        "from tests.nightly import Records, _stop, run, signal\n"
        "signal.signal(signal.SIGTERM, _stop)\n"
        f"records = Records(Path({str(tmp_path)!r}), 'state')\n"
        f"run(['one', 'waits'], records, {str(make)!r})\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while "output of waits" not in process.stdout.readline():
        pass
    os.kill(process.pid, signal.SIGTERM)
    start = time.monotonic()
    process.communicate()
    assert time.monotonic() - start < 30  # the part would sleep for 60 s
    assert process.returncode != 0
    assert list(json.loads((tmp_path / "state" / "passed.json").read_text())) == ["one"]


def test_every_test_file_is_in_one_part():
    parts = all_parts()
    named = [word for part in parts for word in part.replace("'", "").split() if "tests/" in word]
    paths = [ROOT / word.split("=")[-1] for word in named]
    for file in (ROOT / "tests").rglob("test_*.py"):
        assert sum(path in (file, file.parent) for path in paths) == 1, file
    targets = (ROOT / "Makefile").read_text()
    assert all(f"\n{part.split()[0]}:" in targets for part in parts)
