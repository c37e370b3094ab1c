"""``variant generate``: labels in, PNG files and a table out."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from variant.cli.dtypes import DTYPES
from variant.cli.image_folder import ImageFolder, is_own_name, save_png
from variant.cli.options import Generate, Sample
from variant.cli.output import (
    check_apart,
    check_file,
    check_folder,
    check_json,
    check_named,
    check_own_folder,
    checked_path,
    console,
    has_ending,
    mebibytes,
    table,
    write_json,
)
from variant.cli.progress import Advance, progress
from variant.cli.schedule import schedule_of
from variant.cli.words import command_line
from variant.engine.engine import Engine, kernels_of
from variant.engine.generation import Generation, OnScale, PartialResult, Sampling, Stats
from variant.engine.grid import grid
from variant.engine.memory import batch_size, free_bytes
from variant.engine.planning import depths_of
from variant.errors import UserError
from variant.evaluation.sampler import CONFIGS, KERNELS, compare_settings
from variant.folder_lock import locked_folder
from variant.models.class_names import labels_of_words
from variant.models.placement import check_device
from variant.supernet import VARiant
from variant_kernels import CachePlan, DepthSchedule, __version__
from variant_kernels.arguments import choice, integer
from variant_kernels.dispatch.support import BACKENDS
from variant_kernels.wording import counted

T = TypeVar("T")

LOCK_NAME = ".variant-generate.lock"
MAX_COUNT = 10**8
# Larger batches are not faster, and an interrupted run loses one of them.
MAX_BATCH = 256
# One picture of all images has to fit into memory.
MAX_GRID_IMAGES = 4096
# Images that one call of the engine gets: their labels and ids are tensors.
IMAGES_PER_CALL = 2**16
# Keys of the configs that no image depends on: those of the training, names, and the layers of
# depths, which a schedule writes out.
NOT_OF_IMAGES = (
    *("subnets", "bridge", "cond_drop_rate", "drop_path_rate", "class_names"),
    "beta",
)
# The least that a file takes on a disk.
BLOCK_BYTES = 4096


def generate(command: Generate) -> None:
    """Generate images, write them, print time per image and K/V bytes, planned and allocated."""
    sampling = _check(command)
    one_file = check_target(command.out)
    if one_file and command.resume:
        raise UserError("generate: --resume needs a folder as --out; a grid is written as a whole")
    model = VARiant.from_pretrained(command.model, device=command.device)
    config = model.var.config
    # Numbers from a caller in Python.
    words = [str(label) for label in command.labels]
    labels = labels_of_words("generate", "--labels", words, config.class_names)
    labels = labels or list(range(min(config.num_classes, 10)))
    for label in labels:
        note = f"(-1 or {config.num_classes}: no class)"
        integer("generate", "--labels", label, -1, config.num_classes, note)
    depths = list(depths_of(config)) if command.all_depths else [command.depth]
    schedule = None
    if command.schedule is not None:
        schedule = schedule_of("generate", "--schedule", command.schedule, config)
    if command.all_depths and config.bridge is None and command.bridge is None:
        raise UserError(f"generate: {command.model} was trained at one depth; --bridge is needed")
    folder = ImageFolder(command.out, labels, command.count, config.num_classes, depths)
    engine = Engine(
        model.var,
        model.vae,
        dtype=DTYPES[command.dtype] if command.dtype else None,
        backend=command.backend,
    )
    work = Work(command, engine, sampling, folder, schedule)
    results = work.grid() if one_file else work.folder()
    # First: the standard output may be closed by now.
    write_json(command.json, _as_json(command, labels if words else [], results))
    _report(command, engine, results, console(command.json))


def _check(command: Generate) -> Sampling:
    """Everything that can be refused without a model.

    Raises:
        UserError, ValueError: an option that cannot be used.
    """
    integer("generate", "--count", command.count, 1, MAX_COUNT)
    check_device("generate", command.device, name="--device", computes=True)
    choice("generate", "--backend", command.backend, ("auto", *BACKENDS))
    if command.max_batch is not None:
        integer("generate", "--max-batch", command.max_batch, 1)
    if command.all_depths and command.depth is not None:
        raise UserError("generate: --all-depths and --depth exclude each other")
    check_schedule_alone("generate", command)
    if command.all_depths and command.schedule is not None:
        raise UserError("generate: --all-depths and --schedule exclude each other")
    if command.resume and command.overwrite:
        raise UserError("generate: --resume and --overwrite exclude each other")
    total = max(len(command.labels), 1) * command.count
    if total > MAX_COUNT:
        raise UserError(f"generate: at most {MAX_COUNT:,} images in one run; got {total:,}")
    check_apart("generate", {"--json": command.json}, command.out, is_own_name)
    check_json("generate", command.json)
    return Sampling(
        command.cfg,
        command.top_k,
        command.top_p,
        command.seed,
        temperature=command.temperature,
        more_smooth=command.more_smooth,
    )


def check_schedule_alone(op: str, command: Generate | Sample) -> None:
    """Raises: UserError, if --depth or --bridge are given beside --schedule."""
    for name in ("depth", "bridge"):
        if command.schedule is not None and getattr(command, name) is not None:
            raise UserError(f"{op}: --schedule and --{name} exclude each other")


def check_target(out: Path) -> bool:
    """Fails before the work if the result cannot be written; creates nothing.

    Returns:
        Whether ``out`` names one PNG file; otherwise it is a folder.
    Raises:
        UserError: ``out`` is neither, or it cannot be written.
    """
    with checked_path(out):
        check_named("generate", out, ".png")
        one_file = out.suffix.lower() == ".png"
        if one_file and out.is_dir():
            raise UserError(f"{out}: is a folder; --out must name a folder without .png, or a file")
        if not one_file and not out.is_dir() and has_ending(out):
            raise UserError(f"{out}: --out must be a folder or end in .png; got {out.suffix}")
        if one_file:
            check_file(out)
        else:
            check_folder(out)
            check_own_folder("generate", out, is_own_name)
        return one_file


@dataclass
class Result:
    """What one depth took.

    depth: layers in the flexible zone, or the name of a schedule.
    layers: of each scale.
    total: images of the whole run.  generated: images of the batches of this run.  written: those
    of them that were not there before.  stats: of every batch of this run.
    """

    depth: int | str
    layers: list[list[int]]
    total: int
    generated: int
    written: int
    stats: list[Stats]

    def seconds(self, name: str) -> float:
        """The sum of a time over the batches."""
        return sum(getattr(stats, name) for stats in self.stats)

    def largest(self, name: str) -> int:
        """The size of the largest batch's cache."""
        return max((getattr(stats, name) for stats in self.stats), default=0)


@dataclass
class Work:
    """The images of one command."""

    command: Generate
    engine: Engine
    sampling: Sampling
    target: ImageFolder
    schedule: DepthSchedule | None

    # --- one picture ----------------------------------------------------------------------------

    def grid(self) -> list[Result]:
        """Generate everything, then write one picture."""
        command, target = self.command, self.target
        total = len(target) * len(target.depths)
        if total > MAX_GRID_IMAGES:
            raise UserError(
                f"generate: a grid holds at most {MAX_GRID_IMAGES} images; got {total}; give a "
                "folder as --out"
            )
        if command.out.exists() and not command.overwrite:
            raise UserError(f"{command.out}: exists; give --overwrite, or another --out")
        results, pictures = [], []
        with progress("generate", "generating", total, command.json) as advance:
            for depth in target.depths:
                batch = self._batch(depth)
                parts = list(self._batches(depth, batch, set(), advance))
                pictures.append([image for part in parts for image in part.pil()])
                results.append(self._result(depth, parts))
        if len(pictures) > 1:
            sheet = grid(pictures, [f"depth {depth}" for depth in target.depths])
        else:
            width = command.count if command.count > 1 else 10
            sheet = grid(list(_batched(pictures[0], width)))
        depths = [result.depth for result in results]
        layers = [result.layers for result in results]
        text = self._text(
            _words(target.labels), _words(depths), layers[0] if len(layers) == 1 else layers
        )
        save_png(command.out, sheet, text)
        return results

    # --- a folder -------------------------------------------------------------------------------

    def folder(self) -> list[Result]:
        """Generate and write batch by batch; Ctrl-C keeps what is written.

        Raises:
            UserError: the folder holds another run, or another process generates into it.
        """
        with locked_folder(self.command.out, LOCK_NAME, work="generation") as is_locked:
            if is_locked:
                self.target.clear_temporary()
            return self._folder()

    def _folder(self) -> list[Result]:
        command, target = self.command, self.target
        settings = self._settings()
        recorded = self._start(settings)
        done = set() if command.overwrite else target.whole()
        total = len(target) * len(target.depths)
        self._check_disk(total - len(done))
        results, batches = [], dict(recorded.get("batches", {}))
        if command.overwrite:
            # After an image of each depth: what cannot be generated costs no earlier image.
            batches = {str(self._depth(depth)): self._batch(depth) for depth in target.depths}
            target.clear()
            target.write_settings({**settings, "batches": batches})
        try:
            with progress("generate", "generating", total, command.json) as advance:
                advance(len(done), "images that are there" if done else "generating")
                for depth in target.depths:
                    result = Result(self._depth(depth), self._layers(depth), len(target), 0, 0, [])
                    results.append(result)
                    key = str(result.depth)
                    if key not in batches:
                        batches[key] = self._batch(depth)
                        target.write_settings({**settings, "batches": batches})
                    for part in self._batches(depth, batches[key], done, advance):
                        self._write(part, depth, result, done)
        except KeyboardInterrupt as stop:
            written = len(target.whole())
            again = command_line("generate", command, resume=True, overwrite=False)
            raise type(stop)(
                f"{written:,} of {counted(total, 'image')} in {command.out}; continue: {again}"
            ) from None
        return results

    def _start(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Prepare the folder; the recorded settings, or {} for a new run, also with --overwrite.

        Raises:
            UserError: the folder holds another run.
        """
        command, target = self.command, self.target
        if command.overwrite:
            return {}
        recorded, found = target.settings(), target.existing()
        if recorded is None and found:
            raise UserError(
                f"{command.out}: holds {counted(len(found), 'image')} of a run whose settings are "
                "not recorded; give another --out, or --overwrite"
            )
        if recorded is not None and not command.resume:
            raise UserError(
                f"{command.out}: holds images of an earlier run; give --resume to continue it, "
                "--overwrite to replace it, or another --out"
            )
        if recorded is None:
            return {}
        compare_settings(f"{command.out}: was generated", recorded, settings, ("software",))
        return recorded

    def _check_disk(self, missing: int) -> None:
        """The least that the missing images can take must fit on the disk.

        Raises:
            UserError: it does not.
        """
        side = self.engine.vae.config.image_size
        # A PNG of a photograph takes more than half of its pixels' bytes.
        per_image = -(-(3 * side * side // 2) // BLOCK_BYTES) * BLOCK_BYTES
        nearest = self.command.out.absolute()
        while not nearest.exists():
            nearest = nearest.parent
        free = shutil.disk_usage(nearest).free
        if missing * per_image > free:
            raise UserError(
                f"generate: {counted(missing, 'image')} take at least "
                f"{mebibytes(missing * per_image)}; "
                f"{mebibytes(free)} are free in {nearest}; give a smaller --count"
            )

    def _write(self, part: Generation, depth: int | None, result: Result, done: set[str]) -> None:
        result.generated += len(part.images)
        result.stats.append(part.stats)
        for index, label, image in zip(
            part.image_ids.tolist(), part.labels.tolist(), part.pil(), strict=True
        ):
            path = self.target.file(depth, index)
            if path.name not in done:
                text = self._text(label, result.depth, result.layers, index)
                save_png(path, image, text)
                result.written += 1

    # --- both -----------------------------------------------------------------------------------

    def _batches(
        self, depth: int | None, batch: int, done: set[str], advance: Advance
    ) -> Iterator[Generation]:
        """The batches of a depth of which an image is missing, each of ``batch`` images."""
        missing = self.target.chunks(depth, batch, done)
        for chunks in _batched(missing, max(1, IMAGES_PER_CALL // batch)):
            yield from self._generate(depth, list(itertools.chain(*chunks)), batch, advance)

    def _batch(self, depth: int | None) -> int:
        """Images of a batch: as asked for, or as many as fit."""
        command, engine, total = self.command, self.engine, len(self.target)
        # One image, not measured: starts threads, loads kernels, casts the weights, whose copies
        # must not count as free.
        next(self._generate(depth, [0], None, lambda steps, what: None))
        if command.max_batch is not None:
            return min(total, command.max_batch)
        schedule = engine.var.schedule(self.schedule or depth, command.bridge)
        plan = CachePlan(engine.var.layout, schedule, engine.page_size)
        return batch_size(
            min(total, MAX_BATCH),
            None,
            per_image=engine.image_bytes(plan, self.sampling.guided, command.kv_dtype),
            fixed=engine.decoder_bytes(),
            # Every call of the engine looks again, and other processes may take memory meanwhile.
            available=int(0.9 * free_bytes(engine.device)),
        )

    def _generate(
        self, depth: int | None, indices: Sequence[int], max_batch: int | None, advance: Advance
    ) -> Iterator[Generation]:
        on_scale = self._on_scale(advance)
        for part in self.engine.generate_batches_with(
            [self.target.label(index) for index in indices],
            self.sampling,
            image_ids=list(indices),
            depth=self.schedule or depth,
            bridge=self.command.bridge,
            max_batch=max_batch,
            on_scale=on_scale,
            kv_dtype=self.command.kv_dtype,
            image_dtype="uint8",
        ):
            if on_scale is None:
                advance(len(part.images), self._doing(depth))
            yield part

    def _on_scale(self, advance: Advance) -> OnScale | None:
        """Progress by scales on a CPU. On a GPU a callback would keep graphs from being used."""
        if self.engine.device.type != "cpu":
            return None
        scales = self.engine.var.layout.num_scales

        def on_scale(scale: int, partial: PartialResult) -> None:
            advance(len(partial.tokens) / scales, f"scale {scale + 1} of {scales}")

        return on_scale

    def _doing(self, depth: int | None) -> str:
        if self.schedule is not None:
            return f"schedule {self.schedule.name}"
        return "full depth" if depth is None else f"depth {depth}"

    def _depth(self, depth: int | None) -> int | str:
        if self.schedule is not None:
            return self.schedule.name
        return self.engine.var.config.depth if depth is None else depth

    def _layers(self, depth: int | None) -> list[list[int]]:
        """Of each scale."""
        schedule = self.engine.var.schedule(self.schedule or depth, self.command.bridge)
        return [list(layers) for layers in schedule.layers]

    def _result(self, depth: int | None, parts: Sequence[Generation]) -> Result:
        made = sum(len(part.images) for part in parts)
        stats = [part.stats for part in parts]
        return Result(self._depth(depth), self._layers(depth), made, made, made, stats)

    def _settings(self) -> dict[str, Any]:
        """All that the images depend on, as plain values."""
        command, engine = self.command, self.engine
        return {
            "model": command.model,
            "weights": fingerprint(engine),
            "labels": list(self.target.labels),
            "count": command.count,
            "depths": [self._depth(depth) for depth in self.target.depths],
            "bridge": command.bridge,
            "schedule": _plain_layers(self.schedule),
            "cfg": command.cfg,
            "top_k": command.top_k,
            "top_p": command.top_p,
            "temperature": command.temperature,
            "more_smooth": command.more_smooth,
            "seed": command.seed,
            "dtype": str(engine.dtype).removeprefix("torch."),
            "kv_dtype": command.kv_dtype,
            "device": engine.device.type,
            "backend": command.backend,
            CONFIGS: configs_of(engine),
            KERNELS: kernels_of(engine, command.kv_dtype),
            "max_batch": command.max_batch,
            "software": f"variant {__version__}, torch {torch.__version__}",
        }

    def _text(
        self, label: object, depth: object, layers: object, index: int | None = None
    ) -> dict[str, object]:
        """Text chunks of a PNG.

        Args:
            layers: of each scale; one such list for each depth of a grid of several.
        """
        command = self.command
        text: dict[str, object] = {"Software": f"variant {__version__}", "model": command.model}
        text |= {"label": label, "seed": command.seed, "depth": depth, "cfg": command.cfg}
        text["schedule"] = json.dumps(layers)
        text |= {"top_k": command.top_k, "top_p": command.top_p}
        text |= {"temperature": command.temperature, "more_smooth": command.more_smooth}
        names = self.engine.var.config.class_names
        if isinstance(label, int) and 0 <= label < len(names):
            text["class"] = names[label]
        return text if index is None else {**text, "index": index}


def fingerprint(models: Engine | VARiant) -> str:
    """SHA-256 over the names and values of all weights."""
    return weights_sha256(models.var, models.vae)


def configs_of(models: Engine | VARiant) -> dict[str, dict[str, Any]]:
    """The values of both configs that images depend on, as JSON has them.

    Weights converted anew with another ``norm_eps``, ``quant_resi`` or number of heads are the same
    weights, and give other images.
    """
    configs = {"var": models.var.config.to_dict(), "vae": models.vae.config.to_dict()}
    plain = json.loads(json.dumps(configs))
    return {
        part: {key: value for key, value in values.items() if key not in NOT_OF_IMAGES}
        for part, values in plain.items()
    }


def weights_sha256(*modules: torch.nn.Module) -> str:
    """SHA-256 over the names and values of the weights of modules."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode())
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(memoryview(data.numpy()))
    return digest.hexdigest()


def _plain_layers(schedule: DepthSchedule | None) -> list[list[int]] | None:
    return None if schedule is None else [list(layers) for layers in schedule.layers]


def _batched(values: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of ``size`` values; the last may be shorter."""
    iterator = iter(values)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _words(values: Sequence[object]) -> str:
    return " ".join(map(str, values))


# --- printing -----------------------------------------------------------------------------------


def _report(command: Generate, engine: Engine, results: Sequence[Result], out: Any) -> None:
    written = sum(result.written for result in results)
    total = sum(result.total for result in results)
    if any(result.stats for result in results):
        out.print(_table(command, results))
    what = "" if command.out.suffix.lower() == ".png" else f"{counted(written, 'image')} to "
    out.print(f"wrote {what}{command.out}")
    if written < total:
        out.print(f"there before: {total - written:,} of {counted(total, 'image')}")


def _table(command: Generate, results: Sequence[Result]) -> Any:
    first = next(result for result in results if result.stats)
    stats = first.stats[0]
    kv_text = "" if stats.kv_dtype == stats.dtype else f", K/V {stats.kv_dtype}"
    at_once = -(-first.generated // len(first.stats))
    timings = table(
        f"{command.model}: {counted(first.generated, 'image')}, {at_once} at once, seed "
        f"{command.seed}, cfg "
        f"{command.cfg:g}, {stats.dtype}{kv_text}, {counted(torch.get_num_threads(), 'thread')}",
        "depth",
        "ms per image",
        "of it decoder",
        "K/V planned",
        "K/V allocated",
        "of paper's scheme",
    )
    for result in (result for result in results if result.stats):
        timings.add_row(
            str(result.depth),
            f"{1000 * result.seconds('seconds') / result.generated:.2f}",
            f"{1000 * result.seconds('decode_seconds') / result.generated:.2f}",
            mebibytes(result.largest("kv_planned_bytes")),
            mebibytes(result.largest("kv_allocated_bytes")),
            f"{result.largest('kv_allocated_bytes') / result.largest('kv_paper_bytes'):.1%}",
        )
    return timings


def _as_json(command: Generate, labels: Sequence[int], results: Sequence[Result]) -> dict[str, Any]:
    stats = next((one for result in results for one in result.stats), None)
    return {
        "format": "variant-generated-1",
        "model": command.model,
        "out": str(command.out),
        "labels": list(labels),
        "count": command.count,
        "seed": command.seed,
        "sampling": {
            "cfg": command.cfg,
            "top_k": command.top_k,
            "top_p": command.top_p,
            "temperature": command.temperature,
            "more_smooth": command.more_smooth,
        },
        "dtype": None if stats is None else stats.dtype,
        "kv_dtype": None if stats is None else stats.kv_dtype,
        "device": command.device,
        "threads": torch.get_num_threads(),
        "depths": [
            {
                "depth": result.depth,
                "schedule": result.layers,
                "images": result.total,
                "generated": result.generated,
                "batches": len(result.stats),
                "seconds": result.seconds("seconds"),
                "decode_seconds": result.seconds("decode_seconds"),
                "kv_planned_bytes": result.largest("kv_planned_bytes"),
                "kv_allocated_bytes": result.largest("kv_allocated_bytes"),
                "kv_paper_bytes": result.largest("kv_paper_bytes"),
            }
            for result in results
        ],
    }
