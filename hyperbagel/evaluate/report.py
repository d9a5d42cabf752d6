"""The results of an evaluation: tables for people, a JSON file for programs, and paired differences between two evaluations."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hyperbagel.core.errors import InputError
from hyperbagel.core.files import atomic_write_text
from hyperbagel.evaluate.records import read_header, read_records
from hyperbagel.evaluate.statistics import paired_difference
from hyperbagel.evaluate.summary import question_units

LOSSLESS = -0.015  # a student counts as lossless if the lower 95 % bound of its paired difference, as a share, is above this
# for each part: the figure of a record that is compared, the factor that makes it a share, and the key that its table's rows go by
FIGURES = {"t2i": ("strict", 1.0, "category"), "edits": ("o", 0.1, "group"), "questions": ("score", 1.0, "kind")}

TITLES = {"t2i": "Pictures from prompts", "diversity": "Pictures of one prompt", "edits": "Edits", "questions": "Questions"}


def table_console() -> Console:
    """A console as wide as the terminal or, if the output is none (a file, a pipe), wide enough for every table."""
    return Console(width=None if sys.stdout.isatty() else 180)


def print_report(result: dict[str, Any], console: Console | None = None) -> None:
    """Print the result of `run_toybox_eval` as tables: each part with its 95 % intervals, then the detector's own table."""
    console = console or table_console()
    for part, title in TITLES.items():
        if part in result:
            console.print(_part_table(title, result["settings"]["split"], result[part]))
    console.print(_detector_table(result["detector"]))
    console.print(
        "Shares compare models on one measure; they say nothing of absolute picture quality. 'strict' also asks that the scene which was "
        "read, drawn again, resembles the picture."
    )


def write_report(result: dict[str, Any], path: Path) -> dict[str, Any]:
    """Write the result as JSON, whole or not at all, its figures to six digits. Returns what was written."""
    result = _rounded(result)
    atomic_write_text(path, json.dumps(result, indent=1, sort_keys=True) + "\n")
    return result


def _rounded(value: Any) -> Any:
    """The same value with its numbers to six digits."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def compare_evaluations(ours: Path, theirs: Path) -> dict[str, Any]:
    """Paired differences (ours - theirs, as shares) in `overall` between two evaluation folders, bootstrapped over prompts.

    `lossless`: whether the lower 95 % bound is above -1.5 points. Raises InputError if a part was evaluated on different items.
    """
    table: dict[str, Any] = {}
    for part, (figure, scale, row) in FIGURES.items():
        paths = (ours / f"{part}.jsonl", theirs / f"{part}.jsonl")
        sets = [_item_set(read_header(path)) for path in paths if path.is_file()]
        if len(sets) == 2 and sets[0] != sets[1]:
            raise InputError(f"{paths[0]} and {paths[1]}: got items {sets[0]} and {sets[1]}, expected one set; evaluate both on the same")
        found = [question_units(r) if part == "questions" else r for r in map(read_records, paths)]
        a, b = ({r["id"]: scale * float(r[figure]) for r in records} for records in found)
        if a or b:
            estimate = paired_difference(a, b, groups={r["id"]: r[row] for records in found for r in records})
            table[part] = estimate.to_dict() | {"lossless": estimate.low > LOSSLESS}
    if not table:
        raise InputError(f"got no records in {ours} and {theirs}, expected two folders of finished evaluations; run them first")
    return table


def _item_set(header: dict[str, Any]) -> dict[str, Any]:
    """The part of a header that identifies the set of items; equal ids mean equal prompts only within one set."""
    return {"n": header["n"]} | {k: header["settings"][k] for k in ("split", "seed", "side")}


def _part_table(title: str, split: str, part: dict[str, dict[str, Any]]) -> Table:
    table = Table("", "n", *part, title=f"{title} ({split} split)", title_justify="left")
    for row in _union(part.values()):
        number = max(column[row]["n"] for column in part.values() if row in column)
        # a wide table shows intervals in its first two columns only, so that it fits a terminal; the JSON has them all
        table.add_row(row, str(number), *(_cell(c.get(row), interval=len(part) <= 3 or i < 2) for i, c in enumerate(part.values())))
    return table


def _cell(value: dict[str, float] | None, *, interval: bool) -> str:
    """A mean with its 95 % interval: `0.873 [0.851 0.894]` for shares, fewer decimals for larger figures."""
    if value is None:
        return ""
    places = 3 if value["high"] <= 1 else 2 if value["high"] <= 10 else 1
    mean, low, high = (f"{value[k]:.{places}f}" for k in ("mean", "low", "high"))
    return f"{mean} [{low} {high}]" if interval else mean


def _detector_table(table: dict[str, dict[str, float]]) -> Table:
    shown = Table("", *table, title="The detector itself, on drawings", title_justify="left")
    for row in _union(table.values()):
        shown.add_row(row, *(f"{column[row]:.4f}" if row in column else "" for column in table.values()))
    return shown


def _union(columns: Iterable[dict[str, Any]]) -> list[str]:
    """The row names of all columns, in order of first appearance."""
    return list(dict.fromkeys(row for column in columns for row in column))
