"""A small VQ-VAE built like the original's around its quantiser, our own code.

Only the quantiser differs from our VQ-VAE: its settings are attributes of its objects.

Axes: B images, C codebook width, H W feature map, N tokens of one scale.
"""

import torch
from torch import nn
from torch.nn import functional as F

from variant.models.config import VQVAEConfig
from variant.models.quantizer import residual_conv_of_scale
from variant.models.vqvae import Decoder, Encoder


class Phi(nn.Conv2d):
    def __init__(self, channels, quant_resi):
        super().__init__(channels, channels, kernel_size=3, padding=1)
        self.resi_ratio = abs(quant_resi)

    def forward(self, h):
        return h * (1 - self.resi_ratio) + super().forward(h) * self.resi_ratio


class Shared(nn.Module):
    def __init__(self, convs):
        super().__init__()
        self.qresi = convs[0]

    def __getitem__(self, position):
        return self.qresi


class PartlyShared(nn.Module):
    def __init__(self, convs, num_scales):
        super().__init__()
        self.qresi_ls = nn.ModuleList(convs)
        self.num_scales = num_scales

    def __getitem__(self, position):
        of_scale = residual_conv_of_scale(self.num_scales, len(self.qresi_ls))
        return self.qresi_ls[of_scale[round(position * (self.num_scales - 1))]]


class NotShared(nn.ModuleList):
    def __getitem__(self, position):
        return super().__getitem__(round(position * (len(self) - 1)))


class Quantizer(nn.Module):
    def __init__(self, vocab, channels, sides, quant_resi, share_quant_resi, using_znorm, beta):
        super().__init__()
        self.vocab_size, self.Cvae, self.v_patch_nums = vocab, channels, sides
        self.quant_resi_ratio, self.using_znorm, self.beta = quant_resi, using_znorm, beta

        def conv():
            return Phi(channels, quant_resi) if abs(quant_resi) > 1e-6 else nn.Identity()

        convs = [conv() for _ in range(share_quant_resi or len(sides))]
        if share_quant_resi == 0:
            self.quant_resi = NotShared(convs)
        elif share_quant_resi == 1:
            self.quant_resi = Shared(convs)
        else:
            self.quant_resi = PartlyShared(convs, len(sides))
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(sides), vocab))
        self.embedding = nn.Embedding(vocab, channels)

    def contribution(self, tokens_BN, k):
        last, side = len(self.v_patch_nums) - 1, self.v_patch_nums[k]
        h = self.embedding(tokens_BN).mT.unflatten(-1, (side, side))
        if k != last:
            h = F.interpolate(h, size=(self.v_patch_nums[-1],) * 2, mode="bicubic")
        return self.quant_resi[k / last](h)

    def get_next_autoregressive_input(self, k, num_scales, f_hat, h_BCHW):
        f_hat = f_hat + self.quant_resi[k / (num_scales - 1)](h_BCHW)
        side = self.v_patch_nums[min(k + 1, num_scales - 1)]
        return f_hat, F.interpolate(f_hat, size=(side, side), mode="area")


class LookalikeVQVAE(nn.Module):
    def __init__(
        self,
        sides=(1, 2, 3),
        vocab=24,
        channels=8,
        quant_resi=0.5,
        share_quant_resi=2,
        using_znorm=False,
        beta=0.25,
    ):
        super().__init__()
        config = VQVAEConfig(
            vocab, channels, 32, ch_mult=(1, 1), num_res_blocks=1, patch_nums=sides
        )
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.quantize = Quantizer(
            vocab, channels, sides, quant_resi, share_quant_resi, using_znorm, beta
        )
        self.requires_grad_(False)

    @torch.no_grad()
    def decode(self, tokens_BL):
        sides = self.quantize.v_patch_nums
        parts = tokens_BL.split([side * side for side in sides], dim=1)
        f_hat = sum(self.quantize.contribution(part, k) for k, part in enumerate(parts))
        return self.fhat_to_img(f_hat) / 2 + 0.5

    def fhat_to_img(self, f_hat):
        return self.decoder(self.post_quant_conv(f_hat)).clamp(-1, 1)

    @torch.no_grad()
    def encode(self, images):
        rest, tokens = self.quant_conv(self.encoder(images)), []
        codes = self.quantize.embedding.weight
        for k, side in enumerate(self.quantize.v_patch_nums):
            small = rest
            if side != rest.shape[-1]:
                small = F.interpolate(rest, size=(side, side), mode="area")
            vectors = small.permute(0, 2, 3, 1).flatten(1, 2)
            if self.quantize.using_znorm:
                found = (F.normalize(vectors, dim=-1) @ F.normalize(codes, dim=-1).T).argmax(-1)
            else:
                found = torch.cdist(vectors, codes.expand(len(vectors), -1, -1)).argmin(-1)
            rest = rest - self.quantize.contribution(found, k)
            tokens.append(found)
        return torch.cat(tokens, 1)


def lookalike_vqvae(seed=0, **options):
    """In eval mode, with codes that make images differ."""
    torch.manual_seed(seed)
    return LookalikeVQVAE(**options).eval()
