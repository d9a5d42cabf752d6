"""The distillation table, printed for people; report.json has all figures."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from hyperbagel.evaluate.report import table_console
from hyperbagel.evaluate.wall_clock import IN_TURN


def print_table(result: dict[str, Any], console: Console | None = None) -> None:
    """Scores with paired differences to the teacher, categories, seconds, steering, and the rows that were left out."""
    console = console or table_console()
    rows = result["rows"]
    console.print(_scores(rows))
    console.print(_categories(rows))
    for part, seconds in result.get("wall_clock", {}).items():
        console.print(_seconds(part, seconds, rows, result["machine"]))
    if any("steer" in row for row in rows.values()):
        console.print(_steering(rows))
    if result["left_out"]:
        console.print(f"left out, no student given: {', '.join(result['left_out'])}")
    console.print(
        "Differences to the teacher are paired by prompt, seed and noise, in points, with 95 % intervals; * marks a lower bound "
        "above -1.5. Diversity: how far apart four pictures of one prompt are, in scene graphs; below the teacher's is collapse."
    )


def _scores(rows: dict[str, Any]) -> Table:
    table = Table("", "NFE", "T2I", "strict", "difference", "edits NFE", "success", "difference", "O", "diversity", title="Same prompts, same noise", title_justify="left")  # fmt: skip  # noqa: E501
    for row in rows.values():
        difference = row["differences"]
        table.add_row(
            row["title"],
            f"{row['t2i_nfe']:g}" if "t2i" in row else "",
            _mean(row, "t2i", "plain"),
            _mean(row, "t2i", "strict"),
            _points(difference.get("t2i strict")),
            f"{row['edits_nfe']:g}" if "edits" in row else "",
            _mean(row, "edits", "success"),
            _points(difference.get("edits success")),
            _mean(row, "edits", "O of 10", 2),
            _mean(row, "diversity", "differ in scene"),
        )
    return table


def _mean(row: dict[str, Any], part: str, column: str, places: int = 3) -> str:
    return f"{row[part][column]['overall']['mean']:.{places}f}" if part in row else ""


def _points(value: dict[str, Any] | None) -> str:
    """`-0.3 [-1.2 0.5] *`."""
    if value is None:
        return ""
    mean, low, high = (f"{100 * value[k]:+.1f}" for k in ("mean", "low", "high"))
    return f"{mean} [{low} {high}]{' *' if value['lossless'] else ''}"


def _categories(rows: dict[str, Any]) -> Table:
    table = Table("strict", title="By category and by group of edits", title_justify="left")
    parts = [(part, column) for part, column in (("t2i", "strict"), ("edits", "success")) if any(part in row for row in rows.values())]
    names = [(part, column, name) for part, column in parts for name in next(iter(rows.values()))[part][column] if name != "overall"]
    for _, _, name in names:
        table.add_column(name)
    for row in rows.values():
        table.add_row(row["title"], *(f"{row[part][column][name]['mean']:.2f}" for part, column, name in names))
    return table


def _seconds(part: str, seconds: dict[str, Any], rows: dict[str, Any], machine: dict[str, Any]) -> Table:
    where = f"{machine['device']}, {machine['dtype']}, {machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    title = f"One picture end to end: {part} ({where})"
    table = Table("", "ms (quarters)", "x teacher in turn", "x teacher batched", title=title, title_justify="left")
    for name, value in seconds.items():
        table.add_row(
            rows[name]["title"] if name in rows else IN_TURN,
            f"{1000 * value['seconds']:.0f} [{1000 * value['low']:.0f} {1000 * value['high']:.0f}]",
            *(f"{value[k]:.1f}" if k in value else "" for k in ("faster than in turn", "faster than batched")),
        )
    return table


def _steering(rows: dict[str, Any]) -> Table:
    names = list(dict.fromkeys(name for row in rows.values() for name in row.get("steer", {})))
    table = Table("rms of pixels", *names, title="Text scale 1 to 5, image scale 1 to 2.5: does it move the picture?", title_justify="left")
    for row in rows.values():
        table.add_row(row["title"], *(f"{row['steer'][n]['mean']:.3f}" if n in row.get("steer", {}) else "" for n in names))
    return table
