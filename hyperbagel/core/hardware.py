"""What the processor at hand is good at."""

from __future__ import annotations

import time
from functools import cache

import torch

from hyperbagel.core.errors import InputError


def fast_bf16(device: torch.device) -> bool:
    """Whether bf16 products are faster here than fp32 ones: on CUDA, and on a CPU where they were measured to be.

    The processor's flags do not tell: with AVX512-bf16 one machine multiplied bf16 three times as fast as fp32, another half as fast.
    """
    if device.type == "cuda":
        return True
    if _agreed:
        return _agreed[0]
    has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return has and _cpu_multiplies_bf16_faster()


_agreed: list[bool] = []


def agree_on_bf16(fast: bool) -> None:
    """From here on this is the answer for the CPU: processes that train together must choose alike, and each would measure for itself."""
    _agreed[:] = [fast]


@cache
def _cpu_multiplies_bf16_faster(side: int = 512, runs: int = 5) -> bool:
    """Measured once a process: the fastest run of each, in turns so that other work on the machine meets both, and a clear lead."""
    sides = {dtype: torch.ones(side, side, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(runs + 1):  # the first one warms up
        for dtype, x in sides.items():
            start = time.perf_counter()
            x @ x
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best[torch.bfloat16] < 0.7 * best[torch.float32]


def clock(device: torch.device) -> float:
    """Seconds, with all work that was asked of the device done: a GPU's calls return before it has computed anything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def usable_device(name: str | None) -> torch.device:
    """The device of that name; None: a GPU if there is one. Raises InputError for what cannot be used here."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"got device {name!r}, which cannot be used here ({reason}); try --device cpu") from error
    if device.type == "meta" or (device.type == "cpu" and device.index):  # torch takes both, but no weights can be read there
        raise InputError(f"got device {name!r}, expected cpu, cuda or cuda:N; there is one cpu, try --device cpu")
    return torch.device("cpu") if device.type == "cpu" else device
