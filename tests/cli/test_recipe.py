"""``variant recipe``."""

import io
import sys
import tomllib

from variant.cli.main import main
from variant.cli.options import Train
from variant.cli.parser import parse
from variant.cli.train import resume_command
from variant.training.recipe import load_recipe, parse_recipe, recipe_values
from variant.training.recipe_reference import recipe_toml


def test_a_shown_recipe_is_a_recipe(run, tmp_path):
    code, printed, _ = run("recipe", "show", "digits", "--optim.learning-rate", "2e-4")
    assert code == 0
    path = tmp_path / "shown.toml"
    path.write_text(printed)
    assert load_recipe(path) == load_recipe("digits", overrides=["optim.learning_rate=2e-4"])
    assert tomllib.loads(printed)["schedule"]["final_probability"] == 1.0


def test_a_check_prints_what_the_run_will_be(run):
    code, printed, _ = run("recipe", "check", "digits", "--schedule.schedules", "[[8,8,8,8,4,2]]")
    assert code == 0
    lines = dict(line.split(None, 1) for line in printed.splitlines() if line[0] != "s")
    assert lines["images"] == "1,618 for training, 179 held out, 10 classes"
    assert lines["train"] == "45 epochs, batches of 32, 2,250 steps of fp32, 50 an epoch"
    assert lines["train-vae"].endswith("1,200 steps of fp32, 25 an epoch")
    assert lines["transformer"] == "619,536 parameters, 8 layers of width 64"
    # (30 * 0.4 + 12 * 0.7 + 3) / 45
    assert "30 joint + 12 transition + 3 refinement; 52 % of the steps" in printed
    assert "subnet 4     layers 0, 2, 5, 7" in printed


def test_a_check_without_the_images_says_so(run):
    code, printed, _ = run("recipe", "check", "imagenet-var-d30")
    assert code == 0
    assert "not there: data.train: imagenet/train: no such folder of images" in printed
    assert "25 epochs, batches of 1024 in" in printed
    assert "2,010,020,356 parameters" in printed


def test_a_check_names_what_is_wrong_with_images_that_are_there(run, tmp_path):
    words = ["examples/my_images.toml"]
    for part in ("train", "held_out"):
        words += [f"--data.{part.replace('_', '-')}", tmp_path / part]
        (tmp_path / part / "cat").mkdir(parents=True)
    code, printed, error = run("recipe", "check", *words)
    assert code == 1
    assert f"problem: data.train: {tmp_path}/train/cat: holds no image (.jpeg" in printed
    assert "images       cannot be read\n" in printed
    assert error.endswith("has 1 problem, listed above\n")
    (tmp_path / "train" / "cat").rmdir()
    (tmp_path / "train").rmdir()
    code, printed, _ = run("recipe", "check", *words)
    assert code == 0
    assert f"not there: data.train: {tmp_path}/train: no such folder" in printed


def test_a_check_names_every_problem_on_a_line_of_its_own(run):
    code, printed, error = run(
        "recipe", "check", "digits", "--optim.learning-rate", "fast", "--optim.clip=-1",
        "--schedule.final-probability", "2", "--optim.lerning-rate", "1", "--zzzz.qqqq", "1",
    )  # fmt: skip
    assert code == 1
    assert printed.splitlines() == [
        "recipe: checking digits",
        "problem: --optim.lerning-rate: no such key of a recipe; perhaps you meant "
        "--optim.learning-rate",
        "problem: --zzzz.qqqq: no such key of a recipe",
        "problem: optim.learning_rate: Input should be a valid number; got 'fast'",
        "problem: optim.clip must be > 0; got -1",
        "problem: schedule.final_probability must be <= 1; got 2",
    ]
    assert error == "variant: error: digits: has 5 problems, listed above\n"


def test_a_check_compares_recipe_and_images(run):
    words = "--model.num-classes 5 --optim.batch-size 2048 --vae-training.optim.batch-size 1619"
    code, printed, error = run("recipe", "check", "digits", *words.split())
    assert code == 1
    problems = [line for line in printed.splitlines() if line.startswith("problem: ")]
    assert problems == [
        "problem: model.num_classes must be 10, as many as the data has (digits of data.kind "
        '"digits"); got 5',
        "problem: optim.batch_size must be at most the number of training images (1618); got 2048",
        "problem: vae_training.optim.batch_size must be at most the number of training images "
        "(1618); got 1619",
    ]
    assert "3 problems" in error
    words = "--optim.batch-size 100 --optim.steps-per-epoch 17"
    code, printed, _ = run("recipe", "check", "digits", *words.split())
    assert code == 1
    assert (
        "problem: optim.steps_per_epoch must be at most 16, those of a pass over the 1618 training "
        "images; got 17" in printed
    )


def test_a_recipe_must_be_named(run):
    code, _, error = run("recipe", "check")
    assert code == 1
    assert "recipe check: needs the name of a packaged recipe (digits, " in error
    assert "no such recipe" in run("recipe", "show", "nonesuch")[2]


def test_the_resume_command_keeps_the_overrides():
    words = ["train", "--recipe", "digits", "--schedule.depths", "4", "2", "--model.weights=my x"]
    command = parse(words)
    assert isinstance(command, Train)
    text = resume_command("train", command)
    assert text == (
        "variant train --recipe digits --out runs/digits --schedule.depths '4 2' "
        "--model.weights 'my x' --resume"
    )


def test_a_wrong_override_stops_a_training_in_one_line(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = run("train", "--recipe", "digits", "--optim.lerning-rate", "1")
    assert code == 1
    assert "--optim.lerning-rate: no such key of a recipe; perhaps you meant --optim.l" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_recipe_is_valid_toml_on_every_standard_output(tmp_path, monkeypatch):
    values = recipe_values("digits") | {"name": "é数\U0001f600", "description": "naïve"}
    path = tmp_path / "r.toml"
    path.write_text(recipe_toml(parse_recipe(values, "r")), "utf-8")
    for encoding in ("ascii", "latin-1", "utf-8"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding, errors="backslashreplace")
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["recipe", "show", str(path)]) == 0
        stream.flush()
        shown = tomllib.loads(stream.buffer.getvalue().decode(encoding))
        assert (shown["name"], shown["description"]) == ("é数\U0001f600", "naïve")
