"""Train your own next-scale model with ``VARiantAttention`` in place of its own attention.

    python examples/train_with_variant_attention.py --steps 200

A small model: every token of three scales has to repeat the value of the first token, which
attention must learn to find. Axes: B images, L tokens of all scales, C width, V token values.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from variant_kernels import ScaleLayout, VARiantAttention

LAYOUT = ScaleLayout.from_patch_nums((1, 2, 4))
VALUES = 8


class NextScale(nn.Module):
    """Two layers of attention and MLP over the tokens of all scales."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(VALUES, width)
        self.position = nn.Parameter(0.1 * torch.randn(LAYOUT.total, width))
        self.attention = nn.ModuleList(
            VARiantAttention(index, width, num_heads=2, attn_l2_norm=True) for index in range(2)
        )
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(2)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.head = nn.Linear(width, VALUES)
        # The mask that VAR's training code adds; VARiantAttention recognises it.
        scale_L = torch.repeat_interleave(torch.arange(3), torch.tensor(LAYOUT.tokens))
        hidden_LL = scale_L.unsqueeze(1) < scale_L
        self.bias: Tensor
        mask_LL = torch.zeros(LAYOUT.total, LAYOUT.total).masked_fill(hidden_LL, -torch.inf)
        self.register_buffer("bias", mask_LL.view(1, 1, LAYOUT.total, LAYOUT.total))

    def forward(self, tokens_BL: Tensor) -> Tensor:
        x_BLC = self.embed(tokens_BL) + self.position
        for index, (attention, mlp) in enumerate(zip(self.attention, self.mlp, strict=True)):
            x_BLC = x_BLC + attention(self.norms[2 * index](x_BLC), attn_bias=self.bias)
            x_BLC = x_BLC + mlp(self.norms[2 * index + 1](x_BLC))
        return self.head(x_BLC)


def batch(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, L): random tokens; the first one's value at every position."""
    first_B1 = torch.randint(VALUES, (size, 1), generator=generator)
    noise_BL = torch.randint(VALUES, (size, LAYOUT.total), generator=generator)
    inputs_BL = torch.cat((first_B1, noise_BL[:, 1:]), dim=1)
    return inputs_BL, first_B1.expand(-1, LAYOUT.total)


def train(steps: int, seed: int = 0) -> list[float]:
    """The loss of every step."""
    torch.manual_seed(seed)
    model, generator = NextScale(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        inputs_BL, targets_BL = batch(32, generator)
        loss = F.cross_entropy(model(inputs_BL).flatten(0, 1), targets_BL.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    if steps < 1:
        parser.error(f"--steps must be at least 1; got {steps}")
    losses = train(steps)
    print(f"loss: {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last")


if __name__ == "__main__":
    main()
