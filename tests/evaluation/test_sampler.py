"""``variant sample``: the same images by any ranks, batches and restarts; none lost or doubled."""

import dataclasses
import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import tarfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import small_model

from tests.forked_program import ForkedProgram
from variant import folder_lock
from variant.cli.main import main
from variant.cli.options import Sample
from variant.engine.engine import Engine, kernels_of
from variant.errors import UserError
from variant.evaluation import sampler
from variant.evaluation.image_sets import open_images
from variant.evaluation.sampler import SampleFiles
from variant.models.var import VAR
from variant.models.vqvae import VQVAE
from variant.supernet import VARiant

NUM = 23
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    small_model().save_pretrained(folder)
    return folder


def run(model, out, *words, num=NUM, batch=5):
    arguments = ["sample", "--model", model, "--num", num, "--batch", batch, "--out", out, *words]
    return main([str(word) for word in arguments])


def pixels(path):
    images = open_images(path)
    assert list(images.labels) == [index % 5 for index in range(images.count)]
    return torch.cat(list(images.batches(8)))


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected") / "images"
    assert run(model, out) == 0
    images = pixels(out)
    assert len(images) == NUM
    return images


def test_the_images_are_those_of_generate(model, expected):
    loaded = small_model()
    labels = [index % loaded.var.config.num_classes for index in range(NUM)]
    top_k = min(900, loaded.var.config.vocab_size)
    result = loaded.generate(labels, cfg=1.5, top_k=top_k, top_p=0.96, seed=0)
    assert torch.equal((result.images * 255).round().to(torch.uint8), expected)


@pytest.mark.parametrize("batch", [1, 8, 23])
def test_batches_change_nothing(model, expected, tmp_path, batch):
    assert run(model, tmp_path / "a", batch=batch) == 0
    assert torch.equal(pixels(tmp_path / "a"), expected)


@pytest.mark.parametrize("form", ["png", "webdataset", "npz"])
def test_two_ranks_write_the_same(model, expected, tmp_path, monkeypatch, form, capsys):
    monkeypatch.setattr(sampler, "PART", 10)
    out = tmp_path / ("a.npz" if form == "npz" else "a")
    words = [] if form == "npz" else ["--format", form]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        assert run(model, out, *words) == 0
    assert torch.equal(pixels(out), expected)
    record = tmp_path / "a.json" if form == "npz" else out / "sample.json"
    recorded = json.loads(record.read_text())
    assert (recorded["num"], recorded["seed"], recorded["cfg"]) == (NUM, 0, 1.5)
    assert {"commit", "dirty", "weights", "classes", "dtype", "schedule"} <= recorded.keys()
    if form == "npz":
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.npz"]
        assert np.load(out)["arr_0"].shape == (NUM, *expected.shape[2:], 3)
    if form == "webdataset":
        with tarfile.open(out / "part-00001.tar") as archive:
            names = archive.getnames()
        assert names[:2] == ["000010_class0.png", "000010_class0.cls"]
    # The same command once more has nothing to do, and changes nothing.
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    assert run(model, out, *words) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")} == before


def test_the_protocol_of_the_papers_is_the_default(model, tmp_path):
    assert (
        main(["sample", "--model", str(model), "--labels", "3", "--out", str(tmp_path / "a")]) == 0
    )
    recorded = json.loads((tmp_path / "a" / "sample.json").read_text())
    assert (recorded["num"], recorded["classes"], recorded["seed"]) == (50, [3], 0)
    assert (recorded["cfg"], recorded["top_p"]) == (1.5, 0.96)
    # As many codes as the model has; of more it would be 900.
    assert recorded["top_k"] == min(900, small_model().var.config.vocab_size)
    assert Sample(model="x").top_k == 900
    assert len(list((tmp_path / "a").glob("*_class3.png"))) == 50


def test_another_run_is_refused(model, tmp_path, capsys):
    out = tmp_path / "a"
    assert run(model, out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    for words, key in ((["--seed", 1], "seed"), (["--cfg", 2], "cfg"), (["--depth", 2], "depth")):
        assert run(model, out, *words) == 1
        assert f"was sampled with other settings: {key} " in capsys.readouterr().err
    assert run(model, out, "--seed", 1, "--cfg", 2, num=24) == 1
    changes = "num 23 -> 24, cfg 1.5 -> 2.0, seed 0 -> 1; give the first value of each, or another"
    assert f"was sampled with other settings: {changes} --out\n" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert run(model, tmp_path / "mine") == 1
    assert "no folder of `variant sample`" in capsys.readouterr().err
    assert run(model, tmp_path / "a.txt") == 1
    assert "must be a folder or end in .npz" in capsys.readouterr().err
    assert run(model, out, batch=0) == 1


def test_the_record_names_the_kernels_that_auto_has_chosen(model, tmp_path, monkeypatch, capsys):
    out, record = tmp_path / "a", tmp_path / "a" / "sample.json"
    monkeypatch.delenv("VARIANT_BACKEND", raising=False)
    assert run(model, out) == 0
    recorded = json.loads(record.read_text())
    assert recorded["backend"] == "auto"
    loaded = small_model()
    assert recorded["kernels"] == kernels_of(Engine(loaded.var, loaded.vae))
    assert {"paged_attention", "sample_tokens"} <= recorded["kernels"].keys()
    assert "auto" not in recorded["kernels"].values()
    # A variable of the environment chooses others: their images may differ.
    (out / "000000_class0.png").unlink()
    others = {name for name in recorded["kernels"].values() if name != "reference"}
    monkeypatch.setenv("VARIANT_BACKEND", "reference")
    assert run(model, out) == (1 if others else 0)
    assert ("other settings: kernels." in capsys.readouterr().err) == bool(others)
    # A record of an earlier version, which did not name them, is continued.
    del recorded["kernels"]
    record.write_text(json.dumps(recorded))
    assert run(model, out) == 0
    generated = tmp_path / "generated"
    words = ["generate", "--model", str(model), "--labels", "1", "--out", str(generated)]
    assert main(words) == 0
    record = generated / "generate.json"
    recorded = json.loads(record.read_text())
    assert set(recorded.pop("kernels").values()) == {"reference"}
    record.write_text(json.dumps(recorded))
    assert main([*words, "--resume"]) == 0


def test_the_same_weights_with_other_settings_of_the_model_are_another_run(tmp_path, capsys):
    folder, out, generated = tmp_path / "model", tmp_path / "a", tmp_path / "g"
    loaded = small_model()
    loaded.save_pretrained(folder)
    words = ["generate", "--model", str(folder), "--labels", "1", "--out", str(generated)]
    assert run(folder, out, num=5) == main(words) == 0
    (out / "000000_class0.png").unlink()
    (generated / "00000_class1.png").unlink()
    # As of a file of the original code that is converted anew: no weight tells these.
    changed = {"norm_eps": 0.01, "cond_drop_rate": 0.25}
    var = VAR(dataclasses.replace(loaded.var.config, **changed))
    vae = VQVAE(dataclasses.replace(loaded.vae.config, quant_resi=0.25, beta=0.125))
    for new, old in ((var, loaded.var), (vae, loaded.vae)):
        new.load_state_dict(old.state_dict())
    VARiant(var, vae).save_pretrained(folder)
    capsys.readouterr()
    changes = (
        "other settings: configs.var.norm_eps 1e-06 -> 0.01, configs.vae.quant_resi 0.5 -> 0.25;"
    )
    assert run(folder, out, num=5) == 1
    assert changes in capsys.readouterr().err
    assert main([*words, "--resume"]) == 1
    error = capsys.readouterr().err
    assert changes.removesuffix(";") in error
    for record in (out / "sample.json", generated / "generate.json"):  # of an earlier version
        recorded = json.loads(record.read_text())
        del recorded["configs"]
        record.write_text(json.dumps(recorded))
    assert run(folder, out, num=5) == 0


CHILD = """
import sys
from variant.cli.main import main
from variant.evaluation import sampler
sampler.PART = 10
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("form", ["png", "webdataset", "npz"])
def test_kill_at_any_moment_loses_and_doubles_nothing(model, expected, tmp_path, monkeypatch, form):
    """The number of moments is raised by `make nightly` (VARIANT_SAMPLER_KILLS)."""

    moments = int(os.environ.get("VARIANT_SAMPLER_KILLS", "1"))
    rng = random.Random(20261129 + len(form))
    out = tmp_path / ("a.npz" if form == "npz" else "a")
    words = ["sample", "--model", model, "--num", NUM, "--batch", 3, "--out", out]
    words += [] if form == "npz" else ["--format", form]
    progress = out.with_name("a.npz.parts") if form == "npz" else out

    def num_files():
        return len(list(progress.glob("*"))) if progress.exists() else 0

    killed = 0
    while killed < moments:
        child = ForkedProgram("-c", CHILD, *words, streams=[os.devnull] * 3)
        wanted = num_files() + rng.randint(1, 4)
        while child.poll() is None:  # until there are some more files, then at any moment
            if num_files() >= wanted:
                time.sleep(rng.random() * 0.02)
                break
            time.sleep(0.005)
        child.kill()
        if child.code == -signal.SIGKILL:
            killed += 1
            continue
        assert child.code == 0  # it was complete before its moment came: once more
        assert torch.equal(pixels(out), expected)
        shutil.rmtree(out) if out.is_dir() else out.unlink()
        out.with_suffix(".json").unlink(missing_ok=True)
    monkeypatch.setattr(sampler, "PART", 10)
    assert main([str(word) for word in words]) == 0
    assert torch.equal(pixels(out), expected)
    left = [path.name for path in tmp_path.rglob("*") if path.name.endswith((".tmp", ".lock"))]
    assert left == []


def test_a_record_that_a_killed_run_half_wrote_is_removed(model, expected, tmp_path):
    out = tmp_path / "a"
    out.mkdir()
    for name in (".sample.json.1234.tmp", ".another.json.1234.tmp"):
        (out / name).write_text("{")
    words = ["sample", "--model", model, "--num", NUM, "--batch", 3, "--out", out]
    assert main([str(word) for word in words]) == 0
    assert torch.equal(pixels(out), expected)
    assert [path.name for path in out.glob(".*.tmp")] == [".another.json.1234.tmp"]


class Killed(BaseException):
    """In the place of kill -9."""


@pytest.mark.parametrize("moment", range(3))
def test_a_kill_while_the_npz_is_assembled_loses_nothing(
    model, expected, tmp_path, monkeypatch, moment
):
    """After the first file, after the second one, and while the parts are removed."""
    out, written, atomic_write = tmp_path / "a.npz", [], sampler.atomic_write

    @contextmanager
    def killed(path, **options):
        with atomic_write(path, **options) as temporary:
            yield temporary
        if path.parent == tmp_path:
            written.append(path)
            if len(written) == moment + 1:
                raise Killed

    def rmtree(*args, **rest):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(sampler, "atomic_write", killed)
        patch.setattr(sampler.shutil, "rmtree", rmtree)
        with pytest.raises(Killed):
            run(model, out)
    (tmp_path / ".a.npz.123.tmp").write_bytes(b"of a process that was killed while it wrote")
    assert run(model, out) == 0
    assert torch.equal(pixels(out), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.npz"]


def test_of_ranks_that_begin_at_once_one_records_the_settings(tmp_path, monkeypatch):
    files, refused, others = SampleFiles(tmp_path / "a", "png", NUM, range(5), 5), [], []
    monkeypatch.setattr(SampleFiles, "is_done", lambda *rest: True)
    path_kind = sampler.path_kind

    def other():
        try:
            sampler.sample(None, None, files, {"seed": 1}, rank=1, world_size=2)
        except UserError as error:
            refused.append(str(error))

    def look(path):
        found = path_kind(path)
        if not others:
            others.append(threading.Thread(target=other))
            others[0].start()
            others[0].join(0.2)  # it waits for this rank
        return found

    monkeypatch.setattr(sampler, "path_kind", look)
    sampler.sample(None, None, files, {"seed": 0}, rank=0, world_size=2)
    others[0].join()
    assert len(refused) == 1
    assert "was sampled with other settings: seed 0 -> 1;" in refused[0]
    assert json.loads((tmp_path / "a" / "sample.json").read_text())["seed"] == 0


@pytest.mark.filterwarnings("ignore:.*cannot be locked:RuntimeWarning")
def test_a_rank_that_writes_first_is_no_foreign_file(model, expected, tmp_path, monkeypatch):
    """The other rank writes its images while this one looks whether the folder is new.

    It does not wait where the file system has no locks.
    """
    monkeypatch.setattr(folder_lock, "fcntl", None)
    out, looked = tmp_path / "a", []

    def look(function):
        def inner(*args):
            found = function(*args)
            if not looked and str(args[0]).startswith(str(out)):
                looked.append(args)
                monkeypatch.setenv("RANK", "1")
                assert run(model, out) == 0
                monkeypatch.setenv("RANK", "0")
            return found

        return inner

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(sampler, "path_kind", look(sampler.path_kind))
    monkeypatch.setattr(sampler.os, "listdir", look(os.listdir))
    assert run(model, out) == 0
    assert looked
    assert torch.equal(pixels(out), expected)


def test_no_part_is_missing_where_another_rank_has_assembled_them(
    model, expected, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sampler, "PART", 10)
    out, write = tmp_path / "a.npz", sampler.SampleFiles.write

    def followed(self, *args):
        write(self, *args)
        monkeypatch.setattr(sampler.SampleFiles, "write", write)
        monkeypatch.setenv("RANK", "0")
        assert run(model, out) == 0
        monkeypatch.setenv("RANK", "1")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert run(model, out) == 0
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(sampler.SampleFiles, "write", followed)
    assert run(model, out, "--json", tmp_path / "result") == 0
    assert json.loads((tmp_path / "result").read_text())["missing_parts"] == 0
    assert torch.equal(pixels(out), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.npz", "result"]


@pytest.mark.parametrize("kind", ["cut", "objects", "floats", "fewer", "smaller", "pipe", "text"])
def test_a_part_without_its_pixels_is_named_and_not_assembled(model, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(sampler, "PART", 10)
    finish = sampler._finish_once
    monkeypatch.setattr(sampler, "_finish_once", lambda *rest: None)
    out = tmp_path / "a.npz"
    assert run(model, out) == 0
    monkeypatch.setattr(sampler, "_finish_once", finish)
    part = tmp_path / "a.npz.parts" / "part-00001.npy"
    whole, pixels_BYX3 = part.read_bytes(), np.load(part)
    odd = {
        "objects": np.array([{}], object),
        "floats": pixels_BYX3.astype(np.float32),
        "fewer": pixels_BYX3[1:],
        "smaller": pixels_BYX3[:, 1:],
    }
    if kind in odd:
        np.save(part, odd[kind], allow_pickle=True)
    elif kind == "pipe":
        part.unlink()
        os.mkfifo(part)
    else:
        part.write_bytes(whole[:500] if kind == "cut" else b"text")
    files = sampler.SampleFiles(out, "npz", NUM, range(5), 5)
    with pytest.raises(UserError, match=r"part-00001\.npy: (does not hold|must be)"):
        files.assemble({})
    assert not out.exists()
    if kind == "pipe":
        part.unlink()
    part.write_bytes(whole)
    files.assemble({})
    assert open_images(out).count == NUM


def test_the_whole_is_on_the_disk_before_its_parts_are_removed(model, tmp_path, monkeypatch):
    """A power failure may leave an empty file where a rename was not preceded by fsync."""
    synced = []
    fsync = os.fsync

    def record(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        name = re.sub(r"\d+", "N", os.path.basename(path))
        synced.append((name, len(list(tmp_path.glob("a.npz.parts/*.npy")))))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    assert run(model, tmp_path / "a.npz") == 0
    assert not (tmp_path / "a.npz.parts").exists()
    assert (".a.npz.N.tmp", 1) in synced
    assert (".a.json.N.tmp", 1) in synced


@pytest.mark.parametrize(("form", "kept"), [("png", 0), ("png", 5), ("png", 200), ("tar", 9000)])
def test_a_file_that_is_cut_off_is_made_again(model, expected, tmp_path, form, kept):
    """As a power failure leaves files that were renamed before their content was on the disk."""
    out, words = tmp_path / "images", ("--format", "webdataset") if form == "tar" else ()
    assert run(model, out, *words) == 0
    first = min(out.glob(f"*.{form}"))
    content = first.read_bytes()
    assert len(content) > kept
    first.write_bytes(content[:kept])
    assert run(model, out, *words) == 0
    assert first.read_bytes() == content
    assert torch.equal(pixels(out), expected)


def test_a_part_that_does_not_fit_on_the_disk_says_why(model, tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        assert run(model, tmp_path / "a.npz") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert f"part-00000.npy: cannot be written: {os.strerror(errno.EFBIG)}" in error
    assert run(model, tmp_path / "a.npz") == 0


def test_an_image_that_is_a_folder_is_refused_by_name(model, tmp_path, capsys):
    out = tmp_path / "images"
    assert run(model, out) == 0
    first = min(out.glob("*.png"))
    first.unlink()
    first.mkdir()
    assert run(model, out) == 1
    assert f"{first}: cannot be written: is no plain file" in capsys.readouterr().err


def test_records_are_not_replaced(model, tmp_path, capsys):
    out, record = tmp_path / "a.npz", tmp_path / "a.json"

    def refusal(*words):
        assert main([str(word) for word in words]) == 1
        return capsys.readouterr().err

    record.write_text('{"mine": 1}')
    sample = ["sample", "--model", model, "--num", 25, "--out"]
    assert 'its "format" must be' in refusal(*sample, out)
    assert record.read_text() == '{"mine": 1}'
    record.unlink()
    for path, own in ((out, record), (tmp_path / "b", tmp_path / "b" / "sample.json")):
        message = refusal(*sample, path, "--json", own)
        assert "must differ" in message or "--out writes itself" in message
        assert not path.exists()
        assert not own.exists()
    assert main([str(word) for word in [*sample, out]]) == 0
    before = record.read_bytes()
    evaluate = ["eval", "--images", out, "--reference", out, "--features", "math:sqrt", "--json"]
    assert "holds something else" in refusal(*evaluate, record)
    assert record.read_bytes() == before
    record.unlink()
    assert "no a.json beside it" in refusal(*sample, out)


def test_a_folder_with_other_images_than_its_record_says_is_warned_about(
    model, tmp_path, monkeypatch, capsys
):
    (tmp_path / "shades.py").write_text(
        "def features(images):\n    return images.float().mean((2, 3)) / 255\n"
    )
    monkeypatch.chdir(tmp_path)
    assert run(model, Path("a")) == 0
    evaluate = ["eval", "--images", "a", "--reference", "a", "--features", "shades:features"]
    assert main([*evaluate, "--json", "a.json"]) == 0
    assert json.loads(Path("a.json").read_text())["warnings"] == []
    Path("a/000007_class2.png").unlink()
    assert main([*evaluate, "--json", "a.json"]) == 0
    assert json.loads(Path("a.json").read_text())["warnings"] == [
        "eval: a holds 22 images; its record of `variant sample` says 23"
    ]

    # As many as the record says, but not those.
    shutil.copy("a/000006_class1.png", "a/mine.png")
    assert main([*evaluate, "--json", "a.json"]) == 0
    assert json.loads(Path("a.json").read_text())["warnings"] == [
        "eval: a holds mine.png; its record of `variant sample` has no such image",
        "eval: 1 of 23 images of a equal an earlier one",
    ]


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("png", "mine.png"),
        ("png", "000023_class3.png"),
        ("png", "below/000001_class1.JPG"),
        ("png", "part-00000.tar"),
        ("webdataset", "part-00003.tar"),
        ("webdataset", "mine.png"),
    ],
)
def test_foreign_images_are_refused_before_they_would_be_evaluated(tmp_path, form, name):
    files = SampleFiles(tmp_path / "a", form, 23, range(5), 5)
    assert not sampler.check_run(files, {"num": 23})
    files.folder.mkdir()
    (files.folder / "sample.json").write_text(json.dumps({"format": "variant-sample-1", "num": 23}))
    own = [files.image_file(22)] if form == "png" else [files.unit_file(0)]
    for path in (*own, files.folder / ".hidden.png", files.folder / "notes.txt"):
        path.write_bytes(b"")
    assert sampler.check_run(files, {"num": 23})
    (files.folder / name).parent.mkdir(exist_ok=True)
    (files.folder / name).write_bytes(b"")
    with pytest.raises(UserError, match=rf"a: holds {name}, which is none of this run's images"):
        sampler.check_run(files, {"num": 23})
    # Other settings are told first: images of theirs are no strangers.
    with pytest.raises(UserError, match=r"with other settings: num 23 -> 20; give"):
        sampler.check_run(dataclasses.replace(files, num=20), {"num": 20})


def test_the_record_of_an_npz_is_of_no_folder_beside_it(model, tmp_path, monkeypatch):
    (tmp_path / "tones.py").write_text(
        "def features(images):\n    return images.float().mean((2, 3)) / 255\n"
    )
    monkeypatch.chdir(tmp_path)
    assert run(model, Path("v1.npz"), "--seed", 3) == 0
    for folder in ("v1", "v1.5", "inside"):
        assert run(model, Path(folder)) == 0
        Path(folder, "sample.json").unlink()  # images of another program
    evaluate = ["eval", "--reference", "v1.npz", "--features", "tones:features"]

    def generated(*words):
        assert main([*evaluate, "--json", "result.json", "--images", *words]) == 0
        return json.loads(Path("result.json").read_text())["generated"]

    assert generated("v1.npz")["seed"] == 3
    assert generated("v1") is None
    assert generated("v1.5") is None
    monkeypatch.chdir(tmp_path / "inside")
    (tmp_path / "inside" / "tones.py").write_text((tmp_path / "tones.py").read_text())
    evaluate[2] = "."
    assert generated(".") is None


def test_a_png_says_what_it_is(model, tmp_path):
    assert run(model, tmp_path / "a", "--seed", 3, num=2) == 0
    with Image.open(tmp_path / "a" / "000001_class1.png") as image:
        assert image.text["seed"] == "3"
        assert (image.text["label"], image.text["index"]) == ("1", "1")
    assert run(model, tmp_path / "b", "--schedule", "4-3-2", num=2) == 0
    with Image.open(tmp_path / "b" / "000001_class1.png") as image:
        assert image.text["depth"] == "4-3-2"
        assert json.loads(image.text["schedule"]) == [[0, 1, 2, 3], [0, 2, 3], [0, 3]]


def test_the_null_class_is_one_label_and_no_class_of_an_evaluation(model, tmp_path):
    for label in (-1, 5):  # the model has five classes
        out = tmp_path / str(label)
        assert run(model, out, "--labels", label, num=2) == 0
        assert json.loads((out / "sample.json").read_text())["classes"] == [-1]
        assert sorted(p.name for p in out.glob("*.png"))[0] == "000000_class-1.png"
        assert open_images(out).labels is None
    one, other = (torch.cat(list(open_images(tmp_path / n).batches(8))) for n in ("-1", "5"))
    assert torch.equal(one, other)
