"""A small model built like the original VAR: the attributes that ``patch`` requires, our own code.

Axes: B rows, T tokens of this call, L tokens of all scales, C width, E codebook vector width.
"""

import math
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from variant.models.config import VQVAEConfig
from variant.models.vqvae import VQVAE


class SelfAttention(nn.Module):
    def __init__(self, block_idx, embed_dim, num_heads, attn_drop=0.0, attn_l2_norm=True):
        super().__init__()
        self.block_idx, self.num_heads = block_idx, num_heads
        self.head_dim = embed_dim // num_heads
        self.attn_l2_norm = attn_l2_norm
        self.scale = 1 if attn_l2_norm else 0.25 / math.sqrt(self.head_dim)
        if attn_l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, num_heads, 1, 1), math.log(4.0)))
            self.max_scale_mul = math.log(100)
        self.mat_qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(embed_dim))
        self.v_bias = nn.Parameter(torch.zeros(embed_dim))
        self.register_buffer("zero_k_bias", torch.zeros(embed_dim))
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Identity()
        self.attn_drop = attn_drop
        self.using_flash = self.using_xform = False
        self.caching, self.cached_k, self.cached_v = False, None, None

    def kv_caching(self, enable):
        self.caching, self.cached_k, self.cached_v = enable, None, None

    def forward(self, x, attn_bias):
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv = F.linear(x, self.mat_qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        if self.attn_l2_norm:
            factor = self.scale_mul_1H11.clamp_max(self.max_scale_mul).exp()
            q, k = F.normalize(q, dim=-1) * factor, F.normalize(k, dim=-1)
        if self.caching:
            if self.cached_k is not None:
                k = torch.cat((self.cached_k, k), dim=2)
                v = torch.cat((self.cached_v, v), dim=2)
            self.cached_k, self.cached_v = k, v
        dropout = self.attn_drop if self.training else 0.0
        out = F.scaled_dot_product_attention(
            q.to(v.dtype),
            k.to(v.dtype),
            v,
            attn_mask=attn_bias,
            dropout_p=dropout,
            scale=self.scale,
        )
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fused_mlp_func = None
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.act = nn.GELU(approximate="tanh")

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, index, width, heads, shared_aln, norm, **options):
        super().__init__()
        self.block_idx, self.C = index, width
        self.attn = SelfAttention(index, width, heads, **options)
        self.ffn = MLP(width)
        self.drop_path = nn.Identity()
        self.ln_wo_grad = norm(width, elementwise_affine=False)
        self.shared_aln = shared_aln
        if shared_aln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / math.sqrt(width))
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.fused_add_norm_fn = None

    def forward(self, x, cond_BD, attn_bias):
        rows = self.ada_gss + cond_BD if self.shared_aln else self.ada_lin(cond_BD)
        gate1, gate2, scale1, scale2, shift1, shift2 = rows.view(-1, 1, 6, self.C).unbind(2)
        h = self.ln_wo_grad(x) * (1 + scale1) + shift1
        x = x + self.drop_path(gate1 * self.attn(h, attn_bias=attn_bias))
        h = self.ln_wo_grad(x) * (1 + scale2) + shift2
        return x + self.drop_path(gate2 * self.ffn(h))


class HeadNorm(nn.Module):
    def __init__(self, width, norm):
        super().__init__()
        self.C = width
        self.ln_wo_grad = norm(width, elementwise_affine=False)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_BLC, cond_BD):
        scale, shift = self.ada_lin(cond_BD).view(-1, 1, 2, self.C).unbind(2)
        return self.ln_wo_grad(x_BLC) * (1 + scale) + shift


class SharedAdaLin(nn.Linear):
    def forward(self, cond_BD):
        return super().forward(cond_BD).unflatten(-1, (1, 6, -1))


class LookalikeVAR(nn.Module):
    """``autoregressive_infer_cfg`` returns tokens and the logits of every scale."""

    def __init__(
        self,
        sides=(1, 2, 3, 4),
        depth=4,
        width=64,
        heads=2,
        shared_aln=False,
        vocab=32,
        num_classes=5,
        **options,
    ):
        super().__init__()
        self.patch_nums, self.C, self.D, self.V, self.Cvae = sides, width, width, vocab, 8
        self.num_classes, self.cond_drop_rate, self.drop_path_rate = num_classes, 0.1, 0.0
        self.L, self.first_l = sum(n * n for n in sides), sides[0] ** 2
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.word_embed = nn.Linear(self.Cvae, width)
        self.class_emb = nn.Embedding(self.num_classes + 1, width)
        self.pos_start = nn.Parameter(torch.randn(1, self.first_l, width))
        self.pos_1LC = nn.Parameter(torch.randn(1, self.L, width))
        self.lvl_embed = nn.Embedding(len(sides), width)
        shared = nn.Sequential(nn.SiLU(), SharedAdaLin(width, 6 * width))
        self.shared_ada_lin = shared if shared_aln else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(index, width, heads, shared_aln, norm, **options) for index in range(depth)
        )
        scale_L = torch.repeat_interleave(torch.arange(len(sides)), torch.tensor(sides) ** 2)
        self.register_buffer("lvl_1L", scale_L.unsqueeze(0))
        hidden_LL = scale_L.unsqueeze(1) < scale_L
        mask_LL = torch.zeros(self.L, self.L).masked_fill(hidden_LL, -torch.inf)
        self.register_buffer("attn_bias_for_masking", mask_LL.view(1, 1, self.L, self.L))
        self.head_nm = HeadNorm(width, norm)
        self.head = nn.Linear(width, vocab)
        # In a tuple, as the original keeps its VQ-VAE: no part of the state dict.
        self.codes = (nn.Embedding(vocab, self.Cvae).requires_grad_(False),)

    def get_logits(self, x, cond_BD):
        return self.head(self.head_nm(x.float(), cond_BD).float()).float()

    @torch.no_grad()
    def autoregressive_infer_cfg(self, B, label_B, g_seed=None, cfg=1.5, top_k=0):
        generator = torch.Generator().manual_seed(g_seed or 0)
        labels = torch.cat((label_B, torch.full_like(label_B, self.num_classes)))
        cond = self.class_emb(labels)
        position = self.lvl_embed(self.lvl_1L) + self.pos_1LC
        x = cond.unsqueeze(1) + self.pos_start + position[:, : self.first_l]
        tokens, logits, seen = [], [], 0
        for block in self.blocks:
            block.attn.kv_caching(True)
        for scale, side in enumerate(self.patch_nums):
            seen += side * side
            shared = self.shared_ada_lin(cond)
            for block in self.blocks:
                x = block(x=x, cond_BD=shared, attn_bias=None)
            both = self.get_logits(x, cond)
            t = cfg * scale / (len(self.patch_nums) - 1)
            guided = (1 + t) * both[:B] - t * both[B:]
            if top_k:
                least = guided.topk(min(top_k, self.V))[0][..., -1:]
                guided = guided.masked_fill(guided < least, -torch.inf)
            drawn = torch.multinomial(guided.softmax(-1).flatten(0, 1), 1, generator=generator)
            tokens.append(drawn.view(B, -1))
            logits.append(both)
            if scale + 1 < len(self.patch_nums):
                grid = self.codes[0](tokens[-1]).mT.unflatten(-1, (side, side))
                following = self.patch_nums[scale + 1]
                words = F.interpolate(grid, (following, following)).flatten(2).mT
                x = self.word_embed(words) + position[:, seen : seen + following**2]
                x = x.repeat(2, 1, 1)
        for block in self.blocks:
            block.attn.kv_caching(False)
        return torch.cat(tokens, 1), torch.cat(logits, 1)

    def forward(self, label_B, words_BLE):
        cond = self.class_emb(label_B)
        start = cond.unsqueeze(1) + self.pos_start
        x = torch.cat((start, self.word_embed(words_BLE)), 1)
        x = x + self.lvl_embed(self.lvl_1L) + self.pos_1LC
        shared, bias = self.shared_ada_lin(cond), self.attn_bias_for_masking.to(x.dtype)
        for block in self.blocks:
            x = block(x=x, cond_BD=shared, attn_bias=bias)
        return self.get_logits(x, cond)


class LookalikeCoDe(LookalikeVAR):
    """With CoDe's additional functions: a refiner processes the draft in one masked call."""

    def autoregressive_infer_cfg_draft(self, B, label_B, exit_num):
        return self.autoregressive_infer_cfg(B, label_B)[0][:, : self._seen(exit_num - 1)]

    def _seen(self, scale):
        return sum(n * n for n in self.patch_nums[: scale + 1])

    @torch.no_grad()
    def autoregressive_infer_cfg_refine(self, B, label_B, words_BLE, entry_num):
        """Logits: of the masked prefix (scales 0..entry_num), then of each scale after it."""
        cond, position = self.class_emb(label_B), self.lvl_embed(self.lvl_1L) + self.pos_1LC
        start = cond.unsqueeze(1) + self.pos_start
        x_BLC = torch.cat((start, self.word_embed(words_BLE)), 1) + position
        shared, logits, begin = self.shared_ada_lin(cond), [], 0
        for block in self.blocks:
            block.attn.kv_caching(True)
        for scale in range(entry_num, len(self.patch_nums)):
            end = self._seen(scale)
            bias = self.attn_bias_for_masking[:, :, :end, :end] if begin == 0 else None
            x = x_BLC[:, begin:end]
            for block in self.blocks:
                x = block(x=x, cond_BD=shared, attn_bias=bias)
            logits.append(self.get_logits(x, cond))
            begin = end
        for block in self.blocks:
            block.attn.kv_caching(False)
        return torch.cat(logits, 1)


def lookalike(kind=LookalikeVAR, seed=0, **options):
    """In eval mode, with weights that make tokens differ."""
    torch.manual_seed(seed)
    model = kind(**options)
    with torch.no_grad():
        model.head.weight.mul_(4)
    return model.eval()


class PictureVAR(LookalikeVAR):
    """``autoregressive_infer_cfg`` returns pictures, as the original's does."""

    def __init__(self, vae, **options):
        super().__init__(**options)
        object.__setattr__(self, "vae", vae)  # no part of the state dict

    def autoregressive_infer_cfg(self, B, label_B, **options):
        options.pop("top_p", None)
        tokens, _ = super().autoregressive_infer_cfg(B, label_B, **options)
        return self.vae.decode(tokens)


def build_vae_var(device, depth, sides=(1, 2, 3), num_classes=5):
    """(VQ-VAE, VAR), as the original's builder returns them.

    The original disables ``reset_parameters`` of convolutions, so that theirs are uninitialised
    memory until a checkpoint is loaded; here they are NaN.
    """
    torch.manual_seed(0)
    config = VQVAEConfig(
        vocab_size=24,
        z_channels=8,
        ch=32,
        ch_mult=(1, 1),
        num_res_blocks=1,
        patch_nums=sides,
    )
    vae = VQVAE(config)
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            for parameter in module.parameters():
                nn.init.constant_(parameter, math.nan)
    kind = partial(PictureVAR, vae)
    var = lookalike(kind, sides=sides, vocab=24, depth=depth, num_classes=num_classes)
    return vae.to(device), var.to(device)
