"""``variant generate``: pictures, folders, interrupted runs."""

import json
import os
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import small_model

from variant.cli import generate as module
from variant.cli.main import main
from variant.folder_lock import locked_folder
from variant.schedule_files import load_schedule, save_schedule


def pictures(folder):
    """Name -> bytes of every PNG."""
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def test_writes_a_grid_of_every_depth_and_prints_the_table(model, tmp_path, run):
    out = tmp_path / "new" / "grid.png"
    code, printed, _ = run(
        "generate", "--model", model, "--labels", 0, 3, 4, "--all-depths", "--out", out
    )
    assert code == 0
    sheet = Image.open(out)
    step = 66 + 4  # 6 pixels enlarged elevenfold, and the gap
    assert sheet.size == (56 + 3 * step + 4, 3 * step + 4)
    assert sheet.text["label"] == "0 3 4"
    assert sheet.text["depth"] == "4 3 2"
    config = small_model().var.config
    schedules = [load_schedule(name, config).layers for name in ("4x3", "4-3-3", "4-2-2")]
    assert json.loads(sheet.text["schedule"]) == [[list(s) for s in one] for one in schedules]
    rows = re.findall(
        r"│\s+(\d)\s+│\s+([\d.]+)\s+│\s+[\d.]+\s+│\s+(\d+) KiB │\s+(\d+) KiB", printed
    )
    assert [row[0] for row in rows] == ["4", "3", "2"]
    assert all(planned == allocated for _, _, planned, allocated in rows)
    assert "ms per image" in printed


def test_writes_one_file_per_image_the_same_for_the_same_seed(model, tmp_path, run):
    for name in ("a", "b"):
        code, printed, _ = run(
            "generate", "--model", model, "--labels", 2, 1, "--count", 2,
            "--depth", 2, "--seed", 5, "--top-k", 9, "--out", tmp_path / name,
        )  # fmt: skip
        assert code == 0
        assert f"wrote 4 images to {tmp_path / name}" in printed
    files = sorted((tmp_path / "a").iterdir())
    assert [f.name for f in files] == [
        "00000_class2.png", "00001_class2.png", "00002_class1.png", "00003_class1.png",
        "generate.json",
    ]  # fmt: skip
    for file in files:
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    images = small_model().generate([2, 2, 1, 1], depth=2, seed=5, top_k=9, top_p=0.96).images
    pixels = torch.from_numpy(np.array(Image.open(files[3]))).long().permute(2, 0, 1)
    assert torch.equal(pixels, (images[3] * 255).round().long())


def test_a_png_says_what_it_was_generated_from(model, tmp_path, run):
    words = ("--labels", 3, "--depth", 2, "--seed", 7, "--cfg", 2, "--top-k", 9, "--top-p", 0.5)
    assert run("generate", "--model", model, *words, "--out", tmp_path / "o")[0] == 0
    text = Image.open(tmp_path / "o" / "00000_class3.png").text
    assert text.pop("Software").startswith("variant ")
    assert text == {
        "model": model, "label": "3", "index": "0", "seed": "7", "depth": "2", "cfg": "2.0",
        "top_k": "9", "top_p": "0.5", "temperature": "1.0", "more_smooth": "False",
        "schedule": "[[0, 1, 2, 3], [0, 3], [0, 3]]",
    }  # fmt: skip


def test_the_null_class_is_unconditional(model, tmp_path, run):
    words = ("generate", "--model", model, "--labels", -1, 5, 1, "--out", tmp_path / "o")
    assert run(*words)[0] == 0
    names = sorted(pictures(tmp_path / "o"))
    assert names == ["00000_null.png", "00001_null.png", "00002_class1.png"]
    images = small_model().generate([5, 5, 1], seed=0, top_p=0.96, image_dtype="uint8").pil()
    for name, image in zip(names, images, strict=True):
        assert np.array_equal(np.array(Image.open(tmp_path / "o" / name)), np.array(image))


def test_temperature_and_smooth_mixtures(model, tmp_path, run):
    words = ("generate", "--model", model, "--labels", 1, 2, "--temperature", 0.5, "--more-smooth")
    assert run(*words, "--out", tmp_path / "o")[0] == 0
    expected = small_model().generate(
        [1, 2], seed=0, top_p=0.96, temperature=0.5, more_smooth=True, image_dtype="uint8"
    )
    for path, image in zip(sorted((tmp_path / "o").glob("*.png")), expected.pil(), strict=True):
        assert np.array_equal(np.array(Image.open(path)), np.array(image))


def test_file_names_may_contain_brackets_and_dots(model, tmp_path, run):
    (tmp_path / "out.v2").mkdir()
    for name in ("o[red]y", "o[/x]", "out.v2"):
        code, printed, _ = run(
            "generate", "--model", model, "--labels", 1, "--out", tmp_path / name
        )
        assert code == 0
        assert f"wrote 1 image to {tmp_path / name}" in printed
        assert len(pictures(tmp_path / name)) == 1


# --- batch by batch -----------------------------------------------------------------------------


@pytest.fixture
def interrupted(monkeypatch):
    """``interrupted(n)``: Ctrl-C comes after n images are written."""

    def after(count):
        save_png, written = module.save_png, []

        def save(path, image, text):
            if len(written) == count:
                monkeypatch.setattr(module, "save_png", save_png)
                raise KeyboardInterrupt
            save_png(path, image, text)
            written.append(path)

        monkeypatch.setattr(module, "save_png", save)

    return after


@pytest.mark.parametrize("options", [("--dtype", "bfloat16"), ("--all-depths",)], ids=" ".join)
def test_an_interrupted_run_goes_on_to_the_images_of_an_undisturbed_one(
    options, model, tmp_path, run, interrupted
):
    words = ("generate", "--model", model, "--labels", 4, 0, "--count", 5, "--max-batch", 3)
    total = 30 if options == ("--all-depths",) else 10
    assert run(*words, *options, "--out", tmp_path / "whole")[0] == 0
    out = tmp_path / "my parts"
    command = [*words, *options, "--out", out]
    for before, written in ((0, 4), (4, total - 1)):
        interrupted(written - before)
        code, _, error = run(*command)
        assert code == 130
        assert error.count("\n") == 1
        assert f"stopped. {written} of {total} images in {out}; continue: " in error
        again = shlex.split(error.split("continue: ")[1])
        assert again[0] == "variant"
        assert again[-1] == "--resume"
        assert len(pictures(out)) == written
        command = again[1:]
    code, printed, _ = run(*command)
    assert code == 0
    assert f"there before: {total - 1} of {total} images" in printed
    assert pictures(out) == pictures(tmp_path / "whole")
    # Nothing is left to do.
    code, printed, _ = run(*command)
    assert code == 0
    assert f"there before: {total} of {total} images" in printed


def test_only_missing_batches_are_generated(model, tmp_path, run):
    words = ("generate", "--model", model, "--labels", 1, "--count", 9, "--max-batch", 3)
    words += ("--out", tmp_path / "o", "--json", "-")
    assert run(*words)[0] == 0
    whole = pictures(tmp_path / "o")
    (tmp_path / "o" / "00004_class1.png").unlink()
    code, printed, _ = run(*words, "--resume")
    assert code == 0
    row = json.loads(printed)["depths"][0]
    assert (row["images"], row["generated"], row["batches"]) == (9, 3, 1)
    assert pictures(tmp_path / "o") == whole


def test_one_batch_is_in_memory_at_a_time(model, tmp_path, run, monkeypatch):
    alive = []
    make = module.Work._generate

    def watched(self, *arguments):
        for part in make(self, *arguments):
            alive.append(len(part.images))
            yield part

    monkeypatch.setattr(module.Work, "_generate", watched)
    monkeypatch.setattr(module, "MAX_BATCH", 8)
    monkeypatch.setattr(module, "IMAGES_PER_CALL", 16)
    words = ("generate", "--model", model, "--labels", 1, "--count", 43, "--out", tmp_path / "o")
    assert run(*words)[0] == 0
    assert alive == [1, 8, 8, 8, 8, 8, 3]  # the first is the warm-up
    assert len(pictures(tmp_path / "o")) == 43


def test_a_folder_of_another_run_is_refused_and_kept(model, tmp_path, run):
    words = ("generate", "--model", model, "--labels", 1, 2, "--out", tmp_path / "o")
    assert run(*words)[0] == 0
    before = pictures(tmp_path / "o")
    for more, message in (
        ((), "holds images of an earlier run; give --resume"),
        (("--resume", "--seed", 1), "was generated with other settings: seed 0 -> 1; give"),
        (("--resume", "--depth", 2), r"other settings: depths \[4\] -> \[2\]; give the first"),
        (
            ("--resume", "--count", 2, "--seed", 1, "--bridge", 1),
            "other settings: count 1 -> 2, bridge None -> 1, seed 0 -> 1; give the first value of",
        ),
        (("--resume", "--overwrite"), "exclude each other"),
    ):
        code, _, error = run(*words, *more)
        assert code == 1, more
        assert re.search(message, error), error
        assert error.count("\n") == 1
    assert pictures(tmp_path / "o") == before
    # Other weights under the same name.
    other = small_model()
    torch.nn.init.zeros_(other.var.head.weight)
    shutil.copytree(model, tmp_path / "model")
    record = json.loads((tmp_path / "o" / "generate.json").read_text())
    assert run(*words[:2], tmp_path / "model", *words[3:], "--resume")[2].count("model") >= 1
    other.save_pretrained(tmp_path / "model")
    (tmp_path / "o" / "generate.json").write_text(
        json.dumps({**record, "model": str(tmp_path / "model")})
    )
    code, _, error = run(*words[:2], tmp_path / "model", *words[3:], "--resume")
    assert code == 1
    assert "was generated with other settings: weights " in error
    # --overwrite leaves nothing of the earlier run.
    assert run(*words[:4], 3, *words[6:], "--overwrite")[0] == 0
    assert list(pictures(tmp_path / "o")) == ["00000_class3.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--depth", 99), r"--depth must be an integer in \[2, 4\]"),
        (("--bridge", 99), "--bridge must be an integer in"),
        (("--backend", "triton", "--labels", 1), "--backend triton cannot run adaln_modulate: the"),
        (("--count", 10**7), "images take at least"),
    ],
)
def test_a_refused_overwrite_keeps_the_earlier_images(words, message, model, tmp_path, run):
    out = tmp_path / "o"
    assert run("generate", "--model", model, "--count", 1, "--out", out)[0] == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    code, _, error = run("generate", "--model", model, "--out", out, *words, "--overwrite")
    assert code == 1
    assert re.search(message, error), error
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_two_runs_in_one_folder_are_refused(model, tmp_path, run):
    words = ("generate", "--model", model, "--labels", 1, "--out", tmp_path / "o")
    with locked_folder(tmp_path / "o", module.LOCK_NAME):
        for more in ((), ("--resume",), ("--overwrite",)):
            code, _, error = run(*words, *more)
            assert code == 1
            assert re.search(r"o: another generation is writing into this folder \(proc", error)
            assert error.count("\n") == 1
    assert run(*words)[0] == 0
    assert {path.name for path in (tmp_path / "o").iterdir()} == {
        "00000_class1.png",
        "generate.json",
    }


def test_images_without_a_record_and_damaged_records_are_refused(model, tmp_path, run):
    words = ("generate", "--model", model, "--labels", 1, "--out", tmp_path / "o")
    assert run(*words)[0] == 0
    record = tmp_path / "o" / "generate.json"
    for text in ("{", "[]", "{}", "[" * 100000):
        record.write_text(text)
        code, _, error = run(*words, "--resume")
        assert code == 1, text[:9]
        assert error.count("\n") == 1
        assert "--overwrite" in error
    for batches in ([8], {"8": 0}, {"8": "2"}, {"8": True}):
        record.write_text(json.dumps({"format": "variant-generate-1", "batches": batches}))
        assert '"batches" must be positive integers' in run(*words, "--resume")[2]
    record.unlink()
    os.mkfifo(record)
    assert "must be a regular file; it is a named pipe" in run(*words, "--resume")[2]
    record.unlink()
    assert "not recorded" in run(*words, "--resume")[2]


def test_what_a_killed_run_left_is_cleared(model, tmp_path, run):
    words = ("generate", "--model", model, "--labels", 1, "--out", tmp_path / "o")
    assert run(*words)[0] == 0
    before = set(os.listdir(tmp_path / "o"))
    # The process of another machine, which has ended, may have a number that one of this has too.
    for name in ("00000_class1.png.9", f"00001_class1.png.{os.getpid()}", "generate.json.123456"):
        (tmp_path / "o" / f".{name}.tmp").write_text("")
    with locked_folder(tmp_path / "o", module.LOCK_NAME):  # by the run that writes these files
        assert run(*words, "--resume")[0] == 1
        assert len(os.listdir(tmp_path / "o")) == len(before) + 4
    (tmp_path / "o" / ".notes.txt.9.tmp").write_text("of another program")
    assert run(*words, "--resume")[0] == 0
    assert set(os.listdir(tmp_path / "o")) == before | {".notes.txt.9.tmp"}


def test_images_that_are_cut_off_are_made_again(model, tmp_path, run):
    out = tmp_path / "o"
    words = ("generate", "--model", model, "--labels", 1, 2, "--max-batch", 1, "--out", out)
    assert run(*words)[0] == 0
    before = pictures(out)
    first, second = (out / name for name in sorted(before))
    for content in (b"", before[first.name][:100]):
        first.write_bytes(content)
        code, printed, _ = run(*words, "--resume")
        assert code == 0
        assert "wrote 1 image" in printed
        assert pictures(out) == before
    second.unlink()
    second.mkdir()
    code, _, error = run(*words, "--resume")
    assert code == 1
    assert f"{second}: cannot be written: is no plain file" in error


def test_an_existing_picture_is_not_overwritten(model, tmp_path, run):
    out = tmp_path / "photo.png"
    out.write_text("precious")
    words = ("generate", "--model", model, "--labels", 1, "--out", out)
    code, _, error = run(*words)
    assert code == 1
    assert "exists; give --overwrite" in error
    assert out.read_text() == "precious"
    assert run(*words, "--overwrite")[0] == 0
    assert Image.open(out).text["label"] == "1"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--count", 10**12), r"--count must be an integer in \[1, 100000000\]; got 10{12}"),
        (("--labels", *range(5), "--count", 9 * 10**7), "at most 100,000,000 images in one run"),
        (("--count", 10**8, "--labels", 1), r"images take at least .* MiB; .* are free in"),
        (("--count", 5000, "--out", "x.png"), "a grid holds at most 4096 images; got 25000"),
        (("--resume", "--out", "x.png"), "--resume needs a folder"),
        (("--out", "y/.png"), r"--out must have a name before .png; got y/.png"),
        (("--out", "x.png", "--json", "x.png"), "--json and --out must differ"),
        (("--out", "x.png", "--json", "y/../x.png"), "--json and --out must differ"),
        (("--out", "x", "--json", "x/generate.json"), "must be no file that --out writes"),
        (("--out", "x", "--json", "x/00000_class1.png"), "must be no file that --out writes"),
        (("--out", "x", "--json", "y/../x/depth2_00000_null.png"), "no file that --out writes"),
    ],
)
def test_too_much_is_refused_before_the_work(words, message, model, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    full = shutil.disk_usage(tmp_path)._replace(free=2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    code, _, error = run("generate", "--model", model, *words)
    assert code == 1
    assert re.search(message, error), error
    assert not any(tmp_path.iterdir())


def test_json_says_what_was_generated(model, tmp_path, run):
    words = ("generate", "--model", model, "--labels", 1, "--all-depths", "--out", tmp_path / "o")
    code, printed, error = run(*words, "--json", "-")
    assert code == 0
    assert error.startswith(f"generate: {model}, every depth")
    result = json.loads(printed)
    assert [row["depth"] for row in result["depths"]] == [4, 3, 2]
    assert all(row["seconds"] > row["decode_seconds"] > 0 for row in result["depths"])
    assert all(row["kv_planned_bytes"] == row["kv_allocated_bytes"] for row in result["depths"])


def test_backend_and_device(model, tmp_path, run):
    words = ("generate", "--model", model, "--labels", 1, "--device", "cpu", "--backend")
    assert run(*words, "reference", "--out", tmp_path / "r")[0] == 0
    code, _, error = run(*words, "nope", "--out", tmp_path / "n")
    assert code == 1
    assert "--backend must be one of auto, triton, " in error
    assert error.endswith("; got 'nope'\n")
    code, _, error = run(*words[:-2], "banana", "--out", tmp_path / "n")
    assert code == 1
    assert "--device" in error


def test_too_little_memory_is_one_line(model, tmp_path, run, monkeypatch):
    monkeypatch.setattr("variant.engine.engine.free_bytes", lambda device: 10)
    code, _, error = run("generate", "--model", model, "--out", tmp_path / "out")
    assert code == 1
    assert "are free; use a smaller depth" in error


def test_main_can_be_called_with_a_path_that_is_no_text(model, tmp_path):
    out = tmp_path / os.fsdecode(b"o\xff")
    assert main(["generate", "--model", model, "--labels", "1", "--out", str(out)]) == 0
    assert len(pictures(out)) == 1


def test_a_schedule_by_name_and_by_file_gives_the_same_images(model, tmp_path, run):
    schedule = load_schedule("4-3-2", small_model().var.config)
    save_schedule(tmp_path / "schedule.json", schedule)
    options = ("--model", model, "--labels", 1, 3, "--top-p", 0, "--json", tmp_path / "r.json")
    for name, source in (("a", "4-3-2"), ("b", tmp_path / "schedule.json")):
        code, printed, error = run(
            "generate", *options, "--schedule", source, "--out", tmp_path / name
        )
        assert code == 0, error
        assert "4-3-2 │" in printed
    assert pictures(tmp_path / "a") == pictures(tmp_path / "b")
    record = json.loads((tmp_path / "r.json").read_text())["depths"][0]
    assert record["depth"] == "4-3-2"
    # A name does not say which layers.
    layers = [[0, 1, 2, 3], [0, 2, 3], [0, 3]]
    assert record["schedule"] == layers
    for image in (tmp_path / "a" / "00001_class3.png", tmp_path / "b" / "00000_class1.png"):
        assert json.loads(Image.open(image).text["schedule"]) == layers
    images = small_model().generate([1, 3], depth=schedule, seed=0).images
    picture = np.array(Image.open(tmp_path / "a" / "00001_class3.png"))
    assert (picture == (images[1] * 255).round().permute(1, 2, 0).numpy()).all()
    again = ("generate", *options, "--out", tmp_path / "a", "--resume")
    code, _, error = run(*again, "--schedule", "4-2x2")
    assert code == 1
    assert "was generated with" in error
    assert run(*again, "--schedule", "4-3-2")[0] == 0


@pytest.mark.parametrize("option", [("--depth", 2), ("--bridge", 1), ("--all-depths",)])
def test_a_schedule_excludes_other_depths(model, tmp_path, run, option):
    words = ("generate", "--model", model, "--schedule", "4-3-2", "--out", tmp_path / "out")
    code, _, error = run(*words, *option)
    assert code == 1
    assert "exclude each other" in error
    assert not (tmp_path / "out").exists()


def test_folders_may_have_a_dot_in_their_names(model, tmp_path, run):
    words = ("generate", "--model", model, "--labels", 1, "--out")
    for name in ("top-p-0.9", "v1.0"):
        assert run(*words, tmp_path / name)[0] == 0
        assert len(pictures(tmp_path / name)) == 1
    code, _, error = run(*words, tmp_path / "x.gif")
    assert code == 1
    assert "--out must be a folder or end in .png; got .gif" in error
