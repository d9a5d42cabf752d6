"""Small layers shared by the language model and the drafters."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """[..., size] -> the same: x / rms(x) in fp32, cast back, then times the weight (the order matters in bf16)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if quick(x) and self.weight.dtype == torch.float32:
            return torch.addcmul(_number(0.0), x, self.weight, value=x.shape[-1] ** 0.5).div_(root_of_squares(x, self.eps))
        wide = x.float()
        training = x.is_cuda and self.weight.dtype == torch.float32 and torch.is_grad_enabled()
        if training or x.dtype == self.weight.dtype == torch.float32:  # one call in place of six
            return F.rms_norm(wide, self.weight.shape, self.weight, self.eps)
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def quick(x: Tensor) -> bool:
    """Whether this is fp32 inference on a CPU, where calling small operations takes longer than their arithmetic."""
    served = x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_grad_enabled()
    return served and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()


def root_of_squares(x: Tensor, eps: float) -> Tensor:
    """sqrt(D) rms(x) = sqrt(sum of x^2 + D eps), x [..., D] -> [..., 1], in two calls; PyTorch's rms_norm makes nine on a CPU."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(_number((x.shape[-1] * eps) ** 0.5))


@lru_cache
def _number(value: float) -> Tensor:
    """A constant on the CPU, made once: whatever grad mode, default dtype and device hold at its first use must not stick to it."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=torch.float32, device="cpu")


class MLP(nn.Module):
    """SwiGLU without biases (Shazeer 2020), [..., size] -> the same: W_down (silu(W_gate x) * W_up x)."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def embedding(rows: int, size: int) -> nn.Embedding:
    """An uninitialised table: PyTorch's own initialisation on the meta device imports its compiler, which costs seconds of start-up."""
    return nn.Embedding(rows, size, _weight=torch.empty(rows, size))


def rope_table(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """RoPE (Su et al. 2021): cos and sin [B, S, 1, D] of positions [B, S], in fp32; sin has the sign that `rotate` needs in each half."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angle = positions.float()[..., None, None] * frequency  # [B, S, 1, D/2]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=-1).to(dtype), torch.cat([-sin, sin], dim=-1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half RoPE of x [B, S, H, D] = [a | b]: [a cos - b sin | b cos + a sin]."""
    other = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos, other, sin) if quick(x) else x * cos + other * sin


def sincos_table(side: int, size: int) -> Tensor:
    """Fixed 2-D table [side * side, size]: the first half of the channels encodes the column, the second the row, each as [sin | cos]."""

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
