"""Peak memory of one generation, measured in a process that does nothing else.

    python -m variant.bench.memory '{"who": "ours", "model": "digits", ...}'

prints one line of JSON. VmHWM is the most memory that a process ever had resident; it counts what
importing torch takes, which ``loaded`` tells apart.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from variant.bench import original, plain_loop
from variant.bench.models import build, configs
from variant.engine import Engine
from variant.errors import UserError

STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Job:
    """What the child runs. who: "ours", "original" or "plain loop".

    autocast: of the peers, bfloat16; dtype: of ours.  decoder: whether images are decoded too.
    """

    who: str
    model: str
    batch: int
    depth: int
    dtype: str
    bridge: int | None = None
    autocast: bool = False
    threads: int = 1
    var_repo: str | None = None
    decoder: bool = False
    cfg: float = 1.5
    top_k: int = 900
    top_p: float = 0.96


def peak(job: Job) -> dict[str, int]:
    """{"loaded": bytes resident with the model ready, "peak": most bytes ever} of a fresh process.

    Raises:
        UserError: the child failed; its last line says why.
    """
    done = subprocess.run(
        [sys.executable, "-m", "variant.bench.memory", json.dumps(asdict(job))],
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
    found = re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise UserError(f"bench: {STATUS} names no {field}; memory is measured on Linux only")
    return int(found.group(1)) * 1024


def run(job: Job) -> dict[str, int]:
    """One generation in this process."""
    torch.set_num_threads(job.threads)
    labels_B = torch.arange(job.batch)
    filters = {"cfg": job.cfg, "top_k": job.top_k, "top_p": job.top_p}
    if job.who == "original":
        # Its own random weights take the same room, and nothing of ours is in the way.
        if job.var_repo is None:
            raise UserError("bench: the original needs --var-repo")
        config, vae_config = configs(job.model)
        theirs = original.load(Path(job.var_repo), config, vae_config)
        loaded = resident("VmRSS")
        labels_B %= config.num_classes
        if job.decoder:
            theirs.generate(labels_B, seed=0, autocast=job.autocast, **filters)
        else:
            with theirs.without_decoder():
                theirs.generate(labels_B, seed=0, autocast=job.autocast, **filters)
        return {"loaded": loaded, "peak": resident("VmHWM")}
    var, vae = build(job.model)
    labels_B %= var.config.num_classes
    if job.who == "ours":
        engine = Engine(var, vae, dtype=getattr(torch, job.dtype))
        loaded = resident("VmRSS")
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
        loaded = resident("VmRSS")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=job.autocast):
            plain_loop.generate(
                var,
                vae,
                labels_B,
                var.schedule(job.depth, job.bridge),
                generator=torch.Generator().manual_seed(0),
                **filters,
            )
    return {"loaded": loaded, "peak": resident("VmHWM")}


def main() -> None:
    """Run the job in the first argument."""
    try:
        print(json.dumps(run(Job(**json.loads(sys.argv[1])))))
    except (UserError, MemoryError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
