"""``variant search``: from images to a schedule that other commands take."""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import small_model

from variant import VARiant, load_schedule
from variant.cli import search as module_of_command
from variant.cli import search_job as module
from variant.cli.main import main
from variant.cli.search import LOCK_NAME
from variant.cli.search_job import RECORD, SCHEDULE
from variant.data.sources import open_data
from variant.errors import UserError
from variant.folder_lock import locked_folder
from variant.models.flops import linear_flop
from variant.search.data import held_out
from variant.search.space import Space
from variant.training.recipe import load_recipe
from variant_kernels import CachePlan, DepthSchedule, use_backend
from variant_kernels.plans.depth_schedule import select_layers

# Images of the digits' test; `make nightly` takes all.
IMAGES = int(os.environ.get("VARIANT_SEARCH_IMAGES", "10"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two images of each class of the small model."""
    folder = tmp_path_factory.mktemp("search") / "images"
    rng = np.random.default_rng(0)
    for label in range(5):
        (folder / f"class{label}").mkdir(parents=True)
        for index in range(2):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{index}.png")
    return str(folder)


@pytest.fixture
def few(words):
    """Two depths: few schedules."""
    return (*words, "--depths", 2)


@pytest.fixture
def words(model, images, tmp_path):
    return ("search", "--model", model, "--data", images, "--out", tmp_path / "out")


def record_of(tmp_path):
    return json.loads((tmp_path / "out" / "search.json").read_text())


def test_the_schedule_is_within_the_budget_and_usable(words, model, tmp_path, run):
    code, printed, error = run(*words, "--budget", "kv=0.8", "work=0.9")
    assert code == 0, error
    record, out = record_of(tmp_path), tmp_path / "out"
    assert record["exact"]
    assert (record["images"], record["images_compared"]) == (5, 5)
    best = record["best"]
    assert best["costs"]["kv"] <= 0.8
    assert best["costs"]["work"] <= 0.9
    within = [
        one for name in ("kv", "work") for one in record["front"][name]
        if one["costs"]["kv"] <= 0.8 and one["costs"]["work"] <= 0.9
    ]  # fmt: skip
    assert all(best["loss"] <= one["loss"] for one in within)
    schedule = load_schedule(out / "schedule.json", small_model().var.config)
    assert [list(layers) for layers in schedule.layers] == best["layers"]
    layout = small_model().var.layout
    pages = [CachePlan(layout, s).peak_pages for s in (schedule, DepthSchedule.full(4, 3))]
    assert best["costs"]["kv"] == pages[0] / pages[1]
    assert f"Within kv=0.8, work=0.9: {schedule.name}" in printed
    assert "searched schedules" in printed
    file = out / "schedule.json"
    for command in (
        ("generate", "--model", model, "--labels", 1, "--out", tmp_path / "a.png"),
        ("sample", "--model", model, "--num", 2, "--out", tmp_path / "samples"),
        ("plan", "--model", model),
    ):
        code, _, error = run(*command, "--schedule", file)
        assert code == 0, error


def test_a_resumed_search_computes_nothing_and_finds_the_same(few, tmp_path, run, monkeypatch):
    assert run(*few)[0] == 0
    first = record_of(tmp_path)
    code, _, error = run(*few)
    assert code == 1
    assert "holds an earlier search; give --resume" in error
    monkeypatch.setattr(module.ForcedLosses, "__call__", lambda *_: pytest.fail("computed again"))
    assert run(*few, "--resume")[0] == 0
    again = record_of(tmp_path)
    for changing in ("seconds", "environment"):
        first.pop(changing), again.pop(changing)
    assert again == first


@pytest.mark.parametrize("mode", [(), ("--exact", 1)], ids=["exact", "beam"])
def test_images_that_do_not_fit_into_memory_are_taken_in_parts(
    few, tmp_path, run, monkeypatch, mode
):
    assert run(*few, *mode)[0] == 0
    whole = record_of(tmp_path)
    defaults = module.ForcedLosses.__init__.__kwdefaults__
    monkeypatch.setitem(defaults, "cache_bytes", 0)  # one image at a time
    parts = set()
    compute = module.ForcedLosses._losses
    monkeypatch.setattr(
        module.ForcedLosses,
        "_losses",
        lambda self, number, prefix: (parts.add(number), compute(self, number, prefix))[1],
    )
    assert run(*few[:-3], tmp_path / "parts", *few[-2:], *mode)[0] == 0
    assert parts == set(range(5))
    record = json.loads((tmp_path / "parts" / "search.json").read_text())
    for one, other in zip(whole["front"]["kv"], record["front"]["kv"], strict=True):
        assert one["layers"] == other["layers"]
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)


def test_losses_of_another_configuration_are_not_read(few, model, tmp_path, run):
    assert run(*few)[0] == 0
    first = record_of(tmp_path)
    other = tmp_path / "model"
    shutil.copytree(model, other)
    config = json.loads((other / "config.json").read_text())
    config["var"]["norm_eps"] = 0.1
    (other / "config.json").write_text(json.dumps(config))
    code, _, error = run(*few[:2], other, *few[3:], "--resume")
    assert code == 0, error
    assert record_of(tmp_path)["full_loss"] != first["full_loss"]


def test_a_stopped_comparison_keeps_its_losses_too(few, run, monkeypatch):
    compare, made = module.compare, []

    def stopping(*arguments):
        made.extend(compare(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "compare", stopping)
    code, _, error = run(*few)
    assert code == 130
    assert "losses are in" in error
    assert error.rstrip().endswith("--resume")
    known, calls = module.ForcedLosses.__call__, []
    monkeypatch.setattr(module, "compare", compare)
    monkeypatch.setattr(module.ForcedLosses, "__call__", lambda *a: (calls.append(a), known(*a))[1])
    assert run(*few, "--resume")[0] == 0
    assert made
    assert not calls


def test_the_comparison_runs_without_the_kv_of_the_search(few, run, monkeypatch):
    compare, held = module.Job.compare, []

    def watched(job, result):
        held.append(job.losses.losses._kept_bytes)
        return compare(job, result)

    monkeypatch.setattr(module.Job, "compare", watched)
    assert run(*few)[0] == 0
    assert held == [0]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
def test_a_stopped_search_keeps_its_losses(few, tmp_path, run, monkeypatch, stop):
    assert run(*few)[0] == 0
    undisturbed = record_of(tmp_path)["front"]
    for file in (tmp_path / "out").iterdir():
        file.unlink()
    compute, left = module.ForcedLosses.__call__, [9]

    def stopping(self, prefix):
        left[0] -= 1
        if not left[0]:
            raise stop
        return compute(self, prefix)

    monkeypatch.setattr(module.ForcedLosses, "__call__", stopping)
    code, _, error = run(*few)
    assert code == (130 if stop is KeyboardInterrupt else 1)
    if stop is KeyboardInterrupt:
        assert "8 losses are in" in error
        assert error.rstrip().endswith("--resume")
    left[0] = 10**9
    assert run(*few, "--resume")[0] == 0
    assert record_of(tmp_path)["front"] == undisturbed
    assert left[0] > 10**9 - 10**4


def test_times_are_measured_once(words, tmp_path, run, monkeypatch):
    budget = ("--budget", "latency=1", "--depths", 2)
    code, printed, error = run(*words, *budget)
    assert code == 0, error
    assert "times of" not in printed
    record = record_of(tmp_path)
    assert set(record["best"]["costs"]) == {"kv", "work", "latency"}
    table = json.loads((tmp_path / "out" / "latency.json").read_text())
    assert table["seconds"] == record["seconds_per_scale"]
    assert table["cpu"]
    assert table["cuda_graphs"] is False
    monkeypatch.setattr(module, "measure_seconds", lambda *_, **__: pytest.fail("measured again"))
    code, printed, _ = run(*words, *budget, "--resume")
    assert code == 0
    assert "search: times of" in printed
    # Another instruction set, other kernels, another batch: other times.
    machine = module.environment()
    monkeypatch.setattr(module, "environment", lambda: {**machine, "isa": "other"})
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        run(*words, *budget, "--resume")
    monkeypatch.setattr(module, "environment", lambda: machine)
    with use_backend("reference"), pytest.raises(pytest.fail.Exception, match="measured again"):
        run(*words, *budget, "--resume")
    monkeypatch.setattr(module, "measure_seconds", lambda *_, **__: {2: [1.0] * 3, 4: [2.0] * 3})
    code, printed, error = run(*words, *budget, "--resume", "--batch", 2)
    assert code == 1, "depth 3 of the grid is missing"
    monkeypatch.setattr(
        module, "measure_seconds", lambda *_, **__: {n: [float(n)] * 3 for n in (2, 3, 4)}
    )
    code, printed, error = run(*words, *budget, "--resume", "--batch", 2)
    assert code == 0, error
    assert "measuring again" in printed
    costs = [one["costs"]["latency"] for one in record_of(tmp_path)["front"]["latency"]]
    assert min(costs) == 0.5


def test_the_time_of_the_found_schedule_is_measured_beside_the_table(
    few, tmp_path, run, monkeypatch
):
    """The table is a sum over scales; a schedule of several depths may take longer than that."""

    def marks(engine, schedule, batch):
        changes = len(set(schedule.depths)) - 1
        return [depth / 4 + changes / 30 for depth in schedule.depths]

    monkeypatch.setattr("variant.search.latency._marks", marks)
    code, printed, error = run(*few, "--budget", "latency=0.7")
    assert code == 0, error
    record = record_of(tmp_path)
    depths = [len(layers) for layers in record["best"]["layers"]]
    assert len(set(depths)) == 2, "no schedule of two depths: nothing differs from the table"
    own, full = sum(depths) / 4 + 3 / 30, 3.0
    assert record["best"]["costs"]["latency"] == pytest.approx(sum(depths) / 4 / full)
    measured = record["latency_measured"]
    assert measured == pytest.approx({"seconds": own, "full_seconds": full, "share": own / full})
    text = f"{own / full:.3f} of the full network's time ({1000 * own:,.1f} of 3,000.0 ms)"
    assert text in " ".join(printed.split())
    shutil.rmtree(tmp_path / "out")
    code, printed, error = run(*few)
    assert record_of(tmp_path)["latency_measured"] is None
    assert "Measured" not in printed


@pytest.mark.parametrize("link", [False, True], ids=["file", "link"])
@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_record_is_of_the_schedule_beside_it_whenever_a_search_is_killed(
    tmp_path, monkeypatch, renames, link
):
    """Of a resumed search too, which finds the files of the one before."""

    class Killed(BaseException):
        pass

    def write(depths):
        job = SimpleNamespace(
            folder=tmp_path, command=SimpleNamespace(model="m"), data="d", budgets={"kv": 1.0},
            schedule_of=lambda found: DepthSchedule.from_depths(found.schedule, full_depth=4),
        )  # fmt: skip
        found = SimpleNamespace(schedule=depths, costs={"kv": 0.5})
        module_of_command._write(job, found, {"best": depths})

    def pair():
        """The depths of the schedule, and those of the record, if there is one."""
        schedule = load_schedule(tmp_path / SCHEDULE)
        record = tmp_path / RECORD
        best = json.loads(record.read_text())["best"] if record.exists() else None
        return [len(layers) for layers in schedule.layers], best

    if link:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / RECORD).symlink_to(tmp_path / "elsewhere" / RECORD)
    write([4, 4])
    left, replace = [renames], os.replace

    def replace_until_killed(source, target):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_until_killed)
    with contextlib.suppress(Killed):
        write([4, 2])
    monkeypatch.undo()
    assert pair() == [([4, 4], None), ([4, 2], None), ([4, 2], [4, 2])][renames]
    write([4, 3])
    assert pair() == ([4, 3], [4, 3])
    assert (tmp_path / RECORD).is_symlink() == link


def test_two_searches_in_one_folder_are_refused(words, run):
    with locked_folder(words[-1], LOCK_NAME):
        code, _, error = run(*words, "--budget", "kv=0.9")
    assert code == 1
    assert "another search is writing into this folder (process" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["schedule.json", "search.json", "losses-1.safetensors"])
def test_what_an_earlier_search_wrote_is_not_replaced_unasked(few, run, name):
    out = few[few.index("--out") + 1]
    out.mkdir()
    (out / name).write_text("precious")
    code, _, error = run(*few)
    assert code == 1
    assert "holds an earlier search; give --resume" in error
    assert (out / name).read_text() == "precious"


def test_what_a_killed_search_left_half_written_is_removed(few, run):
    out = few[few.index("--out") + 1]
    (out / ".losses-1.safetensors.12.parts.tmp").mkdir(parents=True)
    for name in (".losses-1.safetensors.12.tmp", ".search.json.12.tmp"):
        (out / name).write_text("")
    assert run(*few)[0] == 0
    assert {path.name.split("-")[0] for path in out.iterdir()} == {
        "losses", "schedule.json", "search.json"
    }  # fmt: skip


def test_a_beam_is_used_above_the_limit_and_json_is_alone(words, run):
    code, printed, _ = run(*words, "--exact", 1, "--beam", 2, "--budget", "kv=0.9", "--json", "-")
    assert code == 0
    record = json.loads(printed)
    assert not record["exact"]
    assert record["best"]["costs"]["kv"] <= 0.9


def test_after_a_beam_both_sides_are_compared_within_all_budgets(words, run, monkeypatch):
    rows, compare = [], module.compare
    monkeypatch.setattr(module, "compare", lambda *a: rows.extend(compare(*a)) or rows)
    # By beam are both kinds of layers, or the searched alone (there are 10 of the others).
    for exact in ("1", "10"):
        rows.clear()
        budgets = {"kv": 0.9, "work": 0.7}
        given = [f"{name}={share}" for name, share in budgets.items()]
        code, _, error = run(
            *words[:-1], words[-1] / exact, "--exact", exact, "--beam", 2, "--budget", *given
        )
        assert code == 0, error
        assert {row.cost for row in rows} == {"kv", "work"}
        for row in rows:
            limits = {**budgets, row.cost: row.share}
            for side in (row.searched, row.other):
                assert all(side.costs[name] <= most + 1e-9 for name, most in limits.items())
    rows.clear()
    out = words[-1] / "one"
    assert run(*words[:-1], out, "--exact", 1, "--beam", 2, "--budget", "work=0.7")[0] == 0
    assert {row.cost for row in rows} == {"work"}


def test_the_plot_shows_each_cost(few, tmp_path, run):
    pytest.importorskip("matplotlib")
    assert run(*few, "--plot", tmp_path / "front.png")[0] == 0
    with Image.open(tmp_path / "front.png") as picture:
        assert picture.size[0] > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--budget", "kv"), "--budget must be kv=SHARE, work=SHARE, latency=SHARE"),
        (("--budget", "kv=0"), "in (0, 1]; got kv=0"),
        (("--budget", "gold=0.5"), "got gold=0.5"),
        (("--budget", "kv=nan"), "got kv=nan"),
        (("--budget", "kv=0.5", "kv=0.4"), "--budget kv is given twice"),
        (("--images", 1), "--images must be an integer in [2"),
        (("--depths", 5), "--depths must be an integer in [2, 4]; got 5"),
        (("--beam", 0), "--beam must be an integer >= 1"),
        (("--data", "nothing"), "--data must name a folder of images"),
        (("--data", "digits"), "digits need images whose side is a multiple of 8"),
        (("--vae", "vae.pth"), "--vae goes with a file of the transformer's weights"),
        (("--device", "mars"), "--device"),
    ],
)
def test_bad_options_are_refused_in_one_line(words, run, options, message):
    code, _, error = run(*words, *options) if options[0] != "--data" else run(
        *words[:3], *options, *words[5:]
    )  # fmt: skip
    assert code == 1
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (["kv=0.01"], "no schedule is within kv=0.01; the least possible is kv 0.5"),
        (
            ["kv=1", "work=0.2"],
            "no schedule is within kv=1, work=0.2; the least possible is kv 0.5",
        ),
        (["latency=0.4"], "within latency=0.4; the least possible is latency 0.5"),
    ],
)
def test_an_unreachable_budget_is_refused_before_any_loss(words, run, monkeypatch, budget, message):
    times = {n: [float(n)] * 3 for n in (2, 3, 4)}
    monkeypatch.setattr(module, "measure_seconds", lambda *_, **__: times)
    monkeypatch.setattr(module.ForcedLosses, "__call__", lambda *_: pytest.fail("computed"))
    code, _, error = run(*words, "--budget", *budget)
    assert code == 1
    assert message in error
    assert error.count("\n") == 1


def test_times_are_not_measured_for_a_budget_of_bytes_that_nothing_meets(words, run, monkeypatch):
    monkeypatch.setattr(module, "measure_seconds", lambda *_, **__: pytest.fail("measured"))
    code, _, error = run(*words, "--budget", "latency=1", "kv=0.01")
    assert code == 1
    assert "within latency=1, kv=0.01; the least possible is kv 0.500." in error


def test_schedules_of_other_layers_are_counted_apart(few, tmp_path, run):
    code, printed, error = run(*few)
    assert code == 0, error
    record = record_of(tmp_path)
    # Depths 4 and 2 make four schedules; the grid has depth 3 from scale 0, 1 or 2 on besides.
    assert (record["evaluated"], record["schedules"]) == (4, 4)
    assert record["evaluated_besides"] == 3
    assert "4 of 4 schedules evaluated, and 3 of other layers" in " ".join(printed.split())


def test_the_smallest_budget_that_is_reachable_is_met(few, tmp_path, run):
    assert run(*few, "--budget", "kv=0.5")[0] == 0
    assert record_of(tmp_path)["best"]["costs"]["kv"] == 0.5


def test_every_printed_cost_can_be_given_as_a_budget(few, tmp_path, run):
    code, _, error = run(*few, "--budget", "work=0.1")
    assert code == 1
    least = re.findall(r"the least possible is work ([\d.]+)\.", error)[0]
    code, printed, error = run(*few, "--budget", f"work={least}")
    assert code == 0, error
    costs = [one["costs"]["work"] for one in record_of(tmp_path)["front"]["work"]]
    shown = [f"{math.ceil(cost * 1000 - 1e-6) / 1000:.3f}" for cost in costs]
    assert any(float(f"{cost:.3f}") < cost for cost in costs), "no cost is rounded up"
    assert min(shown) == least
    for cost, text in zip(costs, shown, strict=True):
        assert cost <= float(text) + 1e-9 < cost + 1e-3 + 1e-9
        assert f" {text} " in printed


def test_what_a_model_and_its_data_need(model, images, tmp_path, run):
    assert "--data must name the images" in run("search", "--model", model)[2]
    weights = tmp_path / "var.pth"
    torch.save({}, weights)
    error = run("search", "--model", weights, "--data", "digits", "--out", tmp_path / "o")[2]
    assert "--vae must name the VQ-VAE's file beside" in error
    fewer = tmp_path / "fewer"
    shutil.copytree(images, fewer)
    shutil.rmtree(fewer / "class4")
    error = run("search", "--model", model, "--data", fewer, "--out", tmp_path / "o")[2]
    text = f"fewer: must have the 5 classes of the model; it has 4 (sub-folders of {fewer})"
    assert text in error


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ((), None),
        (("class0", "class1", "class2", "class3", "class4"), None),
        (("0", "1", "2", "3", "4"), None),
        (("class0", "class2", "class1", "class3", "class4"), "class 1 .* is class1, .* class2"),
        (("cat", "dog", "eel", "fox", "gnu"), "class 0 of .* is class0, that of the model cat"),
    ],
)
def test_classes_of_other_names_are_warned_about(model, images, monkeypatch, names, text):
    loaded = VARiant.from_pretrained(model)
    config = dataclasses.replace(loaded.var.config, class_names=names)
    monkeypatch.setattr(loaded.var, "config", config)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        held_out(loaded, images, 2)
    messages = [str(each.message) for each in heard if each.category is RuntimeWarning]
    assert len(messages) == (text is not None)
    assert text is None or re.search(text, messages[0])


def test_files_of_the_original_code_are_searched(model, images, tmp_path, run):
    files = "--to-var", tmp_path / "var.pth", "--to-vae", tmp_path / "vae.pth"
    assert run("convert", "--model", model, *files)[0] == 0
    code, _, error = run(
        "search", "--model", files[1], "--vae", files[3], "--data", images, "--depths", 3, 2,
        "--budget", "work=0.7", "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, error
    # It was trained at one depth: layers by influence, evenly chosen ones, and their grid.
    record = record_of(tmp_path)
    assert record["best"]["costs"]["work"] <= 0.7
    assert {row["with"] for row in record["comparison"]} == {
        "equidistant or trained layers", "depth and bridge"
    }  # fmt: skip
    assert [len(layers) for layers in record["sets"]] == [4, 3, 2]


def test_held_out_images_are_those_of_the_recipe():
    model = VARiant.from_pretrained("digits")
    images = held_out(model, "digits", 7)
    recipe = load_recipe("digits")
    pixels, labels = open_data(recipe.data, 16, 3, recipe.seed).held_out(range(7))
    assert torch.equal(images.labels_N, labels)
    assert torch.equal(images.tokens_NL, model.vae.encode(pixels))
    first, second = images.halves()
    assert (len(first.labels_N), len(second.labels_N)) == (4, 3)
    with pytest.raises(UserError, match="must have two held-out images"):
        held_out(model, "digits", 1)


@pytest.mark.parametrize("which", ["folder", "t10k-images-idx3-ubyte", "train-images-idx3-ubyte"])
def test_held_out_images_are_those_of_idx_files(tmp_path, which):
    """Of a folder those of MNIST's names for the held-out part, of a file its own."""
    values = {}
    for seed, part in enumerate(("train", "t10k")):
        rng = np.random.default_rng(seed)
        images, labels = rng.integers(0, 256, (10, 16, 16)), np.arange(10)
        values[part] = images
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim])
            header += b"".join(size.to_bytes(4, "big") for size in array.shape)
            (tmp_path / f"{part}-{kind}-ubyte").write_bytes(header + bytes(array.ravel().tolist()))
    model = VARiant.from_pretrained("digits")
    found = held_out(model, str(tmp_path / which if which != "folder" else tmp_path), 10)
    assert sorted(found.labels_N.tolist()) == list(range(10))
    images = torch.from_numpy(values["train" if which.startswith("train") else "t10k"])
    pixels = (images.float() / 127.5 - 1).unsqueeze(1).expand(-1, 3, -1, -1)
    assert torch.equal(found.tokens_NL, model.vae.encode(pixels[found.labels_N]))


def test_on_digits_it_is_no_worse_than_all_28_schedules_at_any_budget(tmp_path):
    out = tmp_path / "out"
    options = ["--images", str(2 * IMAGES), "--depths", "8", "4", "2"]
    if IMAGES > 20:
        options = options[:2]
    assert main(["search", "--model", "digits", "--out", str(out), *options]) == 0
    record = json.loads((out / "search.json").read_text())
    assert record["exact"]
    model = VARiant.from_pretrained("digits")
    half = held_out(model, "digits", 2 * IMAGES).halves()[0]
    assert record["images"] == len(half.labels_N)
    sets = [select_layers(8, depth) for depth in (4, 2)]
    schedules = list(Space(8, 6, sets).schedules())
    assert len(schedules) == 28
    x_teacher = model.vae.teacher_input(half.tokens_NL)

    def cost(name, schedule):
        if name == "kv":
            return CachePlan(model.var.layout, schedule).peak_pages
        return linear_flop(model.var.config, schedule)

    full = {name: cost(name, DepthSchedule.full(8, 6)) for name in ("kv", "work")}
    for schedule in schedules:
        by_scale = DepthSchedule.from_depths(schedule, full_depth=8)
        with torch.no_grad():
            loss = model.var(half.labels_N, x_teacher, by_scale, targets_BL=half.tokens_NL).mean
        for name, of_full in full.items():
            most = cost(name, by_scale) / of_full + 1e-9
            within = [one for one in record["front"][name] if one["costs"][name] <= most]
            assert min(one["loss"] for one in within) <= loss.item() + 1e-5
