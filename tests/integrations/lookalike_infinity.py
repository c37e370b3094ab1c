"""A small model built like Infinity: the attributes that ``patch`` requires, our own code.

Axes: B rows, T tokens of this call, L tokens of all scales, C width, E bits per token.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

SQUARE = [(1, 1, 1), (1, 2, 2), (1, 3, 3), (1, 4, 4)]
WIDE = [(1, 1, 1), (1, 2, 3), (1, 3, 5), (1, 4, 7)]


def rotations(scales, head_dim):
    """(2, 1, 1, 1, L, head_dim / 2): half of the angles turn with the row, half with the column."""
    quarter = head_dim // 4
    speed = 10000.0 ** -(torch.arange(quarter) / quarter)
    angles = []
    for t, h, w in scales:
        for position in range(t * h * w):
            row, column = divmod(position % (h * w), w)
            angles.append(torch.cat((row / h * 9 * speed, column / w * 9 * speed)))
    angle = torch.stack(angles)
    return torch.stack((angle.cos(), angle.sin()))[:, None, None, None]


class SelfAttention(nn.Module):
    def __init__(self, width, heads, cos_attn=True, using_flash=False):
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.cos_attn, self.using_flash = cos_attn, using_flash
        self.scale = 1 if cos_attn else 1 / math.sqrt(self.head_dim)
        if cos_attn:
            # The model for the flash-attention fork keeps heads in another place.
            shape = (1, 1, heads, 1) if using_flash else (1, heads, 1, 1)
            self.scale_mul_1H11 = nn.Parameter(torch.linspace(0.5, 2.0, heads).view(shape))
            self.max_scale_mul = math.log(100)
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.randn(width) * 0.1)
        self.v_bias = nn.Parameter(torch.randn(width) * 0.1)
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj, self.proj_drop = nn.Linear(width, width), nn.Identity()
        self.caching, self.cached_k, self.cached_v = False, None, None

    def kv_caching(self, enable):
        self.caching, self.cached_k, self.cached_v = enable, None, None

    def forward(
        self,
        x,
        attn_bias_or_two_vector,
        attn_fn=None,
        scale_schedule=None,
        rope2d_freqs_grid=None,
        scale_ind=0,
    ):
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv = F.linear(x, self.mat_qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        if self.cos_attn:
            factor = self.scale_mul_1H11.view(1, -1, 1, 1).clamp_max(self.max_scale_mul).exp()
            q, k = F.normalize(q.float(), dim=-1) * factor, F.normalize(k.float(), dim=-1)
        if rope2d_freqs_grid is not None:
            start = sum(t * h * w for t, h, w in scale_schedule[:scale_ind])
            turn = rope2d_freqs_grid[str(tuple(scale_schedule))]
            cos, sin = turn[:, 0, 0, 0, start : start + x.shape[1]]
            q, k = (self._turn(part.float(), cos, sin) for part in (q, k))
        if self.caching:
            if self.cached_k is not None:
                k = torch.cat((self.cached_k, k), dim=2)
                v = torch.cat((self.cached_v, v), dim=2)
            self.cached_k, self.cached_v = k, v
        out = F.scaled_dot_product_attention(
            q.to(v.dtype),
            k.to(v.dtype),
            v,
            attn_mask=attn_bias_or_two_vector,
            scale=self.scale,
        )
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    @staticmethod
    def _turn(x, cos, sin):
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack((cos * even - sin * odd, sin * even + cos * odd), -1).flatten(-2)


class CrossAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.num_heads = heads
        self.mat_q, self.mat_kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, text):
        q = self.mat_q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.mat_kv(text).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FFN(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CrossAttnBlock(nn.Module):
    def __init__(self, width, heads, **options):
        super().__init__()
        self.sa, self.ca = SelfAttention(width, heads, **options), CrossAttention(width, heads)
        self.ffn = FFN(width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / math.sqrt(width))

    def forward(
        self,
        x,
        cond_BD,
        ca_kv,
        attn_bias_or_two_vector,
        attn_fn=None,
        scale_schedule=None,
        rope2d_freqs_grid=None,
        scale_ind=0,
    ):
        gate1, gate2, scale1, scale2, shift1, shift2 = (self.ada_gss + cond_BD).unbind(2)
        h = self.norm(x) * (1 + scale1) + shift1
        y = self.sa(
            h, attn_bias_or_two_vector, attn_fn, scale_schedule, rope2d_freqs_grid, scale_ind
        )
        x = x + gate1 * y
        x = x + 0.5 * self.ca(self.norm(x), ca_kv)
        return x + gate2 * self.ffn(self.norm(x) * (1 + scale2) + shift2)


class Chunk(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.module = nn.ModuleList(blocks)


class LookalikeInfinity(nn.Module):
    """``autoregressive_infer_cfg`` returns bits and the logits of every scale."""

    def __init__(self, depth=4, width=64, heads=2, bits=6, **options):
        super().__init__()
        self.C, self.num_heads, self.bits, self.use_flex_attn = width, heads, bits, False
        self.rope2d_freqs_grid = {
            str(tuple(scales)): rotations(scales, width // heads) for scales in (SQUARE, WIDE)
        }
        self.pos_start = nn.Parameter(torch.randn(1, 1, width))
        self.word_embed = nn.Linear(bits, width)
        self.cond = nn.Linear(width, 6 * width)
        self.unregistered_blocks = [CrossAttnBlock(width, heads, **options) for _ in range(depth)]
        half = depth // 2
        self.block_chunks = nn.ModuleList(
            (Chunk(self.unregistered_blocks[:half]), Chunk(self.unregistered_blocks[half:]))
        )
        self.head_nm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 2 * bits)

    def _condition(self, text):
        return self.cond(text.mean(1)).unflatten(-1, (1, 6, -1)) * 0.5

    @torch.no_grad()
    def autoregressive_infer_cfg(self, text, scale_schedule, g_seed=0, greedy=False, trunk=99):
        generator = torch.Generator().manual_seed(g_seed)
        text = torch.cat((text, torch.zeros_like(text)))
        batch, cond = len(text) // 2, self._condition(text)
        x = text.mean(1, keepdim=True) + self.pos_start
        for block in self.unregistered_blocks:
            block.sa.kv_caching(True)
        drawn, logits = [], []
        for scale, (_, h, w) in enumerate(scale_schedule[:trunk]):
            for chunk in self.block_chunks:
                for block in chunk.module:
                    x = block(
                        x=x,
                        cond_BD=cond,
                        ca_kv=text,
                        attn_bias_or_two_vector=None,
                        attn_fn=None,
                        scale_schedule=scale_schedule,
                        rope2d_freqs_grid=self.rope2d_freqs_grid,
                        scale_ind=scale,
                    )
            both = self.head(self.head_nm(x.float()))
            logits.append(both)
            chance = (2 * both[:batch] - both[batch:]).unflatten(-1, (-1, 2)).softmax(-1)[..., 1]
            limit = 0.5 if greedy else torch.rand(chance.shape, generator=generator)
            bits = (chance > limit).float()
            drawn.append(bits.flatten(1))
            if scale + 1 < len(scale_schedule):
                _, high, wide = scale_schedule[scale + 1]
                grid = (2 * bits - 1).mT.unflatten(-1, (h, w))
                x = self.word_embed(F.interpolate(grid, (high, wide)).flatten(2).mT)
                x = x.repeat(2, 1, 1)
        for block in self.unregistered_blocks:
            block.sa.kv_caching(False)
        return torch.cat(drawn, 1), torch.cat(logits, 1)

    def forward(self, text, words_BTE, scale_schedule):
        cond = self._condition(text)
        x = torch.cat((text.mean(1, keepdim=True) + self.pos_start, self.word_embed(words_BTE)), 1)
        counts = torch.tensor([t * h * w for t, h, w in scale_schedule])
        scale_L = torch.repeat_interleave(torch.arange(len(counts)), counts)
        hidden_LL = scale_L.unsqueeze(1) < scale_L
        bias = torch.zeros(hidden_LL.shape).masked_fill(hidden_LL, -torch.inf)[None, None]
        for block in self.unregistered_blocks:
            x = block(
                x,
                cond,
                text,
                bias.to(x.dtype),
                None,
                scale_schedule,
                self.rope2d_freqs_grid,
            )
        return self.head(self.head_nm(x.float()))


def lookalike(seed=0, **options):
    """In eval mode, with outputs that differ from token to token."""
    torch.manual_seed(seed)
    return LookalikeInfinity(**options).eval()
