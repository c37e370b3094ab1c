"""The study's machinery: what is killed ends as if it had not been, results are what they say."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.study import report, report_plots, report_tables, work
from benchmarks.study.__main__ import main
from benchmarks.study.collect import collect
from benchmarks.study.join import join
from benchmarks.study.metrics import distances, halves
from benchmarks.study.report import page as report_page
from benchmarks.study.report_data import read_study
from benchmarks.study.schedules import (
    token_losses,
)
from benchmarks.study.settings import identity, load_study, merged
from benchmarks.study.stages import measuring, searching, shared, training
from variant.engine.engine import Engine
from variant.errors import UserError
from variant.folder_lock import locked_folder
from variant.models.pixels import to_uint8
from variant.supernet import VARiant

ROOT = Path(__file__).parents[2]
PROFILE = """
[study]
seeds = [0, 1]
parts = ["base", "control", "ratios", "zones", "extras", "kv8", "search"]
images = 30
generated = 20
batch = 10
work = 6
epoch = 2
curve = 10
points = 2
classifier_steps = 40
independent_widths = [8]
checkpoint_minutes = 1.0

[study.base]
work = 50
epoch = 10

[study.runs]
ratios = ["p0.5", "progressive"]
extras = ["several"]
search = ["search-untrained"]

[recipe.model]
embed_dim = 32
num_heads = 2
num_classes = 2

[recipe.vae]
vocab_size = 8
z_channels = 4
ch = 32
ch_mult = [1, 1]
patch_nums = [1, 2, 4]

[recipe.schedule]
bridge = 1

[recipe.vae_training]
epochs = 5

[recipe.vae_training.optim]
batch_size = 10

[recipe.optim]
batch_size = 10

[recipe.eval]
batch_size = 10
limit = 10

[recipe.data]
workers = 0
kind = "idx"
train = "FOLDER/train"
train_labels = "FOLDER/train-labels"
held_out = "FOLDER/held-out"
held_out_labels = "FOLDER/held-out-labels"
"""


def write_idx(path, values):
    header = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    path.write_bytes(header + values.astype(np.uint8).tobytes())


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    """A study of two classes of 8 x 8 pixels, bright at the left or at the right."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, count in (("train", 100), ("held-out", 40)):
        labels = np.arange(count) % 2
        images = np.broadcast_to(rng.integers(0, 60, (count, 1, 1)), (count, 8, 8)).copy()
        for label, image in zip(labels, images, strict=True):
            image[:, 4 * label : 4 * label + 4] += 150
        write_idx(folder / name, images)
        write_idx(folder / f"{name}-labels", labels)
    path = folder / "profile.toml"
    path.write_text(PROFILE.replace("FOLDER", str(folder)))
    return path


# Runs whose differences are averaged over seeds; the others are here with the first seed alone.
TWO_SEEDS = ("base", "labels-permuted", "p0.5", "progressive", "several")


@pytest.fixture(scope="module")
def done(profile, tmp_path_factory):
    """The study and the folder of its complete runs."""
    study, out = load_study(profile), tmp_path_factory.mktemp("study")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    shared.make_vae(study, out)
    shared.make_tokens(study, out, "plain")
    for name in shared.CLASSIFIERS:
        shared.make_classifier(study, out, name)
    shared.make_real(study, out)
    for run in study.runs():
        if run.seed > 0 and run.name not in TWO_SEEDS:
            continue
        measure = searching.measure_search if run.search else measuring.measure
        measure(study, out, run, lambda what: None)
    yield study, out
    torch.set_num_threads(threads)


CHANGING = ("seconds", "date", "commit")


def results_of(folder):
    """The bytes of weights and arrays, and all figures but times, of every file of a run."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".npz", ".safetensors"):
            found[path.name] = path.read_bytes()
        elif path.suffix == ".json":
            values = json.loads(path.read_text())
            found[path.name] = {k: v for k, v in values.items() if k not in CHANGING}
    return found


def identity_in(path):
    return json.loads(path.read_text())["identity"]


def copy_without(out, target, *runs):
    shutil.copytree(out, target)
    for run in runs:
        shutil.rmtree(target / "runs" / run)
    return target


def test_a_rerun_gives_the_same_numbers_bit_for_bit(done, tmp_path):
    study, out = done
    again = copy_without(out, tmp_path / "again", "progressive/seed1")
    measuring.measure(study, again, study.find("progressive", 1), lambda what: None)
    folder = Path("runs") / "progressive" / "seed1"
    first, second = results_of(out / folder), results_of(again / folder)
    assert {"weights.safetensors", "losses.npz", "losses.json", "train.json"} <= first.keys()
    assert first == second


def test_a_study_that_is_killed_ends_as_one_that_is_not(done, profile, tmp_path):
    study, out = done
    folder = Path("runs") / "progressive" / "seed0"
    again = copy_without(out, tmp_path / "again", "progressive/seed0")
    often = tmp_path / "often.toml"
    often.write_text(profile.read_text().replace("= 1.0", "= 1e-6"))  # minutes of checkpoints
    words = [sys.executable, "-m", "benchmarks.study", "run", "--out", str(again), "--jobs", "1"]
    words += ["--profile", str(often), "--only", "progressive"]
    process = subprocess.Popen(words, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    checkpoint = again / folder / "train" / "var-last.pt"
    wait_for(checkpoint.exists, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with waiting_for_lock(checkpoint.parent):  # the process of the run ends too
        assert checkpoint.exists()
        assert not (again / folder / "train.json").exists()
    measuring.measure(study, again, study.find("progressive", 0), lambda what: None)
    assert results_of(out / folder) == results_of(again / folder)


@contextmanager
def waiting_for_lock(folder):
    end = time.monotonic() + 20
    while True:
        try:
            with locked_folder(folder):
                break
        except UserError:
            assert time.monotonic() < end
            time.sleep(0.05)
    yield


def wait_for(condition, process):
    end = time.monotonic() + 100
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)


# --- results -------------------------------------------------------------------------------------


def test_pairs_are_mean_differences_over_images_and_then_over_seeds(done, tmp_path):
    study, out = done
    collect(study, out, tmp_path)
    result = json.loads((tmp_path / "ratios.json").read_text())
    means, errors = [], []
    for seed in (0, 1):
        both = []
        for name in ("p0.5", "progressive"):
            arrays = np.load(out / "runs" / name / f"seed{seed}" / "losses.npz")
            both.append((arrays["d2"].astype(np.float64) * [1, 4, 16]).sum(1) / 21)
        difference = both[0] - both[1]
        means.append(difference.mean())
        errors.append(difference.std(ddof=1) / len(difference) ** 0.5)
    (pair,) = [pair for pair in result["pairs"] if pair["schedule"] == "d2"]
    assert (pair["run"], pair["against"]) == ("p0.5", "progressive")
    assert pair["by_seed"] == pytest.approx(means, rel=1e-5)
    assert pair["se_by_seed"] == pytest.approx(errors, rel=1e-5)
    assert pair["mean"] == pytest.approx(sum(means) / 2, rel=1e-5)
    assert pair["se"] == pytest.approx(abs(means[0] - means[1]) / 2, rel=1e-5)


def test_rows_hold_what_the_page_needs(done, tmp_path):
    study, out = done
    names = {path.stem for path in collect(study, out, tmp_path)}
    assert names == {"base", "control", "ratios", "zones", "kv8", "extras", "search"}
    ratios = json.loads((tmp_path / "ratios.json").read_text())
    assert ratios["part"] == "ratios"
    assert ratios["machine"]
    assert ratios["versions"]["torch"]
    assert [(row["name"], row["seed"]) for row in ratios["runs"]][:2] == [
        ("p0.5", 0),
        ("progressive", 0),
    ]
    for row in ratios["runs"]:
        assert row["work"] == pytest.approx(6, abs=1.5)
        assert row["steps"] > 6  # steps of the subnet cost less
        assert row["layer_tokens"] == {"full": 8 * 21, "d2": 8 + 2 * 20}
        assert len(row["losses"]["d2"]["by_scale"]) == 3
        assert row["generated"]["d2"]["n"] == 20
        assert set(row["gradient_norms"]) == {"shared", "full_only"}
        assert row["curve"][-1][0] == row["steps"]
        assert set(row["curve"][0][1]) == {"full", "d2"}
    kv8 = json.loads((tmp_path / "kv8.json").read_text())
    exact, fp8 = kv8["runs"][:2]
    assert exact["losses"]["full"]["mean"] == pytest.approx(fp8["losses"]["full"]["mean"], abs=0.2)
    assert exact["losses"]["full"]["mean"] != fp8["losses"]["full"]["mean"]


def test_a_search_is_measured_on_images_that_did_not_choose(done, tmp_path):
    study, out = done
    collect(study, out, tmp_path)
    row = json.loads((tmp_path / "search.json").read_text())["runs"][0]
    assert (row["name"], row["seed"], row["exact"]) == ("search-untrained", 0, True)
    assert (row["images"], row["images_compared"]) == (20, 20)
    run = study.find("search-untrained", 0)
    var, vae = measuring.load_models(study, out, run)
    images, label_N = shared.images_of(study).held_out(range(1, 40, 2))
    tokens_NL = vae.encode(images)
    x_teacher = vae.teacher_input(tokens_NL)
    loss_NL = token_losses(var, label_N, x_teacher, tokens_NL, (tuple(range(8)),) * 3)
    for kind, cost in (("grid", "kv"), ("grid", "work"), ("even", "work")):
        key = searching.schedule_key(kind, cost, 1.0)
        assert row["schedules"][key] == "8x3"  # every layer at the three scales
        assert row["losses"][key]["mean"] == pytest.approx(loss_NL.mean().item(), rel=1e-5)
    kinds = {key.split(" ")[0] for key in row["losses"]}
    assert kinds == set(report_tables.SEARCH_KINDS)
    found = read_study(tmp_path)
    page = report.page(found)
    assert "## Searched layers and depths" in page
    assert "| `search-untrained` | work=1 |" in page


def test_the_page_shows_what_was_collected(done, tmp_path):
    study, out = done
    collect(study, out, tmp_path)
    found = read_study(tmp_path)
    report_plots.draw_all(found, tmp_path)
    page = report.page(found)
    rows = json.loads((tmp_path / "ratios.json").read_text())["runs"]
    for schedule in ("full", "d2"):
        means = [row["losses"][schedule]["mean"] for row in rows if row["name"] == "progressive"]
        assert f"| {sum(means) / 2:.4f} ± {abs(means[0] - means[1]) / 2:.4f} |" in page
    for name in ("study-plane.png", "study-curves.png"):
        assert f"({name})" in page
        assert report_plots.is_current(found, tmp_path / name)
    assert "Metrics that flag the control (labels permuted): " in page
    assert "`zones`" in page


def test_the_reconstruction_floor_is_that_of_decoded_images(done, tmp_path):
    study, out = done
    collect(study, out, tmp_path)
    data = json.loads((tmp_path / "base.json").read_text())["data"]
    images = shared.images_of(study)
    everything, label_N = images.held_out(range(images.num_held_out))
    first, second = halves(label_N.numpy(), study.values["generated"])
    vae = shared.saved_vae(study, out)
    own = vae.decode(vae.encode(everything[second])) * 2 - 1
    network = shared.load_network(study, out, "features")
    found = [network(to_uint8(x)).features_BD for x in (own, everything[second], everything[first])]
    labels = [label_N[part] for part in (second, second, first)]
    for key, place in (("reconstruction_floor", 0), ("floor", 1)):
        expected = distances(found[place], labels[place], found[2], labels[2], 2)
        assert data[key]["n"] == 20
        assert data[key]["fashion_fd"] == pytest.approx(expected["fashion_fd"], rel=1e-3)
    assert data["floor"]["fashion_fd"] != data["reconstruction_floor"]["fashion_fd"]


def test_what_is_not_done_is_absent(done, tmp_path):
    study, out = done
    part = copy_without(out, tmp_path / "part", "p0.5", "several", "kv8")
    names = {path.stem for path in collect(study, part, tmp_path / "results")}
    assert names == {"base", "control", "ratios", "zones", "search"}
    ratios = json.loads((tmp_path / "results" / "ratios.json").read_text())
    assert [row["name"] for row in ratios["runs"]] == ["progressive"] * 2
    assert ratios["pairs"] == []
    with pytest.raises(UserError, match="no complete run"):
        collect(study, tmp_path / "nothing", tmp_path / "results")


def read_results(results):
    return {path.stem: json.loads(path.read_text()) for path in results.iterdir()}


def test_a_new_folder_goes_on_from_the_result_files(done, tmp_path):
    """What the folder lacks is kept, whole seeds too, and what it has anew is not."""
    study, out = done
    results = tmp_path / "results"
    results.mkdir()
    collect(study, out, results)
    everything = read_results(results)
    some = copy_without(out, tmp_path / "some", "p0.5", "several", "kv8")
    collect(study, some, results, keep=True)
    assert read_results(results) == everything
    other_seed = copy_without(out, tmp_path / "other", "p0.5", "several", "kv8")
    for folder in (other_seed / "runs").iterdir():
        shutil.rmtree(folder / "seed0")
    collect(study, other_seed, results, keep=True)
    assert read_results(results) == everything
    collect(study, other_seed, results)
    assert row_names(results, "ratios") == [("progressive", 1)]


def study_of_seed(profile, tmp_path, seed):
    path = tmp_path / f"seed{seed}.toml"
    path.write_text(profile.read_text().replace("seeds = [0, 1]", f"seeds = [{seed}]"))
    return load_study(path)


def test_a_seed_of_another_machine_joins_the_results(done, profile, tmp_path):
    """Rows and differences are those of both seeds; to join again changes nothing."""
    study, out = done
    both, results = tmp_path / "both", tmp_path / "results"
    for folder in (both, results):
        folder.mkdir()
    collect(study, out, both)
    collect(study_of_seed(profile, tmp_path, 0), out, results)
    for _ in range(2):
        written = join(study_of_seed(profile, tmp_path, 1), out, results)
        found = read_results(results)
        assert {path.stem for path in written} == {"base", "control", "ratios", "extras", "kv8"}
        assert written[0].read_text() == json.dumps(found["base"], indent=1) + "\n"
        for name, expected in read_results(both).items():
            about = {key: expected[key] for key in ("machine", "versions", "data")}
            joined = found[name].pop("joined", {})
            assert joined == ({"1": about} if f"{results / name}.json" in map(str, written) else {})
            assert found[name] == expected
    assert list(read_results(results)["control"]["flagged"]) == ["0", "1"]
    page = report_page(read_study(results))
    assert "Seed 1, made on another machine, has a VQ-VAE, tokens, classifiers and a base" in page
    assert "Seed 1 with a VQ-VAE of its own: " in page
    assert "| floor, seed 1 |" in page


def test_only_seeds_that_the_results_lack_join(done, profile, tmp_path):
    study, out = done
    results = tmp_path / "results"
    results.mkdir()
    one = study_of_seed(profile, tmp_path, 1)
    with pytest.raises(UserError, match=r"base\.json cannot be read: .*; collect its seeds first"):
        join(one, out, results)
    collect(study, out, results)
    before = read_results(results)
    with pytest.raises(UserError, match="has runs of seed 1 that did not join"):
        join(one, out, results)
    collect(study_of_seed(profile, tmp_path, 0), out, results)
    path = results / "ratios.json"
    path.write_text(path.read_text().replace(before["ratios"]["settings"], "0" * 64))
    kept = read_results(results)
    with pytest.raises(UserError, match=r"ratios\.json is of other settings"):
        join(one, out, results)
    assert read_results(results) == kept


@pytest.mark.parametrize("kind", ["settings", "data", "base", "run"])
def test_other_numbers_are_not_kept(done, tmp_path, kind):
    """Those of other settings, of another VQ-VAE, of another base model, of another run."""
    study, out = done
    results = tmp_path / "results"
    results.mkdir()
    collect(study, out, results)
    some = copy_without(out, tmp_path / "some", "p0.5")
    path = results / ("base.json" if kind == "base" else "ratios.json")
    values = json.loads(path.read_text())
    if kind == "settings":
        values["settings"] = "0" * 64
    elif kind == "data":
        values["data"]["floor"]["fashion_fd"] += 1e-3
    elif kind == "base":
        values["runs"][1]["losses"]["full"]["mean"] += 1e-5
    else:
        values["runs"][0]["settings"]["work"] = 7
    path.write_text(json.dumps(values))
    collect(study, some, results, keep=True)
    seeds = {"settings": [], "data": [], "base": [0], "run": [1]}[kind]
    kept = [("p0.5", seed) for seed in seeds]
    assert [row for row in row_names(results, "ratios") if row[0] == "p0.5"] == kept
    pairs = json.loads((results / "ratios.json").read_text())["pairs"]
    assert [pair["seeds"] for pair in pairs] == [seeds] * (2 if seeds else 0)


def row_names(results, part):
    path = results / f"{part}.json"
    rows = json.loads(path.read_text())["runs"] if path.exists() else []
    return [(row["name"], row["seed"]) for row in rows]


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("study", "work", 7),
        ("study", "curve", 9),
        ("recipe.schedule", "bridge", 2),
        ("recipe.optim", "batch_size", 9),
    ],
)
def test_numbers_of_old_settings_are_in_no_row(done, profile, tmp_path, section, key, value):
    """Of changed settings nothing has run; the base follows from other keys, or does not."""
    study, out = done
    collect(study, out, tmp_path)
    before = row_names(tmp_path, "ratios")
    text = profile.read_text()
    head, tail = text.split(f"[{section}]\n")
    old = next(line for line in tail.splitlines() if line.startswith(f"{key} = "))
    changed = tmp_path / "changed.toml"
    changed.write_text(f"{head}[{section}]\n{tail.replace(old, f'{key} = {value}', 1)}")
    assert changed.read_text() != text
    other = load_study(changed)
    if key == "work":  # of the fine-tuning runs only: their old results go, those of the base stay
        collect(other, out, tmp_path)
        assert row_names(tmp_path, "base") == [("base", 0), ("base", 1)]
        assert row_names(tmp_path, "ratios") == row_names(tmp_path, "extras") == []
        assert not (tmp_path / "ratios.json").exists()
    else:
        with pytest.raises(UserError, match="no complete run of these settings"):
            collect(other, out, tmp_path)
        assert row_names(tmp_path, "ratios") == before  # nothing was written or removed


def test_identities_cover_what_is_measured(done):
    """Layers of schedules, seeds of random numbers, data and seed of the VQ-VAE."""
    study, out = done
    base, run = study.find("base", 0), study.find("progressive", 0)
    recipe = merged(study.recipe, {"schedule": {"bridge": 2}})
    wider = dataclasses.replace(study, recipe=recipe)
    generated = partial(measuring.generated_identity, schedule="d2")
    for wanted in (measuring.losses_identity, generated):
        assert wanted(study, out, base) != wanted(wider, out, base)
        assert wanted(study, out, run) != wanted(study, out, study.find("progressive", 1))
    full = [measuring.generated_identity(one, out, base, "full") for one in (study, wider)]
    assert full[0] == full[1]  # no bridge in it
    for changes in ({"seed": 1}, {"data": {"dataset": None}}):
        other = dataclasses.replace(study, recipe=merged(study.recipe, changes))
        assert shared.vae_identity(other) != shared.vae_identity(study)


def test_identities_of_the_settings_stay():
    """Results made before these identities covered more are results of the same settings."""
    study = load_study()
    recipe = study.recipe
    assert shared.vae_identity(study) == identity(recipe["vae"], recipe["vae_training"])
    assert {key: study.values[key] for key in training.CURVE} == training.CURVE


def test_the_control_is_flagged_by_every_metric(done, tmp_path):
    study, out = done
    collect(study, out, tmp_path)
    result = json.loads((tmp_path / "control.json").read_text())["flagged"]
    metrics = {"loss", "fashion_fd", "precision", "recall", "accuracy"}
    assert set(result) == {"0", "1"}
    for seed in result.values():
        assert {name.split()[0] for name in seed} == metrics
        assert all(seed.values())


def test_a_control_that_a_metric_misses_is_an_error(done, tmp_path):
    study, out = done
    wrong = copy_without(out, tmp_path / "wrong")
    for name in ("losses.json", "generated-full.json"):  # as good as the right run
        broken = wrong / "runs/labels-permuted/seed0" / name
        values = json.loads((wrong / "runs/base/seed0" / name).read_text())
        broken.write_text(json.dumps(values | {"identity": identity_in(broken)}))
    with pytest.raises(UserError, match="must be flagged"):
        collect(study, wrong, tmp_path / "results")
    written = list((tmp_path / "results").iterdir())
    assert len(written) == len(study.parts)  # the other parts are not lost


def test_an_exported_run_generates_what_was_measured(done, profile, tmp_path, capsys):
    study, out = done
    to = tmp_path / "model"
    words = ["export", "--out", str(out), "--profile", str(profile), "--to", str(to)]
    assert main([*words, "--run", "several", "--seed", "1"]) == 0
    model = VARiant.from_pretrained(to)
    assert model.var.config.class_names == ("0", "1")
    assert {2, 4} <= set(model.var.config.subnets)
    assert model.var.config.bridge == 1
    engine = Engine(*measuring.load_models(study, out, study.find("several", 1)))
    for depth in (None, 4, 2):
        own, wanted = (e.generate([0, 1], depth=depth, seed=3) for e in (model, engine))
        assert torch.equal(own.tokens, wanted.tokens)
        assert torch.equal(own.images, wanted.images)
    losses = json.loads((out / "runs" / "several" / "seed1" / "losses.json").read_text())["losses"]
    found = model.extra["training"]["held_out_loss"]
    assert found == {name.removeprefix("d"): row["mean"] for name, row in losses.items()}
    assert main([*words, "--run", "labels-permuted"]) == 1  # it trains nothing
    assert main(words) == 1
    errors = capsys.readouterr().err
    assert "labels-permuted of seed 0 is not complete" in errors
    assert "export needs --run and --to" in errors


def test_a_control_is_compared_with_the_base_of_its_seed(done, tmp_path):
    """Also if another seed of the control is missing."""
    study, out = done
    part = copy_without(out, tmp_path / "part", "labels-permuted/seed0", "base/seed0")
    collect(study, part, tmp_path / "results")
    result = json.loads((tmp_path / "results" / "control.json").read_text())
    assert list(result["flagged"]) == ["1"]
    assert [row["seed"] for row in result["runs"]] == [1]


def test_the_identity_of_a_training_sees_its_number_of_steps(done, monkeypatch):
    study, out = done
    run, base = study.find("progressive", 0), study.find("base", 0)
    before = [training.training_identity(study, out, one) for one in (run, base)]
    monkeypatch.setattr(work, "FORWARD", 0.9)  # of equal work are now fewer steps with a teacher
    training._training_length.cache_clear()
    assert [training.training_identity(study, out, one) for one in (run, base)] == before
    monkeypatch.setattr(work, "training_flop", lambda config, schedule: 1.0)
    training._training_length.cache_clear()
    after = [training.training_identity(study, out, one) for one in (run, base)]
    assert after[0] != before[0]
    assert after[1] == before[1]
    training._training_length.cache_clear()
