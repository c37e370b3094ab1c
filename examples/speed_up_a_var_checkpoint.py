"""Speed up a model of the original VAR code: keep the code and the checkpoint, add one line.

    python examples/speed_up_a_var_checkpoint.py --repo ../VAR --var var_d16.pth \
        --vae vae_ch160v4096z32.pth

``--repo`` is a clone of FoundationVision/VAR. Without the two files the weights are random: the
times are the same, the image is noise.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from variant import accelerate
from variant_kernels import patch


def original_models(repo: str, depth: int, var_path: str | None, vae_path: str | None) -> Any:
    """(VQ-VAE, VAR) by the repository's own builder."""
    sys.path.insert(0, repo)
    from models import build_vae_var  # type: ignore[import-not-found]

    vae, var = build_vae_var(device="cpu", depth=depth)
    if vae_path is None:
        initialize_convolutions(vae)
    for model, path in ((vae, vae_path), (var, var_path)):
        if path is not None:
            model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        model.eval().requires_grad_(False)
    return vae, var


def initialize_convolutions(vae: nn.Module) -> None:
    """Random weights for the VQ-VAE's convolutions.

    The original's builder disables torch's initialisation, because it expects a checkpoint: without
    one these weights are uninitialised memory, which may hold NaN.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, nn.Conv2d):
                std = module.weight[0].numel() ** -0.5
                module.weight.normal_(std=std, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()


def compare(var: Any, vae: Any, labels: torch.Tensor, **sampling: Any) -> dict[str, torch.Tensor]:
    """The same images generated in four ways; prints the seconds of each."""
    images = {}

    def timed(name: str, generate: Any) -> None:
        start = time.perf_counter()
        images[name] = generate()
        print(f"{name:22} {time.perf_counter() - start:6.2f} s")

    def own_loop() -> torch.Tensor:
        with torch.inference_mode():
            return var.autoregressive_infer_cfg(len(labels), labels, g_seed=0, **sampling)

    timed("original", own_loop)
    with patch(var) as handle:  # the one line; the model's own loop stays in use
        timed("patched", own_loop)
        print(f"  K/V {handle.stats().kv_allocated_bytes / 2**20:.1f} MiB")
        # Fewer layers at the later scales: for weights that were trained for it.
        handle.set_depth(max(len(var.blocks) // 2, 2))
        timed("patched, half depth", own_loop)
    model = accelerate(var, vae)  # shares the weights; our engine runs the whole generation
    generator = torch.Generator().manual_seed(0)
    timed("accelerated", lambda: model.generate(labels, generator=generator, **sampling).images)
    return images


def main() -> None:
    """Build, generate, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repo", required=True)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--var")
    parser.add_argument("--vae")
    args = parser.parse_args()
    if not Path(args.repo, "models").is_dir():
        parser.error(f"--repo must be a clone of FoundationVision/VAR; {args.repo} has no models")
    vae, var = original_models(args.repo, args.depth, args.var, args.vae)
    images = compare(var, vae, torch.tensor([207]), cfg=4.0, top_k=900, top_p=0.96)
    difference = (images["patched"] - images["original"]).abs().max()
    print(f"largest difference of a pixel, patched and original: {difference:.2g}")


if __name__ == "__main__":
    main()
