"""Samples that workers read ahead: which ones, in what order, and what errors do."""

import atexit
import dataclasses
import errno
import functools
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
import time

import numpy as np
import pytest
import torch
from PIL import Image

from variant.data import images
from variant.data.config import DataSection
from variant.data.images import epoch_order
from variant.data.loader import (
    WORKER_SIGNALS,
    Loader,
    Plan,
    num_workers,
    reading_ahead,
    refuse_in_worker,
)
from variant.data.sources import open_source
from variant.errors import UserError
from variant.training.distributed import Ranks


def plan_of(rank=0, size=1, parts=1, first_step=0):
    own_parts = functools.partial(Ranks(rank, size).parts, count=parts)
    return Plan(3, 26, 8, own_parts, first_step, 7)


@pytest.mark.parametrize(("size", "parts"), [(1, 1), (2, 2), (3, 2), (8, 1)])
def test_the_parts_of_all_ranks_are_the_batches_of_one_process(size, parts):
    whole = list(plan_of())
    assert [request.epoch for request in whole] == [0, 0, 0, 1, 1, 1, 2]
    assert np.array_equal(whole[4].indices, epoch_order(3, 1, 26)[8:16])
    ranks = [list(plan_of(rank, size, parts)) for rank in range(size)]
    for step, request in enumerate(whole):
        mine = [rank[step * parts : (step + 1) * parts] for rank in ranks]
        # A part is the same images for any number of ranks.
        wanted = np.split(request.indices, parts)
        for part, indices in zip(zip(*mine, strict=True), wanted, strict=True):
            read = [request.indices for request in part]
            assert all(len(own) > 0 for own in read)
            assert np.array_equal(np.concatenate(read), indices)


def test_a_resumed_plan_is_the_rest_of_the_plan():
    assert [r.indices.tolist() for r in plan_of(1, 2, 2, 4)] == [
        r.indices.tolist() for r in list(plan_of(1, 2, 2))[8:]
    ]


@pytest.fixture
def source(tmp_path):
    for part in ("train", "held_out"):
        for label in range(2):
            (tmp_path / part / f"class{label}").mkdir(parents=True)
            for index in range(13):
                image = Image.new("RGB", (12 + index, 10), (200 * label, 9 * index, 100))
                image.save(tmp_path / part / f"class{label}" / f"{index}.png")
    section = DataSection(
        kind="folder",
        train=str(tmp_path / "train"),
        held_out=str(tmp_path / "held_out"),
        randaugment_ops=2,
        randaugment_magnitude=9,
        mixup=0.2,
        workers=2,
    )
    return open_source(section, 8, 3, 3)


@pytest.mark.parametrize(
    ("kind", "workers", "expected"),
    [("folder", 2, 2), ("folder", 0, 0), ("tokens", 4, 1), ("tokens", 0, 0), ("digits", 4, 0)],
)
def test_a_source_has_the_workers_that_its_kind_needs(kind, workers, expected):
    files = {"folder": {"train": "a", "held_out": "b"}, "tokens": {"tokens": "t"}}.get(kind, {})
    assert num_workers(DataSection(kind, workers=workers, **files)) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_are_those_of_the_source_and_no_generator_is_drawn_from(source, workers):
    source.samples(range(4), 0)  # starts threads, which a worker does not have
    state = torch.get_rng_state()
    loader = Loader(source, plan_of(parts=2), workers, pin=False)
    for request in plan_of(parts=2):
        read = loader.samples(request.indices, request.epoch)
        expected = source.samples(request.indices, request.epoch)
        for name in ("images_BIYX", "labels_B", "mixed_labels_B", "mix_B"):
            assert torch.equal(getattr(read, name), getattr(expected, name))
    loader.close()
    assert torch.equal(torch.get_rng_state(), state)


def test_more_workers_than_cores_are_no_warning(source, recwarn):
    Loader(source, plan_of(), 4 * (os.cpu_count() or 1), pin=False).close()  # none has started
    assert not [w for w in recwarn if w.category is UserWarning]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("file_bytes", [0, 64])
def test_workers_need_shared_memory_for_locks_alone(source, file_bytes):
    # Shared memory is a file to the kernel. A lock has 32 bytes, the smallest tensor here more.
    loader = Loader(source, plan_of(), 1, pin=False)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, hard))
    try:
        if file_bytes:
            read_all(loader, plan_of())
        else:
            with pytest.raises(UserError, match=r"cannot be started: .* \(File too large\)"):
                read_all(loader, plan_of())
        loader.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_is_one_line_that_names_the_folder(source):
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        with pytest.raises(UserError, match=rf"^{tempfile.gettempdir()}: .*: F.*TMPDIR can name"):
            Loader(source, plan_of(), 1, pin=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_no_temporary_folder_is_one_line(source, monkeypatch):
    def none():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    expected = "the temporary folder: the list .* cannot be written: No usable .*TMPDIR can name"
    with pytest.raises(UserError, match=expected):
        Loader(source, plan_of(), 1, pin=False)


@pytest.mark.timeout(240)
def test_a_killed_worker_is_one_line(source):
    def read_and_kill(loader):
        for number, request in enumerate(plan_of()):
            loader.samples(request.indices, request.epoch)
            if number == 0:
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    expected = r"reads images (is killed|exited).*data\.workers"
    opened = reading_ahead(source, plan_of(), 1, pin=False)
    with pytest.raises(UserError, match=expected) as raised, opened as loader:
        read_and_kill(loader)
    assert "\n" not in str(raised.value)


def test_other_errors_are_not_those_of_workers(source):
    opened = reading_ahead(source, plan_of(), 0, pin=False)
    with pytest.raises(RuntimeError, match="out of memory"), opened:
        raise RuntimeError("out of memory")


@pytest.mark.timeout(240)
def test_workers_end_with_a_training_that_is_killed_while_they_start(source, tmp_path):
    section = dataclasses.asdict(source.data.section)
    (tmp_path / "script.py").write_text(
        textwrap.dedent(f"""
        import multiprocessing, os, signal
        from variant.data.config import DataSection
        from variant.data.loader import Loader, Plan
        from variant.data.sources import open_source

        if __name__ == "__main__":
            source = open_source(DataSection(**{section!r}), 8, 3, 3)
            loader = Loader(source, Plan(3, 26, 8, lambda batch: [batch], 0, 7), 1, pin=False)
            loader._iterator = loader._start()
            print(multiprocessing.active_children()[0].pid, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        """)
    )
    run = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True)
    worker = int(run.stdout)
    assert run.stderr == ""
    while is_running(worker):  # as long as the test may
        time.sleep(0.1)


@pytest.mark.timeout(240)
def test_a_worker_inherits_no_lock_outlives_signals_and_is_not_torn_down(source, tmp_path):
    """One worker for all three: a new one imports torch."""
    loader = Loader(Leaving(source, tmp_path / "left"), plan_of(), 1, pin=False)
    first, *others = plan_of()
    # A lock of the interpreter, which a fork can inherit just so, cannot be held from Python.
    with images._FILTERS:  # reading an image takes it
        assert len(loader.samples(first.indices, first.epoch)) == 8
    (worker,) = multiprocessing.active_children()
    # The signals that stop a training.
    for request in others:
        for number in WORKER_SIGNALS:
            os.kill(worker.pid, number)
        loader.samples(request.indices, request.epoch)
    # To tear down its interpreter would stop its threads where they are; inside torch that aborts
    # the process, now and then.
    loader.close()
    worker.join()
    assert worker.exitcode == 0
    assert not (tmp_path / "left").exists()


class Leaving:
    """A source that leaves a file when the interpreter that reads it is torn down."""

    def __init__(self, source, path):
        self.source, self.path, self.bad = source, path, source.bad

    def samples(self, indices, epoch):
        atexit.register(self.path.touch)
        return self.source.samples(indices, epoch)


def is_running(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_script_that_trains_when_workers_import_it_is_refused(monkeypatch):
    refuse_in_worker()
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(UserError, match='put the call under `if __name__ == "__main__":`'):
        refuse_in_worker()


def read_all(loader, plan):
    for request in plan:
        loader.samples(request.indices, request.epoch)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_one_line_of_the_training_process(source, tmp_path, workers):
    for path in (tmp_path / "train" / "class1").iterdir():
        path.write_bytes(b"no image")
    loader = Loader(source, plan_of(), workers, pin=False)
    with pytest.raises(UserError, match=r"class1.*is not a readable image") as raised:
        read_all(loader, plan_of())
    assert "\n" not in str(raised.value)
    loader.close()


def test_samples_out_of_order_are_a_programming_error(source):
    loader = Loader(source, plan_of(), 0, pin=False)
    with pytest.raises(AssertionError, match="next samples are"):
        loader.samples(range(8), 0)


def test_an_epoch_of_fewer_steps_visits_the_first_images_of_its_order():
    whole, short = list(plan_of()), list(dataclasses.replace(plan_of(), steps_per_epoch=2))
    assert [request.epoch for request in short] == [0, 0, 1, 1, 2, 2, 3]
    for step, of_whole in ((0, 0), (1, 1), (2, 3), (3, 4), (4, 6)):
        assert np.array_equal(short[step].indices, whole[of_whole].indices)
