"""``variant recipe new``: a recipe for a folder of images."""

import gzip
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from variant.errors import UserError
from variant.training.new_recipe import SIZES, Parts, find_parts, new_recipe, split
from variant.training.recipe import load_recipe
from variant.training.recipe_reference import recipe_toml

CLASSES = ["circle", "cross", "square"]


def draw(folder, count, side=40):
    rng = np.random.default_rng(count)
    folder.mkdir(parents=True)
    for index in range(count):
        pixels = rng.integers(0, 256, (side, side + 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02}.png")


@pytest.fixture
def images(tmp_path):
    """A folder of three classes of 20 images each."""
    for name in CLASSES:
        draw(tmp_path / "images" / name, 20)
    return tmp_path / "images"


def parts_of(count, classes=3, side=64):
    names = [f"class{i}" for i in range(classes)]
    return Parts("images/train", "images/held_out", count, max(1, count // 10), names, side)


def test_a_folder_of_classes_is_split_and_gets_a_recipe_that_is_whole(images, tmp_path, run):
    out, parted = tmp_path / "my.toml", tmp_path / "parted"
    code, printed, error = run(
        "recipe", "new", "--data", images, "--split", parted, "--out", out,
        "--optim.learning-rate", "3e-4",
    )  # fmt: skip
    assert code == 0, error
    assert f"wrote {out}; next: variant train-vae --recipe {out} --out runs/my" in printed
    recipe = load_recipe(out)
    assert (recipe.name, recipe.model.num_classes) == ("my", 3)
    assert recipe.optim.learning_rate == 3e-4
    assert recipe.vae.image_size == 32
    code, printed, _ = run("recipe", "check", out)
    assert code == 0
    assert "images       54 for training, 6 held out, 3 classes" in printed
    assert out.read_text().startswith(
        "# Written by `variant recipe new` for 54 training and 6 held-out images in 3 classes.\n"
    )


def test_a_folder_that_is_not_split_says_how(images, tmp_path, run):
    code, _, error = run("recipe", "new", "--data", images, "--out", tmp_path / "my.toml")
    assert code == 1
    assert "has no sub-folders train and held_out; give --split NEW_FOLDER" in error
    assert not (tmp_path / "my.toml").exists()


def test_a_split_has_every_image_once_and_a_tenth_of_each_class_held_out(images, tmp_path):
    split(images, tmp_path / "parted")
    for name in CLASSES:
        files = {
            part: sorted((tmp_path / "parted" / part / name).iterdir())
            for part in ("train", "held_out")
        }
        assert [path.name for path in files["held_out"]] == ["09.png", "19.png"]
        names = sorted(path.name for paths in files.values() for path in paths)
        assert names == [f"{index:02}.png" for index in range(20)]
        for paths in files.values():
            assert all(path.resolve() == images.resolve() / name / path.name for path in paths)


def test_a_class_of_few_images_holds_out_one(tmp_path):
    draw(tmp_path / "images" / "few", 3)
    split(tmp_path / "images", tmp_path / "parted")
    parts = find_parts(tmp_path / "parted")
    assert (parts.num_train, parts.num_held_out) == (2, 1)


def test_a_class_may_have_the_name_of_a_part(images, tmp_path, run):
    for before, after in zip(CLASSES, ("train", "test", "bus"), strict=True):
        (images / before).rename(images / after)
    code, _, error = run("recipe", "new", "--data", images, "--out", tmp_path / "my.toml")
    assert code == 1
    assert "has no sub-folders train and held_out; give --split NEW_FOLDER" in error
    split(images, tmp_path / "parted")
    parts = find_parts(tmp_path / "parted")
    assert (parts.num_train, parts.classes) == (54, ["bus", "test", "train"])
    # Parts without classes are no classes.
    shutil.rmtree(images / "bus")
    with pytest.raises(UserError, match="train: must hold one sub-folder of images per class"):
        split(images, tmp_path / "other")


@pytest.mark.parametrize("names", [("train", "val"), ("training", "test"), ("Train", "Held_Out")])
def test_common_names_of_the_parts_are_found(images, tmp_path, names):
    split(images, tmp_path / "parted")
    for before, after in zip(("train", "held_out"), names, strict=True):
        (tmp_path / "parted" / before).rename(tmp_path / "parted" / after)
    parts = find_parts(tmp_path / "parted")
    assert (parts.train.name, parts.held_out.name) == names
    assert (parts.num_train, parts.classes, parts.side) == (54, CLASSES, 40)


def error_line(error):
    """The one line of an error, without the first line, which says what is read."""
    *first, line = error.splitlines()
    assert [text.partition(" ")[0] for text in first] in ([], ["recipe:"])
    assert line.startswith("variant: error: ")
    return line


def test_problems_of_the_folder_are_one_line(images, tmp_path, run):
    def error_of(*words):
        code, _, error = run("recipe", "new", *words)
        assert code == 1
        return error_line(error)

    assert "needs --data FOLDER" in error_of()
    assert "no such folder of images" in error_of("--data", tmp_path / "none")
    assert "must be a new or an empty folder" in error_of("--data", images, "--split", images)
    single = tmp_path / "single"
    draw(single / "one", 1)
    assert "needs two images" in error_of("--data", single, "--split", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    split(images, tmp_path / "parted")
    shutil.rmtree(tmp_path / "parted" / "held_out" / "cross")
    assert "only in one of them: cross" in error_of("--data", tmp_path / "parted")
    (tmp_path / "there.toml").touch()
    assert "exists; choose another" in error_of("--data", images, "--out", tmp_path / "there.toml")
    assert "takes no name" in error_of("digits", "--data", images)


def write_idx(folder, side=28, ending=""):
    """Four files of MNIST's names: 40 and 20 images of two classes."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k", 20)):
        images = rng.integers(0, 256, (count, side, side), dtype=np.uint8)
        labels = (np.arange(count) % 2).astype(np.uint8)
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, values.ndim])
            header += b"".join(size.to_bytes(4, "big") for size in values.shape)
            data = header + values.tobytes()
            path = folder / f"{part}-{kind}-ubyte{ending}"
            path.write_bytes(gzip.compress(data) if ending else data)
    return folder


@pytest.mark.parametrize(("side", "size", "ending"), [(28, 32, ".gz"), (33, 64, "")])
def test_a_folder_of_idx_files_gets_a_recipe_that_is_whole(tmp_path, run, side, size, ending):
    data, out = write_idx(tmp_path / "mnist", side, ending), tmp_path / "my.toml"
    code, printed, error = run("recipe", "new", "--data", data, "--out", out)
    assert code == 0, error
    assert "images       40 for training, 20 held out, 2 classes" in printed
    recipe = load_recipe(out)
    assert (recipe.data.kind, recipe.data.hflip) == ("idx", 0.0)
    assert recipe.data.train == str(data / f"train-images-idx3-ubyte{ending}")
    assert recipe.data.held_out_labels == str(data / f"t10k-labels-idx1-ubyte{ending}")
    assert (recipe.vae.image_size, recipe.vae.in_channels) == (size, 1)
    assert run("recipe", "check", out)[0] == 0


def test_problems_of_idx_files_are_one_line(tmp_path, run):
    def error_of(*words):
        code, _, error = run("recipe", "new", *words)
        assert code == 1
        return error_line(error)

    data = write_idx(tmp_path / "mnist")
    assert "leave out --split" in error_of("--data", data, "--split", tmp_path / "parted")
    (data / "t10k-labels-idx1-ubyte").unlink()
    assert "but not t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte.gz" in error_of("--data", data)
    large = write_idx(tmp_path / "large", 129)
    assert "at most as large as the model's, 128 x 128" in error_of("--data", large)


def test_options_of_new_are_not_for_the_others(run):
    code, _, error = run("recipe", "check", "digits", "--data", "images")
    assert code == 1
    assert "recipe check: --data is for `variant recipe new`" in error


@pytest.mark.parametrize("count", [1, 5, 60, 600, 6_000, 60_000, 1_300_000])
@pytest.mark.parametrize("side", [28, 100, 400])
def test_sizes_for_any_number_of_images_are_a_valid_recipe(count, side, tmp_path):
    parts = parts_of(count, side=side)
    recipe = new_recipe("mine", parts)
    assert recipe.optim.batch_size <= count
    assert recipe.vae_training.optim.batch_size <= count
    steps = recipe.schedule.phase_lengths.total * (count // recipe.optim.batch_size)
    assert steps <= 1.3 * SIZES[-1].steps
    assert recipe.model.depth > max(recipe.schedule.depths)
    path = tmp_path / "mine.toml"
    path.write_text(recipe_toml(recipe, every_key=False))
    assert load_recipe(path) == recipe


def test_more_images_never_get_a_smaller_network():
    recipes = [new_recipe("mine", parts_of(count)) for count in (100, 3_000, 50_000, 10**6)]
    sizes = [(r.model.depth, r.model.embed_dim, r.optim.batch_size) for r in recipes]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 4


def test_a_base_gives_its_sizes():
    base = load_recipe("imagenet-var-d16")
    recipe = new_recipe("mine", parts_of(100_000, classes=1000), "imagenet-var-d16")
    assert (recipe.model, recipe.vae, recipe.schedule) == (base.model, base.vae, base.schedule)
    assert recipe.data.randaugment_ops == 2
    assert recipe.data.train == "images/train"
    assert recipe.optim == base.optim


def test_with_other_classes_the_transformer_of_the_base_starts_at_random():
    recipe = new_recipe("mine", parts_of(400, classes=7), "imagenet-var-d16")
    assert recipe.model.weights is None
    assert recipe.model.num_classes == 7
    assert recipe.vae_training.weights == "vae_ch160v4096z32.pth"
    assert (recipe.optim.batch_size, recipe.optim.accumulate) == (100, 1)
    assert new_recipe("mine", parts_of(400), "digits").data.kind == "folder"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--base", "nothing"), "nothing: no such recipe"),
        (("--optim.nothing", 1), "--optim.nothing: no such key of a recipe"),
        (("--optim.batch-size", 0), "optim.batch_size must be >= 1; got 0"),
    ],
)
@pytest.mark.parametrize("exists", [False, True])
def test_a_refused_recipe_leaves_no_links(words, message, exists, images, tmp_path, run):
    if exists:
        (tmp_path / "parted").mkdir()
    options = ("--data", images, "--split", tmp_path / "parted", "--out", tmp_path / "my.toml")
    code, _, error = run("recipe", "new", *options, *words)
    assert code == 1
    assert message in error
    assert not any((tmp_path / "parted").rglob("*"))
    assert not (tmp_path / "my.toml").exists()


def test_links_are_not_made_within_the_classes(images, tmp_path, run):
    before = sorted(images.iterdir())
    for out in (images, images / "parted", images / "circle" / "x", images / ".." / "images" / "y"):
        code, _, error = run("recipe", "new", "--data", images, "--split", out)
        assert code == 1
        assert "must" in error
    assert sorted(images.iterdir()) == before
    train = tmp_path / "all" / "train"
    train.parent.mkdir()
    images.rename(train)
    assert run("recipe", "new", "--data", train.parent, "--split", train.parent / "p")[0] == 0


def test_a_split_that_fails_half_way_leaves_nothing(images, tmp_path, monkeypatch):
    made = []

    def link(source, target):
        if len(made) == 30:
            raise OSError(28, "No space left on device")
        made.append(target)

    monkeypatch.setattr("variant.training.new_recipe.os.symlink", link)
    with pytest.raises(UserError, match="parted: cannot be written: No space left"):
        split(images, tmp_path / "parted")
    assert not any((tmp_path / "parted").iterdir())


def test_a_path_that_cannot_be_written_into_a_recipe_is_refused(images, tmp_path):
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    split(images, odd)
    with pytest.raises(UserError, match=r"/\\udcff: the path must be text in UTF-8"):
        find_parts(odd)
    (tmp_path / "plain").symlink_to(odd)
    assert recipe_toml(new_recipe("a", find_parts(tmp_path / "plain")))


def test_a_recipe_of_thousands_of_unknown_keys_lists_the_first(images, tmp_path, run):
    path = tmp_path / "my.toml"
    path.write_text("\n".join(f"k{index} = 1" for index in range(5000)))
    code, printed, error = run("recipe", "check", path)
    assert code == 1
    assert printed.count("problem: ") == 100
    assert "problems, listed above as far as the first 100" in error


def test_a_schedule_of_a_recipe_that_is_no_file_is_named_with_its_key(images, tmp_path, run):
    path = tmp_path / "my.toml"
    path.write_text('[schedule]\nschedules = ["nowhere.json"]\n')
    code, _, error = run("recipe", "check", path)
    assert code == 1
    assert error.endswith(f"{path}: schedule.schedules: nowhere.json: no such file\n")


def test_a_new_recipe_is_toml_whatever_the_name_of_its_file(images, tmp_path, run, monkeypatch):
    split(images, tmp_path / "parted")
    monkeypatch.chdir(tmp_path)
    for name in ("a\nb.toml", "a\rb\x1b.toml"):
        assert run("recipe", "new", "--data", "parted", "--out", name)[0] == 0
        assert load_recipe(name).model.num_classes == 3


def test_a_new_recipe_has_no_packaged_name(images, tmp_path, run, monkeypatch):
    split(images, tmp_path / "parted")
    monkeypatch.chdir(tmp_path)
    code, _, error = run("recipe", "new", "--data", "parted", "--out", "digits")
    assert code == 1
    assert "digits is the name of a packaged recipe, which is taken in place of a file" in error
    assert not Path("digits").exists()


def test_what_would_stop_the_run_of_a_base_is_told(images, tmp_path, run):
    split(images, tmp_path / "parted")
    with pytest.warns(RuntimeWarning, match="change before training: .*start_step must be below"):
        code, printed, _ = run(
            "recipe", "new", "--data", tmp_path / "parted", "--base", "imagenet-vqvae"
        )
    assert code == 0
    assert "[vae_training.adversary]" in printed
