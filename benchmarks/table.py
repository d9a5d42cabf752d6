"""The figures of benchmarks.run as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def show(found: dict[str, Any]) -> str:
    """A run's results as text: the machine, its rates, a line per operation, and what is missing."""
    hardware, shape = found["hardware"], found["shape"]
    lines = [
        f"{shape['name']}: {shape['parameters']:,} parameters in {shape['tensors']:,} tensors, {shape['dtype']}",
        f"weights: {shape['weights']}",
        f"{hardware.get('gpu', hardware['processor'])}, {hardware['threads']} CPU thread(s), load {hardware['load_average']} at the start",
    ]
    rows: list[tuple[str, ...]]
    if "rates" in found:
        rates = found["rates"]
        lines.append(
            f"copy {rates['copy_bytes_per_second'] / 1e9:,.1f} GB/s, matmul {rates['matmul_flops_per_second'] / 1e12:,.3f} TFLOP/s "
            f"({rates['matmul']['dtype']}, {rates['matmul']['side']}^3)"
        )
        rows = [
            (
                f["name"],
                _number(f["milliseconds"]["median"]),
                f"{_number(f['milliseconds']['low'])} .. {_number(f['milliseconds']['high'])}",
                str(f["runs"]),
                f"{f['fraction']:.1%} of {f['bound']}",
                _number(f["tokens_per_second"]) if "tokens_per_second" in f else "",
            )
            for f in found["figures"]
        ]
        lines += _columns(("operation", "ms", "10 .. 90 %", "runs", "of the rate", "tok/s"), rows)
    else:
        rows = [
            (f["name"], f"{f['flops'] / 1e12:,.3f}", f"{f['flops_counted'] / 1e12:,.3f}", f"{f['bytes'] / 1e9:,.2f}")
            for f in found["figures"]
        ]
        lines += _columns(("operation", "TFLOP", "counted", "GB"), rows)
    lines += [f"left out, no time: {name}" for name in found["left_out"]]
    lines += [f"FAILED {item['name']}: {item['error']}" for item in found["failed"]]
    if found["note"]:
        lines.append(f"note: {found['note']}")
    return "\n".join(lines)


def _number(value: float) -> str:
    """Three significant digits; from 100 on a whole number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))) for row in (head, *rows)]
