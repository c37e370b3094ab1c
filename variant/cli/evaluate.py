"""``variant eval``: metrics of images against a reference, and what differs between two results."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from variant.bench.environment import environment
from variant.cli.generate import weights_sha256
from variant.cli.image_folder import FORMAT as GENERATE_FORMAT
from variant.cli.image_folder import SETTINGS_NAME
from variant.cli.options import Eval
from variant.cli.output import check_apart, check_json, console, table, write_json
from variant.cli.progress import Advance, progress
from variant.cli.pyplot import check_plot
from variant.cli.words import refuse_given
from variant.data.samples import ImageSource
from variant.data.sources import open_data
from variant.errors import UserError
from variant.evaluation.classifier import (
    STEPS,
    is_there,
    load_classifier,
    save_classifier,
    to_uint8,
    train_classifier,
)
from variant.evaluation.features import FeatureNetwork, load_network
from variant.evaluation.image_sets import ImageSet, Reference, open_images, open_reference
from variant.evaluation.paired import Paired, check_pairs, compare_pairs
from variant.evaluation.reconstruct import load_vqvae, psnr_by_scales, reconstructions
from variant.evaluation.report import (
    Evaluation,
    Metric,
    check_sets,
    evaluate,
    is_distance,
    share,
)
from variant.evaluation.sampler import FORMAT as SAMPLE_FORMAT
from variant.evaluation.sampler import SETTINGS_NAME as SAMPLED
from variant.evaluation.sampler import image_name, record_of_npz
from variant.models.placement import check_device
from variant.models.vqvae import VQVAE
from variant.paths import path_kind, read_json, shown
from variant.training.recipe import Recipe, load_recipe
from variant_kernels.arguments import choice, integer
from variant_kernels.wording import counted

FORMAT = "variant-eval-1"
RECORDS = (SAMPLE_FORMAT, GENERATE_FORMAT)
CLASSIFIER = "classifier:"
FEATURES = ("inception", "dinov2", "classifier:RECIPE", "MODULE:FUNCTION")
# Of a result that --compare reads, which may be any file.
MAX_METRICS, MAX_NESTING, SHOWN = 100, 50, 200
# Options of the images that --model generates.
OF_MODEL = ("num", "depths", "bridges", "schedules", "kv_dtypes", "seed", "out", "plot")
# Of the environment of a result; the rest of it says nothing about a metric.
VERSIONS = ("date", "command", "commit", "dirty", "cpu", "threads", "python", "torch", "gpu")


def evaluate_command(command: Eval) -> None:
    """Print every metric with its interval, its floor and its number of images; write them all."""
    _check_options(command)
    check_apart("eval", _files(command))
    check_json("eval", command.json)
    check_plot("eval", command.plot)
    if command.compare:
        _compare(command)
        return
    sources = (command.images, command.model, command.reconstruct)
    if command.reference is None or sum(source is not None for source in sources) != 1:
        raise UserError(
            "eval: --reference and one of --images, --model and --reconstruct are needed, or "
            "--compare A.json B.json"
        )
    if command.scales and command.reconstruct is None:
        raise UserError("eval: --scales is for --reconstruct MODEL")
    if ":" not in command.features:
        choice("eval", "--features", command.features, FEATURES)
    integer("eval", "--batch", command.batch, 1)
    check_device("eval", command.device, name="--device", computes=True)
    out = console(command.json, stderr=True)
    if command.model is not None:
        from variant.cli.evaluate_depths import check_out, evaluate_depths

        check_out(command.out)
        evaluate_depths(
            command,
            reference_of(command.reference),
            lambda size: network_of(command, out, size),
        )
        return
    reference = reference_of(command.reference)
    vae = None
    if command.reconstruct is not None:
        vae = load_vqvae(command.reconstruct, command.device)
        images = _reconstructions(command.reconstruct, vae, reference)
    else:
        assert command.images is not None, "checked above"
        images = open_images(command.images)
    generated = _generated(command.images)
    is_paired = command.paired or command.reconstruct is not None
    if is_paired and reference.images is None:
        raise UserError(f"eval: --paired needs a reference with images; {reference.name} has none")
    if command.paired and reference.images is not None:
        check_pairs(images, reference.images)
    height, width = images.read(range(1)).shape[2:]
    check_sets(reference, images.name, images.count, (height, width))
    network = network_of(command, out, (height, width))
    total = images.count + (0 if reference.images is None else reference.images.count)
    with ExitStack() as stack:
        heard = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always", RuntimeWarning)
        _check_number(images, generated)
        advance = stack.enter_context(progress("eval", "features", total, command.json))
        result = evaluate(
            images, reference, network, batch=command.batch, paired=is_paired, advance=advance
        )
        if is_paired and reference.images is not None:
            pairs = compare_pairs(images, reference.images, command.batch)
            result = _with_pairs(result, pairs, command.reconstruct is not None)
            if vae is not None and command.scales:
                by_scales = psnr_by_scales(vae, reference.images, command.batch)
                result = _with_scales(result, by_scales)
    notes = list(dict.fromkeys(str(warning.message) for warning in heard))
    for note in notes:
        out.print(f"warning: {note}")
    # First: the standard output may be closed by now.
    write_json(command.json, _as_json(command, result, notes, generated, vae))
    console(command.json).print(_table(command, result))


def _check_options(command: Eval) -> None:
    """Raises: UserError, for an option that would have no effect beside the others."""
    if command.compare:
        names = {option.name for option in fields(command)} - {"compare", "json", "debug"}
        refuse_given("eval", command, tuple(names), "excluded by --compare")
    if command.model is None:
        refuse_given("eval", command, OF_MODEL, "for --model MODEL")
    else:
        refuse_given("eval", command, ("paired",), "for --images")
    if ":" in command.features and not command.features.startswith(CLASSIFIER):
        refuse_given("eval", command, ("weights",), f"not for --features {command.features}")


def _files(command: Eval) -> dict[str, Path | None]:
    """The files that an evaluation reads or writes, by their options."""
    files = {f"--compare {path}": path for path in dict.fromkeys(command.compare)}
    weights = _classifier_file(command)
    if weights is not None:
        record = weights.with_suffix(".json")
        files |= {"the classifier's weights": weights, "the classifier's record": record}
    return {**files, "--plot": command.plot, "--json": command.json}


def _classifier_file(command: Eval) -> Path | None:
    """The weights of the classifier of ``--features``, which are read or written."""
    if not command.features.startswith(CLASSIFIER):
        return None
    name = command.features.removeprefix(CLASSIFIER)
    return command.weights or Path("runs") / Path(name).stem / "classifier.safetensors"


def _reconstructions(name: str, vae: VQVAE, reference: Reference) -> ImageSet:
    """Raises: UserError, if the reference has no images, or images of another size."""
    if reference.images is None:
        raise UserError(
            f"eval: --reconstruct needs a reference with images; {reference.name} has none"
        )
    return reconstructions(name, vae, reference.images)


def _with_scales(
    result: Evaluation, by_scales: Mapping[str, tuple[float, tuple[float, float] | None]]
) -> Evaluation:
    metrics = [
        Metric(f"PSNR, scales to {name}", value, result.num_images, *(interval or (None, None)))
        for name, (value, interval) in by_scales.items()
    ]
    return replace(result, metrics=(*result.metrics, *metrics))


def _with_pairs(result: Evaluation, pairs: Paired, reconstructed: bool) -> Evaluation:
    """With PSNR, SSIM and the share of equal images; distances of reconstructions get an r."""
    count = result.num_images
    low, high = pairs.psnr_interval or (None, None)
    metrics = [
        replace(metric, name=f"r{metric.name}") if reconstructed and is_distance(metric) else metric
        for metric in result.metrics
    ]
    metrics += [
        Metric("PSNR", pairs.psnr, count, low, high),
        Metric("SSIM", pairs.ssim, count, pairs.ssim_interval[0], pairs.ssim_interval[1]),
        share("equal images", pairs.equal, count),
    ]
    return replace(result, metrics=tuple(metrics))


def reference_of(name: str) -> Reference:
    """A path, or the held-out images of a recipe.

    Raises:
        UserError: neither is there.
    """
    if path_kind(name) is not None and not name.endswith(".toml"):
        return open_reference(name)
    try:
        recipe = load_recipe(name)
    except UserError as error:
        raise UserError(
            f"eval: --reference must name images (a folder, .tar or .npz), statistics (.npz) or a "
            f"recipe, whose held-out images are taken; {error}"
        ) from None
    return Reference(f"held-out images of {name}", _held_out(recipe, name))


def _held_out(recipe: Recipe, name: str) -> ImageSet:
    source = _source(recipe)

    def read(indices: range) -> Any:
        return to_uint8(source.held_out(indices).images).contiguous()

    labels = source.data.held_out_labels.tolist()
    return ImageSet(f"held-out images of {name}", source.num_held_out, labels, read)


def _source(recipe: Recipe) -> ImageSource:
    """A recipe's images, of which no more may be unreadable than ``data.max_bad`` allows."""
    vae, section = recipe.vae, recipe.data
    data = open_data(section, vae.image_size, vae.in_channels, recipe.seed)
    return ImageSource(data, recipe.seed, 0.0, section.max_bad)


def network_of(command: Eval, out: Console, size: tuple[int, int]) -> FeatureNetwork:
    """The network of ``--features``; a classifier that is not there is trained.

    Args:
        size: height and width of the images.
    Raises:
        UserError: there is none, its weights are others', or it is for images of another size.
    """
    if not command.features.startswith(CLASSIFIER):
        return load_network(command.features, command.weights, command.device)
    import torch

    name = command.features.removeprefix(CLASSIFIER)
    if not name:
        raise UserError("eval: --features classifier:RECIPE needs a recipe, as classifier:digits")
    recipe = load_recipe(name)
    path = _classifier_file(command)
    assert path is not None, "it has a classifier"
    vae = recipe.vae
    if size != (vae.image_size, vae.image_size):
        raise UserError(
            f"eval: --features {command.features}: {name} has images of {vae.image_size} x "
            f"{vae.image_size} pixels; those that are evaluated have {size[1]} x {size[0]}"
        )
    source = _source(recipe)
    data = source.data
    if not is_there(path):
        if path_kind(path) is not None:
            raise UserError(
                f"{shown(path)}: has no record beside it ({path.stem}.json); give another "
                "--weights, or remove it"
            )
        with progress("eval", "training the classifier", STEPS, command.json) as advance:
            trained = train_classifier(data, seed=recipe.seed, report=_steps(advance))
        source.count_bad()
        save_classifier(path, *trained)
    network, record = load_classifier(path, Path(name).stem, torch.device(command.device))
    if record.data_sha256 != data.digest():
        raise UserError(
            f"{shown(path)}: was trained on other data than {name} has; give another --weights"
        )
    if record.image_size not in (None, vae.image_size):  # the digest of a folder is of its files
        raise UserError(
            f"{shown(path)}: was trained on images of {record.image_size} x {record.image_size} "
            f"pixels, {name} has {vae.image_size} x {vae.image_size}; give another --weights"
        )
    out.print(
        f"classifier {shown(path)}: {record.accuracy:.1%} of "
        f"{counted(data.num_held_out, 'held-out image')}"
    )
    return network


def _steps(advance: Advance) -> Any:
    def report(step: int, loss: float) -> None:
        advance(1, f"step {step}, loss {loss:.3f}")

    return report


def _table(command: Eval, result: Evaluation) -> Any:
    rows = table(
        f"{counted(result.num_images, 'image')} of {command.images or command.reconstruct} against "
        f"{result.reference}, {result.network}",
        "metric",
        "value",
        "95 % interval",
        "n",
        "two real halves",
        "their n",
        "n to infinity",
    )
    for metric in result.metrics:
        interval = "" if metric.low is None else f"{metric.low:.4g} to {metric.high:.4g}"
        rows.add_row(
            metric.name,
            f"{metric.value:.4g}",
            interval,
            f"{metric.count:,}",
            "" if metric.floor is None else f"{metric.floor:.4g}",
            "" if metric.floor_count is None else f"{metric.floor_count:,}",
            "" if metric.infinite is None else f"{metric.infinite:.4g}",
        )
    return rows


def _as_json(
    command: Eval,
    result: Evaluation,
    notes: list[str],
    generated: Mapping[str, Any] | None,
    vae: VQVAE | None,
) -> dict[str, Any]:
    machine = environment()
    return {
        "format": FORMAT,
        **asdict(result),
        "images": None if command.images is None else str(command.images),
        "reconstructed_by": command.reconstruct,
        "reconstructed_by_sha256": None if vae is None else weights_sha256(vae),
        "reference": command.reference,
        "batch": command.batch,
        "device": command.device,
        "warnings": notes,
        "generated": generated,
        "environment": {key: machine.get(key) for key in VERSIONS},
    }


def _generated(images: Path | None) -> dict[str, Any] | None:
    """What the images were generated from, where a record beside them tells it; else None."""
    if images is None:
        return None
    if images.suffix == ".npz":  # that beside a folder of images is of an .npz of its name
        return _record(record_of_npz(images))
    return _record(images / SAMPLED) or _record(images / SETTINGS_NAME)


def _record(path: Path) -> dict[str, Any] | None:
    """The record that `variant sample` or `variant generate` wrote there; None for another file."""
    recorded = read_json(path) if path_kind(path) == "file" else None
    is_record = isinstance(recorded, dict) and recorded.get("format") in RECORDS
    return recorded if is_record else None


def _check_number(images: ImageSet, generated: Mapping[str, Any] | None) -> None:
    """Warns: RuntimeWarning, if there are not the images of `variant sample` and no others."""
    recorded = {} if generated is None else generated
    if recorded.get("format") != SAMPLE_FORMAT:
        return
    num, classes = recorded.get("num"), recorded.get("classes")
    text = None
    if num != images.count:
        says = f"{num:,}" if type(num) is int else repr(num)[:SHOWN]
        held = counted(images.count, "image")
        text = f"holds {held}; its record of `variant sample` says {says}"
    elif images.names is not None and isinstance(classes, list) and classes:
        own = {image_name(index, classes) for index in range(images.count)}
        # Of an image in a shard the name within it.
        names = (name.rpartition("/")[2].rpartition(": ")[2] for name in images.names)
        foreign = next((name for name in names if name not in own), None)
        if foreign is not None:
            text = f"holds {shown(foreign)}; its record of `variant sample` has no such image"
    if text is not None:
        warnings.warn(f"eval: {images.name} {text}", RuntimeWarning, stacklevel=2)


# --- two results --------------------------------------------------------------------------------


def _compare(command: Eval) -> None:
    """Print the metrics of two results side by side, and every setting that differs."""
    if len(command.compare) != 2:
        raise UserError(f"eval: --compare needs two files; got {len(command.compare)}")
    results = [_read_result(path) for path in command.compare]
    metrics = [
        {metric.name: metric for metric in _metrics(path, result)}
        for path, result in zip(command.compare, results, strict=True)
    ]
    rows = table("metrics", "metric", *(path.name for path in command.compare), "difference")
    for name in dict.fromkeys([*metrics[0], *metrics[1]]):
        pair = [one.get(name) for one in metrics]
        values = ["" if metric is None else f"{metric.value:.4g}" for metric in pair]
        both = [metric.value for metric in pair if metric is not None]
        # Two infinite PSNR are equal.
        difference = 0.0 if both[0] == both[-1] else both[-1] - both[0]
        rows.add_row(name, *values, f"{difference:+.4g}" if len(both) == 2 else "")
    settings = [dict(_flat(result)) for result in results]
    differing = {
        key: (settings[0].get(key), settings[1].get(key))
        for key in dict.fromkeys([*settings[0], *settings[1]])
        if settings[0].get(key) != settings[1].get(key)
    }
    out = console(command.json)
    out.print(rows)
    for key, (one, other) in differing.items():
        out.print(f"{key:.{SHOWN}}: {one!s:.{SHOWN}} | {other!s:.{SHOWN}}")
    if not differing:
        out.print("no setting differs")
    compared = {
        "format": "variant-eval-compare-1",
        "metrics": {
            name: [None if one.get(name) is None else one[name].value for one in metrics]
            for name in dict.fromkeys([*metrics[0], *metrics[1]])
        },
        "differing": {key: list(values) for key, values in differing.items()},
    }
    write_json(command.json, compared)


def _read_result(path: Path) -> dict[str, Any]:
    from variant.cli.evaluate_depths import FORMAT as OF_MODEL_FORMAT

    result = read_json(path)
    if isinstance(result, dict) and result.get("format") == OF_MODEL_FORMAT:
        raise UserError(
            f"{shown(path)}: holds the settings of --model; --compare takes results of --images or "
            "--reconstruct"
        )
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise UserError(f'{shown(path)}: its "format" must be "{FORMAT}", of `variant eval --json`')
    if _depth(result) > MAX_NESTING:
        raise UserError(f"{shown(path)}: must be nested at most {MAX_NESTING} deep")
    return result


def _depth(value: Any) -> int:
    """Levels of lists and dictionaries, counted up to one more than are allowed."""
    level, depth = [value], 0
    while level and depth <= MAX_NESTING:
        inner = [list(one.values()) if isinstance(one, dict) else one for one in level]
        level = [item for one in inner if isinstance(one, list) for item in one]
        depth += any(isinstance(one, list) for one in inner)
    return depth


def _metrics(path: Path, result: dict[str, Any]) -> list[Metric]:
    """The metrics of a result.  Raises: UserError, for what `variant eval` does not write."""
    values = result.get("metrics")
    if not isinstance(values, list) or len(values) > MAX_METRICS:
        raise UserError(f'{shown(path)}: its "metrics" must be a list of at most {MAX_METRICS}')
    try:
        metrics = [_metric(each) for each in values]
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise UserError(
            f'{shown(path)}: its "metrics" cannot be read: {error!s:.{SHOWN}}'
        ) from None
    names = [metric.name for metric in metrics]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f'{shown(path)}: its "metrics" must differ; {shown(twice)} comes twice')
    return metrics


def _metric(values: Any) -> Metric:
    """Raises: KeyError, OverflowError, TypeError or ValueError for what is no metric."""
    if not isinstance(values, dict) or not isinstance(values.get("name"), str):
        raise TypeError(f"each must be an object with a name; got {values!r:.80}")
    value = values["value"]
    # An infinite PSNR is the text "Infinity" in JSON.
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError(f"the value of {values['name']!r:.80} must be a number; got {value!r:.80}")
    return Metric(**{**values, "value": float(value)})


def _flat(value: Any, prefix: str = "") -> Any:
    """(dotted name, value) of every setting; the metrics and the date are none."""
    for key, inner in value.items():
        name = f"{prefix}{key}"
        if name in ("metrics", "environment.date", "environment.command"):
            continue
        if isinstance(inner, dict):
            yield from _flat(inner, f"{name}.")
        else:
            yield name, inner
