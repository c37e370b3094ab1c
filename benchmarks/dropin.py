"""A model of another codebase before and after ``patch``: compare outputs, then time and memory.

    python -m benchmarks.dropin --repo ../VAR --family var --small
    python -m benchmarks.dropin --repo ../VAR --family var --width d16 --dtype float32 bfloat16

The checkout runs unmodified, on the CPU, with random weights. bfloat16 is autocast. If any output
differs, the exit code is 1 and nothing is timed.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.dropin_case import DropinCase
from benchmarks.results import DROPIN
from variant.bench.environment import environment
from variant.bench.interleaved import quartiles
from variant.bench.result_file import write_result
from variant_kernels import DepthSchedule, patch
from variant_kernels.integrations import Handle
from variant_kernels.integrations.runtime import default_bridge

LOGITS_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3  # of the largest element of each gradient


def build(family: str, repo: Path, small: bool, width: str) -> DropinCase:
    """The case of a family.

    Raises:
        SystemExit: unknown family.
    """
    if family in ("var", "code"):
        from benchmarks import dropin_var

        return dropin_var.build(family, repo, small, width)
    try:
        from benchmarks import dropin_families
    except ImportError:
        raise SystemExit(f"dropin: family {family} is not supported") from None
    return dropin_families.build(family, repo, small)


# --- equal outputs --------------------------------------------------------------------------------


def check(case: DropinCase) -> dict[str, Any]:
    """Compare outputs before, under and after ``patch``.

    Returns:
        Whether each output is the same, by its description.
    """
    plain_members = {n: _members(m) for n, m in _objects(case)}
    state = _state(case)
    with torch.no_grad():
        logits, greedy, sampled = case.logits(), case.run(0, True), case.run(3, False)
    gradients = _gradients(case)
    with patched(case):
        with torch.no_grad():
            difference = float((case.logits() - logits).abs().max())
            same_greedy = torch.equal(case.run(0, True), greedy)
            same_sampled = torch.equal(case.run(3, False), sampled)
        gradient_error = _gradient_error(gradients, _gradients(case))
        same_state = _equal_states(state, _state(case))
        copied = _copies_are_plain(case)
    same = {
        f"logits within {LOGITS_TOLERANCE} (largest difference {difference:.2g})": (
            difference <= LOGITS_TOLERANCE
        ),
        "greedy tokens": same_greedy,
        "seeded samples": same_sampled,
        "state dict": same_state,
        f"gradients within {GRADIENT_TOLERANCE} (largest {gradient_error:.2g})": (
            gradient_error <= GRADIENT_TOLERANCE
        ),
        "a copy is a plain model": copied,
        "unpatch leaves no trace": all(
            _same_members(_members(m), plain_members[n]) for n, m in _objects(case)
        ),
    }
    with torch.no_grad():
        same["tokens after unpatch"] = torch.equal(case.run(0, True), greedy)
        if case.accelerate is not None:
            same["accelerate: greedy tokens"] = torch.equal(case.accelerate(0, True), greedy)
    return same


@contextmanager
def patched(case: DropinCase, **options: Any) -> Iterator[Handle]:
    """Patch all models of the case; yields the handle of the first."""
    with ExitStack() as stack:
        handles = [stack.enter_context(patch(model, **options)) for model in case.models]
        yield handles[0]


def _objects(case: DropinCase) -> list[tuple[str, nn.Module]]:
    return [
        (f"{i}.{n}", m) for i, model in enumerate(case.models) for n, m in model.named_modules()
    ]


def _members(module: nn.Module) -> tuple[type, dict[str, Any]]:
    return type(module), dict(vars(module))


def _same_members(new: tuple[type, dict[str, Any]], old: tuple[type, dict[str, Any]]) -> bool:
    return (
        new[0] is old[0]
        and list(new[1]) == list(old[1])
        and all(new[1][name] is value for name, value in old[1].items())
    )


def _state(case: DropinCase) -> list[tuple[str, Tensor]]:
    return [
        (f"{i}.{name}", tensor)
        for i, model in enumerate(case.models)
        for name, tensor in model.state_dict().items()
    ]


def _equal_states(old: list[tuple[str, Tensor]], new: list[tuple[str, Tensor]]) -> bool:
    return [name for name, _ in old] == [name for name, _ in new] and all(
        a.data_ptr() == b.data_ptr() and torch.equal(a, b)
        for (_, a), (_, b) in zip(old, new, strict=True)
    )


def _copies_are_plain(case: DropinCase) -> bool:
    copied = copy.deepcopy(case.model)
    return not any("_variant_patch" in vars(module) for module in copied.modules())


def _gradients(case: DropinCase) -> dict[str, Tensor]:
    if case.loss is None:
        return {}
    model = case.model
    model.train().requires_grad_(True).zero_grad()
    case.loss().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.eval().requires_grad_(False)
    return gradients


def _gradient_error(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> float:
    if old.keys() != new.keys():
        return float("inf")
    errors = [
        float((new[name] - grad).abs().max() / grad.abs().max().clamp_min(1e-8))
        for name, grad in old.items()
    ]
    return max(errors, default=0.0)


# --- time and memory ------------------------------------------------------------------------------


def _peak_mib(call: Callable[[], Any]) -> float:
    """Peak resident memory during a call less that before it, in MiB (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
    before = _status("VmRSS")
    call()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}")


def ceiling(case: DropinCase, depth: int) -> float:
    """Linear work at full depth over that at ``depth``: the speed-up if nothing else took time."""
    scales = len(case.scales)
    depths = DepthSchedule(case.layers, scales, depth, default_bridge(scales)).depths
    work = sum(n * layers for n, layers in zip(case.scales, depths, strict=True))
    full = sum(case.scales) * case.layers
    return full * (1 + case.outside) / (work + full * case.outside)


def measure(
    case: DropinCase, dtype: str, depth: int | None, rounds: int, keep_copies: bool = False
) -> dict[str, Any]:
    """Time the implementations interleaved; ratios are medians over the rounds."""
    seconds: dict[str, list[float]] = {}
    memory: dict[str, float] = {}
    notes: dict[str, str] = {}

    def run(name: str, call: Callable[[], Any], warm: bool) -> None:
        with (
            torch.inference_mode(),
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"),
        ):
            if warm:
                memory[name] = _peak_mib(call)
                return
            start = time.perf_counter()
            call()
            seconds.setdefault(name, []).append(time.perf_counter() - start)

    accelerated = None if case.accelerate is None else partial(case.accelerate, 3, False)
    for index in range(rounds + 1):
        warm = index == 0
        run("original", partial(case.run, 3, False), warm)
        with patched(case, keep_copies=keep_copies) as handle:
            if keep_copies:
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                    case.run(3, False)  # makes the copies
            run("patch", partial(case.run, 3, False), warm)
            notes["patch"] = _kv(handle)
            if depth is not None:
                handle.set_depth(depth)
                run(f"patch, depth {depth}", partial(case.run, 3, False), warm)
                notes[f"patch, depth {depth}"] = _kv(handle)
        if accelerated is not None:
            run("accelerate", accelerated, warm)
    result: dict[str, Any] = {
        "dtype": dtype,
        "rounds": rounds,
        "keep_copies": keep_copies,
        "implementations": {
            name: {
                "median": statistics.median(times),
                "quartiles": quartiles(times),
                "ratio_to_original": statistics.median(_ratios(seconds["original"], times)),
                "ratio_quartiles": quartiles(_ratios(seconds["original"], times)),
                "peak_mib": memory[name],
                "note": notes.get(name, ""),
            }
            for name, times in seconds.items()
        },
    }
    if depth is not None:
        gained = statistics.median(_ratios(seconds["patch"], seconds[f"patch, depth {depth}"]))
        result["depth"] = {"depth": depth, "gained": gained, "ceiling": ceiling(case, depth)}
    return result


def table(result: Mapping[str, Any]) -> list[str]:
    """The printed lines of a result."""
    lines = [f"{result['dtype']}, {result['rounds']} rounds, without the decoder"]
    for name, timing in result["implementations"].items():
        lines.append(
            f"  {name:18} {timing['median'] * 1000:8.1f} ms  "
            f"{timing['ratio_to_original']:5.2f} x original  "
            f"+{timing['peak_mib']:7.1f} MiB  {timing['note']}"
        )
    if "depth" in result:
        gained, limit = result["depth"]["gained"], result["depth"]["ceiling"]
        lines.append(
            f"  depth {result['depth']['depth']}: {gained:.2f} times as fast as full depth, "
            f"{limit:.2f} times fewer FLOP of linear layers ({gained / limit:.0%})"
        )
    return lines


def _ratios(old: list[float], new: list[float]) -> list[float]:
    return [a / b for a, b in zip(old, new, strict=True)]


def _kv(handle: Handle) -> str:
    stats = handle.stats()
    planned, real = stats.kv_planned_bytes / 2**20, stats.kv_allocated_bytes / 2**20
    return f"K/V {planned:.1f} MiB planned, {real:.1f} allocated"


def main(arguments: list[str] | None = None) -> int:
    """Compare outputs, then time; 1 if an output differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repo", type=Path, required=True, help="a checkout of the codebase")
    parser.add_argument("--family", required=True, help="var, code or infinity")
    parser.add_argument("--small", action="store_true", help="few narrow layers")
    parser.add_argument("--width", default="d16", help="of VAR and CoDe: d16, d20, d24, d30")
    parser.add_argument("--depth", type=int, help="also time this depth; default: half the layers")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3, help="0: compare outputs only")
    parser.add_argument("--keep-copies", action="store_true", help="as patch(keep_copies=True)")
    parser.add_argument("--no-check", action="store_true", help="time only")
    parser.add_argument("--json", type=Path, help="also write the times, with the environment")
    options = parser.parse_args(arguments)
    case = build(options.family, options.repo, options.small, options.width)
    for model in case.models:
        model.requires_grad_(False)
    if not options.no_check:
        same = check(case)
        for output, equal in same.items():
            print(f"{'same' if equal else 'DIFFERS':8} {output}")
        if not all(same.values()):
            return 1
    results: list[dict[str, Any]] = []
    if options.rounds:
        depth = options.depth or max(case.layers // 2, 2)
        for dtype in options.dtype:
            result = measure(case, dtype, depth, options.rounds, options.keep_copies)
            print("\n".join(table(result)), flush=True)
            results.append(result)
            if options.json is not None:
                _write(options, results)
    return 0


def _write(options: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    written = {
        "format": DROPIN,
        "environment": environment(),
        "family": options.family,
        "size": "small" if options.small else options.width,
        "results": results,
    }
    write_result(options.json, written)


if __name__ == "__main__":
    raise SystemExit(main())
