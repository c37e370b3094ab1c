"""A model folder of a run: the supernet that the package ships is one of the study's.

    python -m benchmarks.study export --out FOLDER --run NAME --seed 0 --to MODEL_FOLDER

Whatever the study measured of the run is true of the folder: the weights are the same, in float32.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from benchmarks.study.settings import Study
from benchmarks.study.stages.files import is_done, run_folder, vae_file
from benchmarks.study.stages.measuring import is_measured, load_models
from benchmarks.study.stages.shared import images_of, vae_identity
from variant.checkpoints.model_folder import build, save_model
from variant.errors import UserError
from variant.models.var import VAR


def export(study: Study, out: Path, name: str, seed: int, folder: Path) -> None:
    """Write the VAR and the VQ-VAE of a run as a model folder, with the names of the classes.

    Args:
        out: folder of the runs.
        name, seed: a run that trains and is complete.
    Raises:
        UserError: there is no such run, or it is not complete.
    """
    run = study.find(name, seed)
    vae_done = is_done(vae_file(out).with_name("vae.json"), vae_identity(study))
    if not (run.trains and vae_done and is_measured(study, out, run)):
        raise UserError(f"study: {name} of seed {seed} is not complete in {out}, or trains nothing")
    var, vae = load_models(study, out, run)
    config = dataclasses.replace(var.config, class_names=tuple(images_of(study).classes))
    named = build(VAR, config, var.state_dict(), str(folder))
    losses = json.loads((run_folder(out, run) / "losses.json").read_text())["losses"]
    trained = json.loads((run_folder(out, run) / "train.json").read_text())
    training = {
        "recipe": "fashion-mnist of benchmarks/study",
        "run": run.name,
        "seed": run.seed,
        "settings": run.overrides(),
        "steps": trained["steps"],
        "held_out_loss": {key.removeprefix("d"): row["mean"] for key, row in losses.items()},
    }
    save_model(folder, named, vae, extra={"training": training})
