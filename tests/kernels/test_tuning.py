"""Block sizes are timed once, stored across processes, and not timed during a capture."""

import ast
import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from benchmarks.shipped_choices import table_of
from variant_kernels import device_lock
from variant_kernels.triton_ops import tuning
from variant_kernels.triton_ops.tuning import Config, Key
from variant_kernels.tuning_switch import timing_allowed

CONFIGS = (Config(16, 16, 1, 1), Config(32, 16, 1, 1), Config(64, 16, 1, 1))
CPU = torch.device("cpu")


class Kernel:
    __name__ = "some_kernel"
    cache_key = "hash of its source"


KERNEL = Kernel()


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """The configs that were run; a stopwatch that finds the second fastest and the first too big"""
    ran = []

    def stopwatch(function, **options):
        function()
        config = ran[-1]
        if config is CONFIGS[0]:
            raise OutOfResources(300, 200, "shared memory")
        return float(config.block_q)

    monkeypatch.setattr(tuning.triton.testing, "do_bench", stopwatch)
    monkeypatch.setattr(tuning, "triton_interprets", lambda: False)
    monkeypatch.setenv("VARIANT_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("VARIANT_AUTOTUNE", raising=False)
    monkeypatch.setenv("VARIANT_TUNE", "1")
    monkeypatch.setattr(tuning, "family", lambda device: "here")
    tuning.clear_choices()
    yield ran
    tuning.clear_choices()


SHAPE = Key(("shape",))


def choose(ran, key=SHAPE):
    return tuning.best(KERNEL, CONFIGS, key, ran.append, CPU)


def test_the_fastest_that_fits_wins_and_is_timed_once(timed):
    assert choose(timed) is CONFIGS[1]
    assert timed == list(CONFIGS)
    assert choose(timed) is CONFIGS[1]
    assert len(timed) == 3


def test_another_process_reads_the_winner_and_another_shape_is_timed(timed):
    choose(timed)
    tuning.clear_choices()
    assert choose(timed) == CONFIGS[1]
    assert len(timed) == 3
    choose(timed, key=Key(("another shape",)))
    assert len(timed) == 6


def test_changed_source_is_timed_again(timed, monkeypatch):
    choose(timed)
    tuning.clear_choices()
    monkeypatch.setattr(Kernel, "cache_key", "hash of other source")
    choose(timed)
    assert len(timed) == 6


def test_a_damaged_file_is_timed_again_and_mended(timed):
    choose(timed)
    (path,) = tuning.cache_dir().iterdir()
    path.write_text("{")
    tuning.clear_choices()
    assert choose(timed) == CONFIGS[1]
    assert json.loads(path.read_text())["milliseconds"] == [None, 32.0, 64.0]


def test_nothing_is_timed_when_switched_off_or_interpreting(timed, monkeypatch):
    monkeypatch.setenv("VARIANT_AUTOTUNE", "0")
    assert choose(timed) is CONFIGS[0]
    monkeypatch.delenv("VARIANT_AUTOTUNE")
    monkeypatch.setattr(tuning, "triton_interprets", lambda: True)
    assert choose(timed) is CONFIGS[0]
    assert not timed


def test_nothing_is_timed_or_settled_while_a_graph_is_captured(timed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(tuning, "_device_name", lambda device: "some GPU")
    device = torch.device("cuda", 0)
    assert tuning.best(KERNEL, CONFIGS, Key(()), timed.append, device) is CONFIGS[0]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert tuning.best(KERNEL, CONFIGS, Key(()), timed.append, device) is CONFIGS[1]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuning.best(KERNEL, CONFIGS, Key(()), timed.append, device) is CONFIGS[1]


def test_a_folder_that_cannot_be_written_is_said_and_the_winner_still_serves(
    timed, monkeypatch, tmp_path
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VARIANT_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot store tuning results in .*VARIANT_CACHE_DIR"):
        assert choose(timed) is CONFIGS[1]


def test_files_of_killed_and_failed_writes_do_not_stay(timed, monkeypatch, tmp_path):
    choose(timed)
    (folder,) = {path.parent for path in tmp_path.rglob("*.json")}
    left, recent = folder / f"left{tuning.TEMPORARY}", folder / f"recent{tuning.TEMPORARY}"
    left.write_text("{")
    recent.write_text("{")
    os.utime(left, (0, 0))

    def full(*names):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tuning.os, "replace", full)
    with pytest.warns(UserWarning, match="cannot store tuning results"):
        choose(timed, Key(("another shape",)))
    assert list(folder.glob(f"*{tuning.TEMPORARY}")) == [recent]  # another process may write it


def test_a_device_too_small_for_every_config_is_named(timed):
    with pytest.raises(RuntimeError, match="some_kernel: none of its 2 block sizes fits") as raised:
        tuning.best(KERNEL, (CONFIGS[0], CONFIGS[0]), Key(()), timed.append, CPU)
    assert isinstance(raised.value.__cause__, OutOfResources)


def test_without_memory_to_time_with_the_first_serves_this_process(timed, monkeypatch):
    searched = []

    def stopwatch(function, **options):
        searched.append(function)
        raise torch.OutOfMemoryError

    with monkeypatch.context() as full:
        full.setattr(tuning.triton.testing, "do_bench", stopwatch)
        with pytest.warns(UserWarning, match="no memory to time some_kernel"):
            assert [choose(timed) for _ in range(3)] == [CONFIGS[0]] * 3
    assert len(searched) == 1
    tuning.clear_choices()
    assert choose(timed) is CONFIGS[1]


def test_nothing_is_timed_while_another_thread_captures_or_times(timed):
    with device_lock.CAPTURE_OR_TIMING:
        assert choose(timed) is CONFIGS[0]
    assert not timed
    assert choose(timed) is CONFIGS[1]
    assert not device_lock.CAPTURE_OR_TIMING.locked()


def test_a_config_that_does_not_compile_costs_no_other(timed, monkeypatch):
    def stopwatch(function, **options):
        function()
        if timed[-1] is CONFIGS[1]:
            raise CompilationError("", ast.parse("x").body[0], "no such layout")
        return float(timed[-1].block_q)

    monkeypatch.setattr(tuning.triton.testing, "do_bench", stopwatch)
    assert choose(timed) is CONFIGS[0]
    assert len(timed) == 3


SHAPES = [
    Key(("64",), (queries, heads), ("float16",)) for queries in (16, 256) for heads in (8, 64)
]


@pytest.fixture
def shipped(timed, monkeypatch, tmp_path):
    """Choices of the package for one kernel: two shapes, and one that is no candidate."""
    entries = [
        {
            "kernel": "some_kernel",
            "family": "here",
            "same": ["64"],
            "sizes": sizes,
            "config": config,
        }
        for sizes, config in (
            ([16, 64], vars(CONFIGS[2])),
            ([256, 64], vars(CONFIGS[1])),
            ([256, 8], vars(Config(99, 16, 1, 1))),
        )
    ]
    path = tmp_path / "shipped.json"
    path.write_text(json.dumps({"entries": entries}))
    monkeypatch.setattr(tuning, "SHIPPED", path)
    tuning._shipped.cache_clear()
    yield
    tuning._shipped.cache_clear()


def test_a_request_times_nothing_and_takes_the_nearest_choice(timed, shipped, monkeypatch):
    monkeypatch.delenv("VARIANT_TUNE")
    expected = [CONFIGS[2], CONFIGS[2], CONFIGS[1], CONFIGS[1]]
    assert [choose(timed, key) for key in SHAPES] == expected
    assert choose(timed, Key(("128",), (16, 8))) is CONFIGS[0]  # nothing near is known
    assert timed == []
    with timing_allowed():
        assert choose(timed, SHAPES[0]) is CONFIGS[1]
        assert len(timed) == 3
    assert choose(timed, SHAPES[0]) is CONFIGS[1]
    # The measured choice of another shape is as near as the package's, and comes first.
    assert choose(timed, Key(("64",), (16, 8), ("bfloat16",))) == CONFIGS[1]
    tuning.clear_choices()  # as in another process
    assert [choose(timed, key) for key in SHAPES] == [
        CONFIGS[1],
        CONFIGS[2],
        CONFIGS[1],
        CONFIGS[1],
    ]
    assert len(timed) == 3


def test_a_choice_serves_that_another_thread_drops_at_once(timed, monkeypatch):
    class Dropped(dict):
        def __setitem__(self, key, value):
            super().__setitem__(key, value)
            self.clear()  # the other thread has timed a choice

    monkeypatch.setattr(tuning, "_nearest_configs", Dropped())
    monkeypatch.setenv("VARIANT_TUNE", "0")
    assert choose(timed) == CONFIGS[0]


def test_timing_is_allowed_in_every_thread_until_the_last_block_ends(timed, monkeypatch):
    monkeypatch.delenv("VARIANT_TUNE")
    with timing_allowed(), ThreadPoolExecutor(1) as pool:
        with timing_allowed():
            pass
        assert pool.submit(choose, timed).result() is CONFIGS[1]
    assert choose(timed, SHAPES[0]) is CONFIGS[0]
    monkeypatch.setenv("VARIANT_AUTOTUNE", "0")
    with timing_allowed():
        assert choose(timed, SHAPES[1]) is CONFIGS[0]


def test_a_damaged_record_of_another_shape_is_passed_over(timed, monkeypatch):
    choose(timed, SHAPES[3])
    monkeypatch.delenv("VARIANT_TUNE")
    tuning.clear_choices()
    assert choose(timed, SHAPES[2]) == CONFIGS[1]
    for path in tuning.cache_dir().iterdir():
        path.write_text("{}")
    tuning.clear_choices()
    assert choose(timed, SHAPES[2]) is CONFIGS[0]


def test_every_shipped_choice_is_a_candidate_and_says_where_it_is_from():
    entries = json.loads(tuning.SHIPPED.read_text())["entries"]
    shapes = [
        (entry["kernel"], entry["family"], entry["same"], entry["sizes"]) for entry in entries
    ]
    assert all(shapes.count(shape) == 1 for shape in shapes)
    for entry in entries:
        candidates = table_of(entry["kernel"], entry["same"], entry["sizes"])
        assert Config(**entry["config"]) in candidates, entry
