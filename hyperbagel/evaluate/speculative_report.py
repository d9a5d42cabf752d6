"""The results of the speculative evaluation: its cells as tables for people, and one document for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from hyperbagel.evaluate.records import Record
from hyperbagel.evaluate.report import table_console

SHOWN = 6  # depths of the acceptance column


def summarise(header: dict[str, Any], records: Sequence[Record]) -> dict[str, Any]:
    """{"plan": ..., "acceptance": [cells], "speed": [cells]}."""
    told = [{k: v for k, v in record.items() if k != "id"} for record in records]
    return header | {"acceptance": [r for r in told if not r["batch"]], "speed": [r for r in told if r["batch"]]}


def print_tables(result: dict[str, Any], console: Console | None = None) -> None:
    console = console or table_console()
    for cell in result["acceptance"]:
        title = f"{_where(cell)}: acceptance, {cell['tokens']} tokens, entropy {cell['entropy']:.3f} nats a token"
        table = Table("drafter", "drafts", "tau", "alpha", f"acceptance at depth 1 ... {SHOWN}", title=title, title_justify="left")
        for name, row in cell["rows"].items():
            rates = " ".join(f"{rate:.2f}" for rate in row["rates"][:SHOWN])
            table.add_row(name, str(row["depth"]), f"{row['tau']:.3f}", "" if row["alpha"] is None else f"{row['alpha']:.4f}", rates)
        console.print(table)
    for cell in result["speed"]:
        table = Table(
            "decoding", "tok/s", "speed-up", "tau", "draft", "verify", "commit", "host", "drafted", "equal",
            title=f"{_where(cell)}, batch {cell['batch']}: speed, milliseconds a round", title_justify="left",
        )  # fmt: skip
        for name, row in cell["rows"].items():
            rate = f"{row['tok_per_second']:.0f} [{row['low']:.0f} {row['high']:.0f}]"
            gain = f"{row['speedup']:.2f} [{row['speedup_low']:.2f} {row['speedup_high']:.2f}]"
            ms = [f"{row['ms'][part]:.2f}" for part in ("draft", "verify", "commit", "host")] if "ms" in row else [""] * 4
            # rounds are counted per row, drafts per call
            drafted = ", ".join(f"{who} {n}" for who, n in row.get("drafted", {}).items() if n)
            equal = f"{row['identical']}/{cell['answers']}" if "identical" in row else ""
            table.add_row(name, rate, gain, f"{row['tau']:.2f}" if "tau" in row else "", *ms, drafted, equal)
        console.print(table)
    console.print("Speed-up: over plain decoding with the same kernels and threads, of the same repeat; median, lowest and highest.")


def _where(cell: Record) -> str:
    return f"{cell['split'].replace('_', ' ')}, T = {cell['temperature']:g}"
