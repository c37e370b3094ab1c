"""Peak memory of one generation, measured in a process of its own.

    python -m variant.bench.peak_memory '{"who": "ours", "model": "digits", ...}'

prints one line of JSON. On a CPU the peak is VmHWM, the largest resident size of the process. It
includes what importing torch takes; ``loaded`` is the size before the generation. On a GPU the peak
is the most memory that torch had allocated.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from variant.bench import original_var, torch_baseline
from variant.bench.device import autocast
from variant.bench.models import build, configs
from variant.engine.engine import Engine
from variant.errors import UserError
from variant.torch_modes import modes_of_a_new_process

STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Job:
    """The work of the child process. who: "ours", "original" or "plain loop".

    autocast: whether a peer runs under 16-bit autocast.  dtype: of our engine.
    decoder: whether images are decoded too.
    """

    who: str
    model: str
    batch: int
    depth: int
    dtype: str
    bridge: int | None = None
    autocast: bool = False
    device: str = "cpu"
    threads: int = 1
    var_repo: str | None = None
    decoder: bool = False
    cfg: float = 1.5
    top_k: int = 900
    top_p: float = 0.96


def peak(job: Job) -> dict[str, int]:
    """{"loaded": bytes with the model loaded, "peak": largest number of bytes} of a new process.

    Raises:
        UserError: the child failed; the message holds its last line.
    """
    done = subprocess.run(
        [sys.executable, "-m", "variant.bench.peak_memory", json.dumps(asdict(job))],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"bench: the process that measures memory failed: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    match = re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    if match is None:
        raise UserError(f"bench: {STATUS} has no {field}; memory is measured on Linux only")
    return int(match.group(1)) * 1024


def in_use(device: str, most: bool) -> int:
    """Bytes in use, now or at the peak: of GPU memory, or of this process on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() if most else torch.cuda.memory_allocated()
    return resident("VmHWM" if most else "VmRSS")


@modes_of_a_new_process()
def run(job: Job) -> dict[str, int]:
    """One generation in this process."""
    torch.set_num_threads(job.threads)
    labels_B = torch.arange(job.batch, device=job.device)
    filters = {"cfg": job.cfg, "top_k": job.top_k, "top_p": job.top_p}
    if job.who == "original":
        # Random weights need as much memory, and our model is not loaded.
        if job.var_repo is None:
            raise UserError("bench: the original needs --var-repo")
        config, vae_config = configs(job.model)
        theirs = original_var.load(Path(job.var_repo), config, vae_config, device=job.device)
        loaded = in_use(job.device, most=False)
        labels_B %= config.num_classes
        if job.decoder:
            theirs.generate(labels_B, seed=0, autocast=job.autocast, **filters)
        else:
            with theirs.without_decoder():
                theirs.generate(labels_B, seed=0, autocast=job.autocast, **filters)
        return {"loaded": loaded, "peak": in_use(job.device, most=True)}
    var, vae = build(job.model, job.device)
    labels_B %= var.config.num_classes
    if job.who == "ours":
        engine = Engine(var, vae, dtype=getattr(torch, job.dtype))
        loaded = in_use(job.device, most=False)
        engine.generate(
            labels_B,
            depth=job.depth,
            bridge=job.bridge,
            seed=0,
            max_batch=job.batch,
            decode=job.decoder,
            **filters,
        )
    else:
        loaded = in_use(job.device, most=False)
        with autocast(job.device, job.autocast):
            torch_baseline.generate(
                var,
                vae,
                labels_B,
                var.schedule(job.depth, job.bridge),
                generator=torch.Generator(job.device).manual_seed(0),
                **filters,
            )
    return {"loaded": loaded, "peak": in_use(job.device, most=True)}


def main() -> None:
    """Run the job in the first argument."""
    try:
        print(json.dumps(run(Job(**json.loads(sys.argv[1])))))
    except (UserError, MemoryError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
