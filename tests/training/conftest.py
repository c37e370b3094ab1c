"""Fixtures of the training tests: a small data set, and a recipe that trains on it in seconds."""

import pytest
from PIL import Image
from tiny_runs import OPTIM

from variant.data.config import DataSection
from variant.models.config import VQVAEConfig
from variant.training.recipe import EvalSection, ModelSection, Recipe, VAETraining
from variant.training.schedule import ScheduleSection


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of training and held-out images: 12 and 3 small ones in each of two classes."""
    root = tmp_path_factory.mktemp("images")
    for part in ("train", "held_out"):
        for label in range(2):
            (root / part / f"class{label}").mkdir(parents=True)
            for index in range(12 if part == "train" else 3):
                shade = (200 * label, 20 * index, 100)
                image = Image.new("RGB", (12 + index, 10), shade)
                image.save(root / part / f"class{label}" / f"{index}.png")
    return root


@pytest.fixture
def recipe(folders):
    return Recipe(
        name="tiny",
        description="two classes of flat colours",
        model=ModelSection(depth=3, embed_dim=32, num_heads=2, num_classes=2),
        vae=VQVAEConfig(
            vocab_size=8,
            z_channels=4,
            ch=32,
            ch_mult=(1, 1),
            num_res_blocks=1,
            patch_nums=(1, 2, 4),
        ),
        vae_training=VAETraining(epochs=2, optim=OPTIM, revive_every=2, scale_dropout=0.5),
        data=DataSection(
            kind="folder",
            train=str(folders / "train"),
            held_out=str(folders / "held_out"),
            hflip=0.5,
            randaugment_ops=2,
            randaugment_magnitude=9,
            mixup=0.2,
            workers=2,
        ),
        optim=OPTIM,
        schedule=ScheduleSection(depths=(2,), bridge=1, joint=1, transition=2, refinement=1),
        eval=EvalSection(batch_size=4),
    )
