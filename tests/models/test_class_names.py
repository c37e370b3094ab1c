"""Class names: in the config, in files, and as labels of a generation."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import small_model

from variant import VARiant
from variant.checkpoints.original_var import save_original
from variant.cli.main import main
from variant.models.class_names import MAX_LENGTH, labels_of_words, listed
from variant.models.config import VARConfig

NAMES = ("circle", "square", "a, b", "7", "über uns")


@pytest.fixture(scope="module")
def model():
    return small_model(class_names=NAMES)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (("a", "b"), ValueError, r"class_names must be as many as num_classes \(5\); got 2"),
        (tuple("aabcd"), ValueError, "class_names must differ; got 'a' twice"),
        (("", *"abcd"), ValueError, "class_names must have 1 to 255 characters"),
        (("x" * (MAX_LENGTH + 1), *"abcd"), ValueError, "class_names must have 1 to 255"),
        (("\udcff", *"abcd"), ValueError, "class_names must have 1 to 255 characters of UTF-8"),
        (("e\nf", *"abcd"), ValueError, "class_names must .* control character; got 'e.nf'"),
        (("\x1b[2J", *"abcd"), ValueError, "class_names must .* control character; got '.x1b"),
        ((1, *"abcd"), TypeError, "class_names must be a list of texts"),
        ("abcde", TypeError, "class_names must be a list of texts; got 'abcde'"),
        (None, TypeError, "class_names must be a list of texts; got None"),
    ],
)
def test_unsuitable_names_are_refused(names, error, message):
    with pytest.raises(error, match=f"^VARConfig: {message}"):
        small_model(class_names=names)


def test_names_are_kept_in_the_config_file_and_in_the_card(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["var"]["class_names"] == list(NAMES)
    assert VARiant.from_pretrained(tmp_path).var.config == model.var.config
    assert "Classes: circle, square, a, b, 7, über uns." in (tmp_path / "README.md").read_text()


def test_configs_of_older_versions_load_and_their_names_count(tmp_path):
    small_model().save_pretrained(tmp_path, {"classes": list(NAMES)})
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["var"]["class_names"]  # which older versions do not write
    path.write_text(json.dumps(config))
    assert VARiant.from_pretrained(tmp_path).var.config.class_names == NAMES
    for classes in (["a", "b"], list("aabcd"), [1, 2, 3, 4, 5], "abcde", None):
        path.write_text(json.dumps(config | {"classes": classes}))
        assert VARiant.from_pretrained(tmp_path).var.config.class_names == ()
    del config["classes"]
    path.write_text(json.dumps(config))
    assert VARiant.from_pretrained(tmp_path).var.config.class_names == ()


def test_a_generation_takes_names_and_numbers(model):
    by_name = model.generate(["square", 3, "über uns"], seed=0)
    assert by_name.labels.tolist() == [1, 3, 4]
    assert torch.equal(by_name.tokens, model.generate([1, 3, 4], seed=0).tokens)
    assert model.generate("a, b", seed=0).labels.tolist() == [2]
    # Text is a name, also where it is a number.
    assert model.generate(("7",), seed=0).labels.tolist() == [3]


def test_names_and_numbers_in_an_array_of_numpy(model):
    expected = model.generate(["circle", 2, "über uns"], seed=0).tokens
    for labels in (
        np.array(["circle", "a, b", "über uns"]),
        np.array(["circle", 2, np.int64(4)], object),
        odd_array(["circle", 2, 4]),
    ):
        assert torch.equal(model.generate(labels, seed=0).tokens, expected)
    assert len(model.generate(np.array("circle"), seed=0).tokens) == 1


def odd_array(items):
    """An array that is a view, read-only and reversed in memory."""
    array = np.array(items[::-1], object)[::-1]
    array.setflags(write=False)
    return array


def test_unknown_names_list_the_known_ones(model):
    with pytest.raises(
        ValueError, match=r"^generate: labels must be names of classes; got 'oval'. Known: circle, "
    ):
        model.generate(["circle", "oval"])
    with pytest.raises(TypeError, match="labels must be integers, as this model has no class"):
        small_model().generate(["circle"])


@pytest.mark.parametrize(
    ("words", "labels"),
    [
        (["circle"], [0]),
        (["3,circle"], [3, 0]),
        (["3", "circle", "-1"], [3, 0, -1]),
        (["a, b"], [2]),
        (["square,circle , 4"], [1, 0, 4]),
        ([], []),
    ],
)
def test_words_of_the_command_line_are_names_or_numbers(words, labels):
    assert labels_of_words("generate", "--labels", words, NAMES) == labels


def test_a_number_is_a_label_and_a_class_of_that_name_is_warned_about():
    names = ("0", "1", "10", "11", "2", "3")  # folders in the order of their names
    with pytest.warns(RuntimeWarning) as heard:
        labels = labels_of_words("generate", "--labels", ["2,1", "2", "3", "10"], names)
    assert labels == [2, 1, 2, 3, 10]
    assert [str(warning.message) for warning in heard] == [
        "generate: --labels 2 is class number 2 (named '10'); the class that is named 2 has "
        "number 4",
        "generate: --labels 3 is class number 3 (named '11'); the class that is named 3 has "
        "number 5",
        "generate: --labels 10 is class number 10; the class that is named 10 has number 2",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert labels_of_words("generate", "--labels", ["1", "0", "5"], names) == [1, 0, 5]


@pytest.mark.parametrize("words", [[","], [" , ,"], [" "], [",", ","]])
def test_words_without_a_class_do_not_mean_every_class(words):
    for names in (NAMES, ()):
        with pytest.raises(ValueError, match=r"^generate: --labels must name a class; got '"):
            labels_of_words("generate", "--labels", words, names)


def test_a_long_list_of_names_is_cut():
    assert listed([str(i) for i in range(1000)]).endswith("8, 9 and 990 more")
    assert "\n" not in listed(["a\nb"])


def test_the_command_line_generates_by_name(model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    words = ["generate", "--model", str(tmp_path / "model"), "--labels"]
    assert main([*words, "3,circle", "--out", str(tmp_path / "named")]) == 0
    assert main([*words, "3", "0", "--out", str(tmp_path / "numbered")]) == 0
    for name in ("00000_class3.png", "00001_class0.png"):
        named, numbered = (Image.open(tmp_path / f / name) for f in ("named", "numbered"))
        assert named.tobytes() == numbered.tobytes()
    assert named.text["class"] == "circle"
    assert main([*words, "oval", "--out", str(tmp_path / "x")]) == 1
    errors = capsys.readouterr().err
    assert "--labels must be names of classes; got 'oval'. Known: circle, square" in errors
    assert not (tmp_path / "x").exists()
    assert main(["info", "--model", str(tmp_path / "model")]) == 0
    assert "classes circle, square, a, b, 7, über uns" in capsys.readouterr().out


def test_the_names_do_not_change_the_files_of_the_original_code(model, tmp_path):
    for name, one in (("named", model), ("plain", small_model())):
        save_original(one.var, one.vae, tmp_path / f"{name}.pth", tmp_path / f"{name}-vae.pth")
    named, plain = (torch.load(tmp_path / f"{n}.pth") for n in ("named", "plain"))
    assert named.keys() == plain.keys()


def test_a_config_without_names_is_equal_to_an_older_one():
    assert VARConfig(4, 32, 2, 5, (1, 2, 3), 24, 8).class_names == ()
