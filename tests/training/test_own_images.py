"""A stranger's folder of images, with the commands of docs/training.md and small sizes."""

import functools
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from variant.cli import evaluate
from variant.cli.main import main

ROOT = Path(__file__).parents[2]
SHAPES = ("circle", "cross", "line", "square", "triangle")
# Overrides of the recipe: seconds in place of hours.
SMALL = [
    "--model.num-classes",
    "5",
    "--model.depth",
    "3",
    "--model.embed-dim",
    "32",
    "--model.num-heads",
    "2",
    "--vae.patch-nums",
    "1",
    "2",
    "4",
    "--vae.vocab-size",
    "32",
    "--vae.z-channels",
    "8",
    "--vae.ch-mult",
    "1",
    "1",
    "--vae-training.epochs",
    "1",
    "--schedule.depths",
    "2",
    "--schedule.bridge",
    "1",
    "--data.mixup",
    "0.2",
    "--schedule.joint",
    "1",
    "--schedule.transition",
    "1",
    "--schedule.refinement",
    "0",
    "--eval.limit",
    "20",
    # Each imports torch, which takes longer than its work; one command has a worker.
    "--data.workers",
    "0",
]


def draw(shape, rng):
    """A shape of random size and colour on a random grey."""
    image = Image.new("RGB", (24, 20), (int(rng.integers(100)),) * 3)
    pen, size = ImageDraw.Draw(image), int(rng.integers(5, 9))
    x, y = (int(v) for v in rng.integers(9, 11, 2))
    box, colour = (
        (x - size, y - size, x + size, y + size),
        tuple(map(int, rng.integers(128, 256, 3))),
    )
    match shape:
        case "circle":
            pen.ellipse(box, colour)
        case "square":
            pen.rectangle(box, colour)
        case "triangle":
            pen.polygon([(x, y - size), (x - size, y + size), (x + size, y + size)], colour)
        case "cross":
            pen.line((x - size, y, x + size, y), colour, 3)
            pen.line((x, y - size, x, y + size), colour, 3)
        case "line":
            pen.line(box, colour, 3)
    return image


@pytest.fixture
def images(tmp_path, monkeypatch):
    """600 images in five classes: 500 in images/train, 100 in images/held_out; one is damaged."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for part, count in (("train", 100), ("held_out", 20)):
        for shape in SHAPES:
            folder = Path("images", part, shape)
            folder.mkdir(parents=True)
            for number in range(count):
                draw(shape, rng).save(folder / f"{number:03d}.png")
    Path("images/train/.cache").mkdir()
    Path("images/train/cross/007.png").write_bytes(b"damaged")


def documented(start):
    """The words of the first documented command that begins so, on the recipe of here."""
    texts = [(ROOT / "docs" / f"{name}.md").read_text() for name in ("training", "vqvae")]
    blocks = re.findall(r"^```bash\n(.*?)^```$", "\n".join(texts), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    line = next(line for line in lines if re.match(start, line))
    return shlex.split(line.replace("examples/my_images.toml", "mine.toml"), comments=True)[1:]


def test_a_folder_of_six_hundred_images_from_the_documentation_alone(images, capsys, monkeypatch):
    small = [*SMALL, "--data.max-bad", "0.01"]
    recipe = "--recipe examples/my_images.toml"
    assert main(documented("variant recipe new --data images")) == 0
    assert main([*documented("variant recipe check examples"), *small]) == 0
    # `variant eval` reads the sizes from the recipe, so they are written into it.
    assert main(["recipe", "show", "mine.toml", *small]) == 0
    printed = capsys.readouterr().out
    Path("mine.toml").write_text(printed[printed.rindex("name = ") :])
    with_worker = [*small[:-3], "1", *small[-2:]]
    assert with_worker[with_worker.index("--data.workers") + 1] == "1"
    assert main([*documented(f"variant train-vae {recipe}"), *with_worker]) == 0
    # Its classifier trains for a few steps.
    short = functools.partial(evaluate.train_classifier, steps=5)
    monkeypatch.setattr(evaluate, "train_classifier", lambda *args, **rest: short(*args, **rest))
    assert main([*documented("variant eval --reconstruct runs/mine"), "--json", "kept.json"]) == 0
    kept = {m["name"]: m["value"] for m in json.loads(Path("kept.json").read_text())["metrics"]}
    assert kept["PSNR, scales to 4x4"] == pytest.approx(kept["PSNR"])
    assert kept["PSNR"] > 5
    assert "rmine-FD" in kept
    words = documented(f"variant tokenize {recipe}")
    words[words.index("--passes") + 1] = "2"
    assert main([*words, *small]) == 0
    assert main([*words, *small]) == 0  # nothing is left to do
    printed = capsys.readouterr().out
    assert "wrote 1,200 samples in 4 shards to runs/mine/tokens" in printed
    assert "wrote 0 samples in 0 shards to runs/mine/tokens (0 images/s); 1,200 were" in printed
    train = documented(f"variant train {recipe} .*--data.kind tokens")
    assert main([*train, *small]) == 0
    # A longer run continues with the same tokens.
    more = list(small)
    more[more.index("--schedule.refinement") + 1] = "1"
    assert main([*train, *more, "--resume"]) == 0
    assert main(documented("variant generate --model runs/mine --all-depths")) == 0
    words = documented("variant sample --model runs/mine")
    words[words.index("--num") + 1] = "70"
    assert main(words) == 0
    assert main([*documented("variant eval --images out/mine"), "--json", "made.json"]) == 0
    made = {m["name"]: m for m in json.loads(Path("made.json").read_text())["metrics"]}
    assert made["mine-FD"]["count"] == 70
    words = ["--labels", "circle,triangle", "--count", "3", "--out", "out/shapes"]
    assert main(["generate", "--model", "runs/mine", *words]) == 0
    names = sorted(path.name for path in Path("out/shapes").glob("*.png"))
    assert [name[6:] for name in names] == ["class0.png"] * 3 + ["class4.png"] * 3
    assert Image.open("out/mine.png").size[0] > 100
    card = Path("runs/mine/README.md").read_text()
    assert "Classes: circle, cross, line, square, triangle." in card
