"""Timing over many runs: median and spread, by CUDA events on a GPU and perf_counter on a CPU."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds per run: median, 10th and 90th percentile, fastest."""

    median: float
    low: float
    high: float
    fastest: float
    runs: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        ordered = sorted(seconds)

        def at(share: float) -> float:
            return ordered[round(share * (len(ordered) - 1))]

        return cls(statistics.median(ordered), at(0.1), at(0.9), ordered[0], len(ordered))


def measure(call: Callable[[], Any], device: torch.device, *, seconds: float, warmup: int = 3, most: int = 200) -> Timing:
    """Runs `call` `warmup` times (at least once), then as often as fits into `seconds`: at least three and at most `most` times.

    On a GPU the runs are queued one after the other, as a sampler's steps are, and timed by events between them.
    """
    for _ in range(warmup - 1):
        call()
    wait(device)
    start = time.perf_counter()
    call()  # the last call of the warm-up tells how many runs fit
    wait(device)
    each = time.perf_counter() - start
    runs = max(3, min(most, int(seconds / each)))
    if device.type != "cuda":
        return Timing.of([_clocked(call) for _ in range(runs)])
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    wait(device)
    return Timing.of([a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)])


def _clocked(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_rates(device: torch.device, dtype: torch.dtype, seconds: float, *, side: int, elements: int) -> dict[str, Any]:
    """The device's best rates, as a yardstick for the figures: bytes/s of a copy (read and written), FLOP/s of a square matmul.

    With random data: constant data draw less power and run faster than any model will.
    """
    copy, matmul = _copy(device, dtype, seconds, elements), _matmul(device, dtype, seconds, side)
    moved = 2 * elements * dtype.itemsize
    return {
        "copy_bytes_per_second": moved / copy.median,
        "copy": {"bytes": moved, **vars(copy)},
        "matmul_flops_per_second": 2 * side**3 / matmul.median,
        "matmul": {"side": side, "dtype": str(dtype).removeprefix("torch."), **vars(matmul)},
    }


def _copy(device: torch.device, dtype: torch.dtype, seconds: float, elements: int) -> Timing:
    source = torch.randn(elements, device=device, dtype=dtype, generator=torch.Generator(device).manual_seed(0))
    target = torch.empty_like(source)
    return measure(lambda: target.copy_(source), device, seconds=seconds)


def _matmul(device: torch.device, dtype: torch.dtype, seconds: float, side: int) -> Timing:
    a, b = torch.randn(2, side, side, device=device, dtype=dtype, generator=torch.Generator(device).manual_seed(0))
    out = torch.empty_like(a)
    return measure(lambda: torch.mm(a, b, out=out), device, seconds=seconds)


def machine(device: torch.device) -> dict[str, Any]:
    """The hardware that figures were taken on, and how busy it is."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "gpu_processors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def _processor() -> str:
    """The CPU's model name, which Linux gives in /proc."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
