"""The largest batch in a given memory: the predicting line, the confirming runs, the file."""

import json
from contextlib import contextmanager

import pytest

from benchmarks.largest_batch import GPU, find, main
from benchmarks.report import main as report
from variant.errors import UserError

WEIGHTS, IMAGE = 1000, 10


class Memory(GPU):
    """WEIGHTS and IMAGE bytes for each image of a batch; more than the line predicts beyond it."""

    def __init__(self, excess=0):
        self.excess, self.limit, self.ran = excess, None, []

    def peak(self, generate, batch):
        generate(batch)
        return WEIGHTS + IMAGE * batch

    @contextmanager
    def limited_to(self, limit):
        self.limit = limit
        yield
        self.limit = None

    def release(self):
        pass

    def generate(self, batch):
        self.ran.append(batch)
        if self.limit is not None and WEIGHTS + IMAGE * batch + self.excess > self.limit:
            raise MemoryError
        return 7, 7


def test_the_line_predicts_a_batch_and_a_run_confirms_it():
    gpu = Memory()
    row = find("ours", 4, gpu.generate, 2005, [2, 6], gpu)
    assert (row.by_line, row.largest) == (100, 100)
    assert row.image_bytes == IMAGE
    assert gpu.ran == [2, 6, 100]
    assert row.kv_allocated_bytes == 7


def test_what_does_not_fit_is_tried_smaller():
    gpu = Memory(excess=50)
    row = find("ours", 4, gpu.generate, 2005, [2, 6], gpu)
    assert row.by_line == 100
    assert row.largest == 92
    assert gpu.ran == [2, 6, 100, 96, 92]


def test_nothing_fits_beside_weights_that_fill_the_memory():
    gpu = Memory()
    row = find("original", 4, gpu.generate, WEIGHTS - 1, [2, 6], gpu)
    assert (row.by_line, row.largest, row.kv_allocated_bytes) == (0, 0, None)


def test_memory_that_does_not_grow_is_an_error():
    gpu = Memory()
    gpu.peak = lambda generate, batch: WEIGHTS
    with pytest.raises(UserError, match="6 images take no more than 2"):
        find("ours", 4, gpu.generate, 2005, [2, 6], gpu)


def test_every_depth_and_the_plain_loop_are_in_the_file_and_in_the_report(tmp_path, capsys):
    file = tmp_path / "memory.json"
    words = ["--model", "digits", "--device", "cpu", "--dtype", "float32", "--small", "1", "2"]
    words += ["--depths", "8", "2", "--bridge", "4", "--gib", str(1030 / 2**30)]
    assert main([*words, "--json", str(file)], Memory()) == 0
    printed = capsys.readouterr().out
    assert "depth   2" in printed
    assert "largest batch" in printed
    assert "NOT THE PLAN" not in printed
    written = json.loads(file.read_text())
    assert written["complete"]
    assert [(row["who"], row["depth"], row["largest"]) for row in written["rows"]] == [
        ("ours float32", 8, 3),
        ("ours float32", 2, 3),
        ("plain loop bfloat16 autocast", 8, 3),
    ]
    assert report([str(file), "--out", str(tmp_path / "page")]) == 0
    assert "largest batch that ran" in (tmp_path / "page" / "report.md").read_text()


def test_a_machine_without_a_gpu_is_an_error(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["--json", str(tmp_path / "memory.json")]) == 1
    assert "needs a GPU" in capsys.readouterr().err
