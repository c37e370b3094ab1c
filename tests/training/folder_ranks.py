"""Run as a program: two processes write a checkpoint folder of sharded tensors.

Arguments: a folder, and one in which the processes meet. Files with the name of a tensor hold what
was saved, whole. The checkpoint is ``step-1``; ``step-2`` fails on rank 1, whose disk is full;
``step-3`` succeeds again.
"""

import errno
import os
import sys
from pathlib import Path

import torch
import torch._dynamo  # torch.distributed imports it at first use
import torch.distributed.checkpoint
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from tests.forked_ranks import run_ranks
from variant.errors import UserError
from variant.training.checkpoint_folder import FolderWriter, read_into


def write(rank, folder, meeting):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", f"file://{meeting}/file", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    whole = {"odd": torch.randn(5, 3), "few": torch.randn(1, 4), "plain": torch.randn(7)}
    whole["count"] = torch.tensor(3.0)
    tensors = {
        "odd": distribute_tensor(whole["odd"], mesh, [Shard(0)]),
        "few": distribute_tensor(whole["few"], mesh, [Shard(0)]),  # none of it on rank 1
        "plain": whole["plain"].clone(),
        "count": whole["count"].clone(),
    }
    if rank == 0:
        torch.save(whole, folder / "whole.pt")
    writer, finished = FolderWriter(), []
    links = {"best.safetensors": folder / "best"}

    def start(name):
        contents = {"step": 1, "rank": rank}
        target = folder / name
        writer.start(
            target, tensors, contents, links=links, finish=lambda: finished.append(target.exists())
        )

    start("step-1")
    for tensor in tensors.values():  # training goes on meanwhile
        (tensor.to_local() if hasattr(tensor, "to_local") else tensor).add_(100.0)
    writer.wait()
    fsync = os.fsync
    if rank == 1:

        def full(descriptor):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        os.fsync = full
    start("step-2")
    try:
        writer.wait()
        raise AssertionError("it was not told")
    except UserError as error:
        text = str(error)
    assert "rank 1: No space left on device" in text, text
    assert "\n" not in text
    writer.poll()  # told once
    os.fsync = fsync
    start("step-3")
    start("step-3")  # waits for the first, which it replaces
    writer.wait()
    assert finished == ([True, True, True] if rank == 0 else [])
    read_into(folder / "step-1", tensors)
    for name, tensor in tensors.items():
        if name in ("odd", "few"):
            tensor = tensor.redistribute(mesh, [Replicate()]).to_local()
        assert torch.equal(tensor, whole[name]), name
    dist.destroy_process_group()


def main():
    folder, meeting = map(Path, sys.argv[1:])
    sys.exit(any(code for _, code in run_ranks(write, folder, meeting)))


if __name__ == "__main__":
    main()
