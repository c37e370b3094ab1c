"""Run as a program: two processes that train one ``VARiantAttention`` together.

The argument is a folder: ``grads.pt`` in it gets the gradients of the first process. One start pays
for the imports of both, which take longer than the training.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch._dynamo  # DistributedDataParallel imports it at first use
from test_attention_module import causal, pair, training_input
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.forked_ranks import run_ranks


def train(rank, folder):
    torch.set_num_threads(1)
    # The processes meet through a file and the loopback: another process could take a port.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        f"file://{folder}/meeting",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    _, layer = pair()
    wrapped = DistributedDataParallel(layer)
    x = training_input()
    wrapped(x[rank : rank + 1], causal()).square().mean().backward()
    if rank == 0:
        torch.save({n: p.grad for n, p in layer.named_parameters()}, folder / "grads.pt")
    # Delete it before the group: otherwise its reducer deletes the group and, while it holds the
    # interpreter's lock, waits for a gloo thread that needs the lock (torch 2.13).
    del wrapped
    dist.barrier()  # the group of a process that is late must not end under it
    dist.destroy_process_group()


def main():
    sys.exit(any(code for _, code in run_ranks(train, Path(sys.argv[1]))))


if __name__ == "__main__":
    main()
