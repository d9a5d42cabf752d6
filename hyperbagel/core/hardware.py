"""What the processor at hand is good at."""

from __future__ import annotations

import time

import torch


def fast_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16: CUDA, and CPUs with AVX512-bf16 or AMX. Elsewhere bf16 is slower than fp32."""
    return device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def clock(device: torch.device) -> float:
    """Seconds, with all work that was asked of the device done: a GPU's calls return before it has computed anything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
