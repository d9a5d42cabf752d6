"""The FLUX autoencoder as BAGEL uses it, keys equal to ae.safetensors.

Shape legend: B pictures, H x W pixels, h x w = H/f x W/f latent cells, Z latent channels (16).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperbagel.model.config import VaeConfig


class ResBlock(nn.Module):
    """Two 3 x 3 convolutions, each after a group norm and SiLU: [B, c_in, h, w] -> [B, c_out, h, w]."""

    def __init__(self, c_in: int, c_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttnBlock(nn.Module):
    """Single-head attention over all cells, [B, c, h, w] -> the same."""

    def __init__(self, c: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.q = nn.Conv2d(c, c, 1)
        self.k = nn.Conv2d(c, c, 1)
        self.v = nn.Conv2d(c, c, 1)
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        # [B, c, h, w] -> [B, 1, h*w, c]
        q, k, v = (conv(n).flatten(2).transpose(1, 2).unsqueeze(1) for conv in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(out.squeeze(1).transpose(1, 2).reshape_as(x))


class Resample(nn.Module):
    """Halves the resolution (asymmetric padding, as in FLUX) or doubles it (nearest neighbour, then a convolution)."""

    def __init__(self, c: int, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(c, c, 3, padding=1) if up else nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Mid(nn.Module):
    def __init__(self, c: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(c, c, groups)
        self.attn_1 = AttnBlock(c, groups)
        self.block_2 = ResBlock(c, c, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The residual blocks of one resolution, then the step to the next one, if any. resample: "down", "up" or None."""

    def __init__(self, c_in: int, c_out: int, blocks: int, groups: int, resample: str | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(blocks))
        self.downsample = Resample(c_out, up=False) if resample == "down" else None
        self.upsample = Resample(c_out, up=True) if resample == "up" else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        step = self.downsample or self.upsample
        return x if step is None else step(x)


class Encoder(nn.Module):
    def __init__(self, cfg: VaeConfig) -> None:
        super().__init__()
        widths = [cfg.ch * m for m in cfg.ch_mult]
        self.conv_in = nn.Conv2d(cfg.in_channels, cfg.ch, 3, padding=1)
        self.down = nn.ModuleList(
            Level(([cfg.ch, *widths])[i], widths[i], cfg.num_res_blocks, cfg.norm_groups, "down" if i < len(widths) - 1 else None)
            for i in range(len(widths))
        )
        self.mid = Mid(widths[-1], cfg.norm_groups)
        self.norm_out = nn.GroupNorm(cfg.norm_groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * cfg.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    def __init__(self, cfg: VaeConfig) -> None:
        super().__init__()
        widths = [cfg.ch * m for m in cfg.ch_mult]
        self.conv_in = nn.Conv2d(cfg.z_channels, widths[-1], 3, padding=1)
        self.mid = Mid(widths[-1], cfg.norm_groups)
        # Levels are numbered by resolution, finest first, and run from the last to the first.
        self.up = nn.ModuleList(
            Level(widths[min(i + 1, len(widths) - 1)], widths[i], cfg.num_res_blocks + 1, cfg.norm_groups, "up" if i > 0 else None)
            for i in range(len(widths))
        )
        self.norm_out = nn.GroupNorm(cfg.norm_groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], cfg.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class AutoEncoder(nn.Module):
    """Pictures [B, 3, H, W] in [-1, 1] <-> latents [B, Z, h, w], shifted and scaled."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the raw posterior, each [B, Z, h, w]."""
        mean, logvar = self.encoder(x).chunk(2, dim=1)
        return mean, logvar

    def decode_raw(self, z_raw: Tensor) -> Tensor:
        """Raw (unscaled) latents to pictures."""
        return self.decoder(z_raw)

    def encode(self, x: Tensor, eps: Tensor) -> Tensor:
        """z = (mean + std * eps - shift) * scale. BAGEL samples the posterior at inference too: eps ~ N(0, 1), [B, Z, h, w]."""
        mean, logvar = self.moments(x)
        sample = mean + torch.exp(0.5 * logvar) * eps
        return (sample - self.config.shift_factor) * self.config.scale_factor

    def decode(self, z: Tensor) -> Tensor:
        """Inverse of the scaling, then the decoder: [B, Z, h, w] -> [B, 3, H, W]."""
        return self.decode_raw(z / self.config.scale_factor + self.config.shift_factor)


def unpatchify(tokens: Tensor, h: int, w: int, p: int) -> Tensor:
    """Inverse of `data.transforms.patchify`: tokens [B, h*w, p*p*Z], ordered (row, column, channel) within a token, to [B, Z, h*p, w*p]."""
    b, _, n = tokens.shape
    c = n // (p * p)
    return tokens.reshape(b, h, w, p, p, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, h * p, w * p)
