"""Threads, many generations, full disks and little memory."""

import random
import tempfile

import pytest

from tests.robustness import pressure
from tests.robustness.command import run_generator
from tests.robustness.forked import Failed, option


@pytest.mark.timeout(10_000)
def test_pressure_ends_with_one_line_and_nothing_half_written():
    run_generator("pressure", "--cases", option("PRESSURE", 40))


def test_threads_with_one_engine_draw_what_one_thread_draws(tmp_path):
    files = pressure.Files(tmp_path)
    for seed in range(3):
        pressure.check_threads(files, random.Random(seed))


def test_a_half_written_file_is_found(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(Failed, match=r"a\.png is half-written"):
        pressure._check_whole("generate", tmp_path)


def test_an_error_that_is_not_foreseen_is_found():
    with pytest.raises(Failed, match="not foreseen"):
        pressure._check_exit("generate", 1, "variant: error: OSError: no (--debug shows where)")


def test_a_message_without_a_place_is_found(tmp_path):
    root = tempfile.gettempdir()
    for named in (f"{tmp_path}/a.pt: File too large", "/dev/shm: is full"):
        assert pressure.names_place(f"variant: error: {named}", tmp_path)
    unnamed = f"{root}: the list of what workers read cannot be written: File too large"
    assert pressure.names_place(f"variant: error: {unnamed}", tmp_path)
    for text in ("File too large", f"{root}: File too large", f"{root}/other: File too large"):
        assert not pressure.names_place(f"variant: error: {text}", tmp_path)
