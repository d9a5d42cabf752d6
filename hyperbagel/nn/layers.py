"""Small layers shared by the language model and the drafters."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, cast back, then times the weight (the order matters in bf16)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        training = x.is_cuda and self.weight.dtype == torch.float32 and torch.is_grad_enabled()
        if training or x.dtype == self.weight.dtype == torch.float32:  # one call in place of six
            return F.rms_norm(wide, self.weight.shape, self.weight, self.eps)
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class MLP(nn.Module):
    """SwiGLU, no biases."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def store_by_columns(module: nn.Module) -> None:
    """Stores the fp32 weights of all linear layers on a CPU by columns, in place: same shapes, same values, other strides. For inference.

    x W^T then reads W as it lies. By rows it is packed anew in every product, which costs most where a product has few rows: 2.4 to 1.4 ms
    for all products of the embedded model with 11 rows (a verified draft), 7.2 to 4.8 with 64 (a picture's latents), the same with one
    (AVX512, one thread). One layer at a time, so a memory-mapped model never lies in memory twice.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32:
            layer.weight.data = layer.weight.data.t().contiguous().t()


def embedding(rows: int, size: int) -> nn.Embedding:
    """A table without values: PyTorch's own initialisation on the meta device imports its compiler, seconds of start-up for nothing."""
    return nn.Embedding(rows, size, _weight=torch.empty(rows, size))


def rope_table(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin for positions [B, S], each [B, 1, S, D]. Computed in fp32."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angle = positions.float().unsqueeze(-1) * frequency  # [B, S, D/2]
    angle = torch.cat([angle, angle], dim=-1).unsqueeze(1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half RoPE on x [B, H, S, D]."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def sincos_table(side: int, size: int) -> Tensor:
    """Fixed 2-D table [side * side, size]: first half of the channels is the column, second half the row, each [sin | cos]."""

    def one(position: Tensor, channels: int) -> Tensor:
        omega = 1e4 ** (-torch.arange(channels // 2, dtype=torch.float64) / (channels / 2))
        angle = position.double().unsqueeze(-1) * omega
        return torch.cat([angle.sin(), angle.cos()], dim=-1)

    index = torch.arange(side * side)
    return torch.cat([one(index % side, size // 2), one(index // side, size // 2)], dim=-1).float()


class TimestepEmbedder(nn.Module):
    """t in [0, 1], unscaled -> 256 sinusoids -> Linear-SiLU-Linear."""

    frequencies = 256

    def __init__(self, size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.frequencies, size), nn.SiLU(), nn.Linear(size, size))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.mlp.parameters()).dtype

    def forward(self, t: Tensor) -> Tensor:
        """t [...] -> [..., size]."""
        half = self.frequencies // 2
        f = torch.exp(-math.log(1e4) / half * torch.arange(half, device=t.device, dtype=torch.float32))
        angle = t.float().unsqueeze(-1) * f
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.dtype))
