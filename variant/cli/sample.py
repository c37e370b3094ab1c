"""``variant sample``: many images for an evaluation."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from variant.bench.environment import commit_of_package
from variant.cli.dtypes import DTYPES
from variant.cli.generate import check_schedule_alone, configs_of, fingerprint
from variant.cli.options import Sample
from variant.cli.output import (
    check_apart,
    check_file,
    check_folder,
    check_json,
    check_named,
    checked_path,
    console,
    has_ending,
    write_json,
)
from variant.cli.progress import Advance, progress
from variant.cli.schedule import schedule_of
from variant.engine.engine import Engine, kernels_of
from variant.engine.generation import Sampling
from variant.errors import UserError
from variant.evaluation.sampler import (
    CONFIGS,
    KERNELS,
    SampleFiles,
    is_own_name,
    record_of_npz,
    sample,
)
from variant.models.class_names import labels_of_words
from variant.models.config import VARConfig
from variant.models.placement import check_device
from variant.supernet import VARiant
from variant.training.tokenize import gpu_of_environment, rank_of_environment
from variant_kernels import DepthSchedule, __version__
from variant_kernels.arguments import choice, integer
from variant_kernels.dispatch.support import BACKENDS
from variant_kernels.wording import counted

FORMAT = "variant-sampled-1"
MAX_NUM = 10**8
MAX_BATCH = 4096
# The protocol of the papers: 50 images of each class.
PER_CLASS = 50


def sample_command(command: Sample) -> None:
    """Write the images of this process, and print how many are there."""
    if command.num is not None:
        integer("sample", "--num", command.num, 1, MAX_NUM)
    integer("sample", "--batch", command.batch, 1, MAX_BATCH)
    check_device("sample", command.device, name="--device", computes=True)
    choice("sample", "--backend", command.backend, ("auto", *BACKENDS))
    check_schedule_alone("sample", command)
    form = _form(command)
    files = {"--json": command.json}
    if form == "npz":
        files = {"--out": command.out, "the .json beside --out": record_of_npz(command.out)} | files
        check_apart("sample", files)
    else:
        check_apart("sample", files, command.out, is_own_name)
    check_json("sample", command.json)
    rank, world_size = rank_of_environment(os.environ)
    device = command.device
    if device == "cuda" and world_size > 1:
        device = f"cuda:{gpu_of_environment(os.environ, torch.cuda.device_count())}"
    model = VARiant.from_pretrained(command.model, device=device)
    config = model.var.config
    words = [str(label) for label in command.labels]
    labels = labels_of_words("sample", "--labels", words, config.class_names)
    note = f"(-1 or {config.num_classes}: no class)"
    for label in labels:
        integer("sample", "--labels", label, -1, config.num_classes, note)
    # One null class has one name in files and in the record, and is no class to an evaluation.
    labels = [-1 if label == config.num_classes else label for label in labels]
    labels = labels or list(range(config.num_classes))
    num = PER_CLASS * len(labels) if command.num is None else command.num
    engine = Engine(
        model.var,
        model.vae,
        dtype=DTYPES[command.dtype] if command.dtype else None,
        backend=command.backend,
    )
    sampling = Sampling(
        command.cfg, min(command.top_k, config.vocab_size), command.top_p, command.seed
    )
    files = SampleFiles(command.out, form, num, labels, command.batch)
    settings = settings_of(command, engine, files, sampling)
    done = 0
    with ExitStack() as stack:
        advance: Advance | None = None

        def report(images: int, total: int) -> None:
            nonlocal advance, done
            if advance is None:
                advance = stack.enter_context(progress("sample", "sampling", total, command.json))
            done += images
            advance(images, f"{counted(done, 'image')} of this process")

        try:
            missing = sample(
                engine,
                sampling,
                files,
                settings,
                depth=depth_of(command, config),
                bridge=command.bridge,
                kv_dtype=command.kv_dtype,
                rank=rank,
                world_size=world_size,
                report=report,
            )
        except KeyboardInterrupt as stop:
            message = f"{counted(done, 'image')} of this process so far; the same command continues"
            raise type(stop)(message) from None
    out = console(command.json, command="sample")
    per_class = num / len(labels)
    out.print(f"{counted(num, 'image')}, {per_class:g} per class, in {command.out}")
    if missing:
        out.print(f"missing: {counted(missing, 'part')} of other processes")
    write_json(command.json, {"format": FORMAT, **settings, "missing_parts": missing})


def _form(command: Sample) -> Any:
    """png, webdataset or npz; fails before the work if the result cannot be written.

    Raises:
        UserError: it cannot.
    """
    out = Path(command.out)
    with checked_path(out):
        check_named("sample", out, ".npz")
        if out.suffix == ".npz":
            if command.format != "png":
                raise UserError("sample: --format is for folders; --out names an .npz")
            check_file(out)
            return "npz"
        if not out.is_dir() and has_ending(out):
            raise UserError(f"{out}: --out must be a folder or end in .npz; got {out.suffix}")
        check_folder(out)
        return command.format


def depth_of(command: Sample, config: VARConfig) -> int | DepthSchedule | None:
    """What --schedule or --depth ask for.  Raises: UserError, for an unsuitable schedule."""
    if command.schedule is None:
        return command.depth
    return schedule_of("sample", "--schedule", command.schedule, config)


def settings_of(
    command: Sample, engine: Engine, files: SampleFiles, sampling: Sampling
) -> dict[str, Any]:
    """All that the images depend on, as plain values."""
    config = engine.var.config
    schedule = engine.var.schedule(depth_of(command, config), command.bridge)
    by_scale = command.schedule is not None
    depth = config.depth if command.depth is None else command.depth
    bridge = config.bridge if command.bridge is None else command.bridge
    return {
        "model": command.model,
        "weights": fingerprint(engine),
        "num": files.num,
        "classes": list(files.classes),
        "depth": schedule.name if by_scale else depth,
        "bridge": None if by_scale else bridge,
        "schedule": [list(layers) for layers in schedule.layers],
        "cfg": command.cfg,
        "top_k": sampling.top_k,
        "top_p": command.top_p,
        "seed": command.seed,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "kv_dtype": command.kv_dtype,
        "device": engine.device.type,
        "backend": command.backend,
        CONFIGS: configs_of(engine),
        KERNELS: kernels_of(engine, command.kv_dtype),
        "files": files.form,
        "batch": command.batch,
        "software": f"variant {__version__}, torch {torch.__version__}",
        **commit_of_package(),
    }
