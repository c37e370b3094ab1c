"""Speed up the original VAR's model: keep its code and checkpoint, add one line.

    python examples/speed_up_a_var_checkpoint.py --repo ../VAR --var var_d16.pth \
        --vae vae_ch160v4096z32.pth

``--repo`` is a clone of FoundationVision/VAR. Without the two files the weights are random: the
times are the same, the picture is noise.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch

from variant import accelerate
from variant_kernels import patch


def original_models(repo: str, depth: int, var_path: str | None, vae_path: str | None) -> Any:
    """(VQ-VAE, VAR) by the repository's own builder."""
    sys.path.insert(0, repo)
    from models import build_vae_var  # type: ignore[import-not-found]

    vae, var = build_vae_var(device="cpu", depth=depth)
    for model, path in ((vae, vae_path), (var, var_path)):
        if path is not None:
            model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        model.eval().requires_grad_(False)
    return vae, var


def compare(var: Any, vae: Any, labels: torch.Tensor, **sampling: Any) -> dict[str, torch.Tensor]:
    """The same pictures four ways; prints the seconds of each."""
    pictures = {}

    def timed(name: str, paint: Any) -> None:
        start = time.perf_counter()
        pictures[name] = paint()
        print(f"{name:22} {time.perf_counter() - start:6.2f} s")

    def own_loop() -> torch.Tensor:
        with torch.inference_mode():
            return var.autoregressive_infer_cfg(len(labels), labels, g_seed=0, **sampling)

    timed("original", own_loop)
    with patch(var) as handle:  # the one line; the model's own loop goes on as before
        timed("patched", own_loop)
        print(f"  K/V {handle.stats().kv_allocated_bytes / 2**20:.1f} MiB")
        # Fewer layers at the later scales: for weights that were trained for it.
        handle.set_depth(max(len(var.blocks) // 2, 2))
        timed("patched, half depth", own_loop)
    model = accelerate(var, vae)  # shares the weights; its whole generation by our engine
    generator = torch.Generator().manual_seed(0)
    timed("accelerated", lambda: model.generate(labels, generator=generator, **sampling).images)
    return pictures


def main() -> None:
    """Build, paint, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repo", required=True)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--var")
    parser.add_argument("--vae")
    given = parser.parse_args()
    vae, var = original_models(given.repo, given.depth, given.var, given.vae)
    pictures = compare(var, vae, torch.tensor([207]), cfg=4.0, top_k=900, top_p=0.96)
    apart = (pictures["patched"] - pictures["original"]).abs().max()
    print(f"largest difference of a pixel, patched and original: {apart:.2g}")


if __name__ == "__main__":
    main()
