"""``variant warm``: compiles and times the kernels of a model before its first request."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch

from variant.cli.dtypes import DTYPES
from variant.cli.options import Warm
from variant.cli.output import check_json, console, write_json
from variant.engine.engine import Engine
from variant.engine.generation import Sampling
from variant.engine.planning import depths_of
from variant.models.placement import check_device
from variant.supernet import VARiant
from variant_kernels.arguments import choice, integer
from variant_kernels.dispatch.request import dtype_name
from variant_kernels.dispatch.support import BACKENDS
from variant_kernels.tuning_switch import timing_allowed
from variant_kernels.wording import counted

MAX_BATCH = 2**16
# With the filters of `variant generate`, and without: they are kernels of their own.
SAMPLINGS = (Sampling(1.5, top_p=0.96, seed=0), Sampling(1.5, seed=0))


def warm(command: Warm) -> None:
    """Generate each batch size at each depth once, and let every new shape be timed."""
    for batch in command.batch:
        integer("warm", "--batch", batch, 1, MAX_BATCH)
    choice("warm", "--backend", command.backend, ("auto", *BACKENDS))
    check_device("warm", command.device, name="--device", computes=True)
    check_json("warm", command.json)
    out = console(command.json)
    result: dict[str, Any] = {
        "format": "variant-warm-1",
        "model": command.model,
        "device": command.device,
        "steps": [],
    }
    if not needs_warming(torch.device(command.device)):
        out.print(
            f"warm: nothing to do on {command.device}: its kernels are compiled when the package "
            "is built, and have no block sizes to choose"
        )
        write_json(command.json, result)
        return
    model = VARiant.from_pretrained(command.model, device=command.device)
    engine = Engine(
        model.var,
        model.vae,
        dtype=DTYPES[command.dtype] if command.dtype else None,
        backend=command.backend,
        kv_dtype=command.kv_dtype,
        capture=False,  # a graph ends with its process
    )
    result["dtype"] = dtype_name(engine.dtype)
    every = depths_of(model.var.config) if model.var.config.bridge is not None else (None,)
    depths: tuple[int | None, ...] = tuple(command.depths) or every
    for depth in depths:
        model.var.schedule(depth, op="warm")  # wrong depths raise before the work
    steps = [(depth, batch) for depth in depths for batch in sorted(set(command.batch))]
    started = time.monotonic()
    try:
        for depth, batch in steps:
            step = _step(engine, depth, batch)
            result["steps"].append(step)
            done = len(result["steps"])
            left = (time.monotonic() - started) / done * (len(steps) - done)
            took = f"{step['seconds']:.1f} s" if step["fits"] else "does not fit, passed over"
            out.print(
                f"warm: depth {depth or 'full'}, batch {batch}: {took}; {done} of {len(steps)}, "
                f"about {timedelta(seconds=round(left))} left"
            )
    except KeyboardInterrupt as stop:
        raise type(stop)(
            f"{len(result['steps'])} of {counted(len(steps), 'step')} done; the same command "
            "passes quickly over what was compiled and timed"
        ) from None
    write_json(command.json, result)
    out.print("warm: requests of these shapes, in any process of this user, now compile nothing")


def needs_warming(device: torch.device) -> bool:
    """Whether kernels are compiled, and block sizes chosen, when a shape is first seen."""
    return device.type != "cpu"


def _step(engine: Engine, depth: int | None, batch: int) -> dict[str, Any]:
    started, fits = time.monotonic(), True
    with timing_allowed():
        for sampling in SAMPLINGS:
            try:
                engine.generate_with([0] * batch, sampling, depth=depth, max_batch=batch)
            except (MemoryError, torch.OutOfMemoryError):
                fits = False
    return {"depth": depth, "batch": batch, "seconds": time.monotonic() - started, "fits": fits}
