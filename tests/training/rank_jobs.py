"""Two processes that train together, as torchrun would start them; rank_program.py is the program.

It runs jobs in order; they come pickled in the file of the first argument. Job number n meets at
the n-th of the ports in the second one, where the test holds a store, as torchrun does. It writes
into the folder of the third argument ``rank0.json`` and ``rank1.json``, the results of each
process, and ``processes.json``, the id and the exit code of each.
"""

import json
import os
import pickle
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch._dynamo  # an optimizer imports it at first use
import torch.distributed.checkpoint
import torch.distributed.fsdp
from tiny_runs import CPU, quiet

from tests.forked_ranks import run_ranks
from variant.errors import UserError
from variant.training.configurations import Configurations
from variant.training.recipe import Recipe
from variant.training.trainer import Trainer
from variant.training.vae_task import train_vae
from variant.training.var_task import train_var

TRAIN = {"var": train_var, "vae": train_vae}


@dataclass
class Job:
    """One call of train_var, or of train_vae.

    train: "var" or "vae".
    stop_at: the step after which rank 1 gets SIGTERM.  kill_at: the step in which rank 1 is killed.
    differ_at: the step from which rank 1 draws another configuration.
    copy_before: where rank 0 copies the folder before the run.
    """

    recipe: Recipe
    out: Path
    resume: bool = False
    stop_at: int | None = None
    kill_at: int | None = None
    differ_at: int | None = None
    copy_before: Path | None = None
    train: str = "var"
    options: dict = field(default_factory=dict)


def run(job, rank=0):
    """The losses of the steps, the names of configurations, and how the job ended."""
    result = {"losses": {}, "names": {}, "missing": {}, "ended": "finished"}
    if rank == 0 and job.copy_before is not None:
        shutil.copytree(job.out, job.copy_before)
    train_step, of_step = Trainer._train_step, Configurations.of_step

    def watched(self):
        step = self.state.step
        if rank == 1 and step == job.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        # The signal comes while the step runs; the run stops after it.
        if rank == 1 and step == job.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        loss = train_step(self)
        parameters = self.task.module.named_parameters()
        result["losses"][step] = loss
        result["names"][step] = self.task.name_of_step(step)
        result["missing"][step] = [name for name, p in parameters if p.grad is None]
        return loss

    def differing(self, step):
        if job.differ_at is not None and rank == 1 and step >= job.differ_at:
            return self.full if of_step(self, step) is not self.full else self.subnet(2, 1)
        return of_step(self, step)

    Trainer._train_step, Configurations.of_step = watched, differing
    started = time.monotonic()
    try:
        console = quiet()
        summary = TRAIN[job.train](
            job.recipe, job.out, resume=job.resume, console=console, device=CPU, **job.options
        )
        result["held_out"] = summary.held_out_loss
        result["train"] = summary.train_loss
    except UserError as error:
        result["ended"] = str(error)
    except SystemExit as stop:
        result["ended"] = f"exit {stop.code}"
    finally:
        Trainer._train_step, Configurations.of_step = train_step, of_step
    result["printed"] = console.file.getvalue()
    result["seconds"] = time.monotonic() - started
    return result


def work(rank, jobs, ports, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    results = []
    for job, port in zip(jobs, ports, strict=True):
        os.environ["MASTER_PORT"] = port
        results.append(run(job, rank))
        (folder / f"rank{rank}.json").write_text(json.dumps(results))


def main():
    with open(sys.argv[1], "rb") as file:
        jobs = pickle.load(file)  # from the test
    folder = Path(sys.argv[3])
    # torchrun, too, ends the others when a process is lost.
    ended = run_ranks(work, jobs, sys.argv[2].split(","), folder, grace=1)
    (folder / "processes.json").write_text(json.dumps([*zip(*ended, strict=True)]))
