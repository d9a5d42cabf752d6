"""What this machine's processors can do: fast bf16 or not, a clock that waits for the GPU, which devices are usable."""

from __future__ import annotations

import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from hyperbagel.core.errors import InputError

_agreed: list[bool] = []  # the CPU's answer if `agree_on_bf16` was called, else empty


def fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products are faster than fp32 ones here: always on CUDA, on a CPU if a measurement says so.

    A CPU's flags do not tell: with AVX512-bf16 one machine multiplied bf16 three times as fast as fp32, another half as fast.
    """
    if device.type == "cuda":
        return True
    if _agreed:
        return _agreed[0]
    has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return has and _cpu_multiplies_bf16_faster()


def agree_on_bf16(fast: bool) -> None:
    """Fixes the CPU's answer for this process: processes that train together must choose alike, and each would measure for itself."""
    _agreed[:] = [fast]


@cache
def _cpu_multiplies_bf16_faster(side: int = 512, runs: int = 5) -> bool:
    """Measured once per process: the fastest run of each dtype, alternating so that other load hits both; bf16 must win clearly."""
    sides = {dtype: torch.ones(side, side, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(runs + 1):  # the first one warms up
        for dtype, x in sides.items():
            start = time.perf_counter()
            x @ x
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best[torch.bfloat16] < 0.7 * best[torch.float32]


def clock(device: torch.device) -> float:
    """Seconds on a monotonic clock, once all work queued on the device is done: CUDA calls return before anything is computed."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def usable_device(name: str | None) -> torch.device:
    """The device of that name; None: a GPU if there is one, else the CPU. Raises InputError for a device that cannot be used here."""
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


def free_bytes(device: torch.device, root: Path = Path("/")) -> int | None:
    """Memory that this process could still take on a device; None where that is not known (a CPU's without Linux, other devices).

    Of a CPU: what Linux calls available, and swap; in a container no more than its own limit (cgroup v2) leaves. root: of the file system.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu":
        return None
    try:
        lines = (line.split() for line in (root / "proc/meminfo").read_text().splitlines())
        told = {line[0]: 1024 * int(line[1]) for line in lines if len(line) > 1}
        free = told["MemAvailable:"] + told.get("SwapFree:", 0)
    except (OSError, ValueError, KeyError):
        return None
    with suppress(OSError, ValueError, KeyError):  # "max": no limit
        group = root / "sys/fs/cgroup"
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        files = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["inactive_file"]  # given back on demand
        free = min(free, limit - used + int(files))
    return free


def check_room(what: str, device: torch.device, needed: float, do: str = "") -> None:
    """Raises InputError if so many bytes are not free: a system may end a process that takes more than there is. do: advice before the
    general one."""
    free = free_bytes(device)
    if free is not None and needed > free:
        told = f"got {free / 1e9:.1f} GB of free memory on {device}, expected {needed / 1e9:.1f} GB"
        raise InputError(f"{what}: {told}, {do}free some memory or take a larger machine")
