"""From the records of single items to figures with intervals.

A part becomes {column: {row: interval}}. Rows are categories, groups or kinds, and `overall`, the unweighted mean over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hyperbagel.evaluate.questions import DENSE
from hyperbagel.evaluate.records import Record
from hyperbagel.evaluate.statistics import bootstrap_groups, bootstrap_mean, wilson
from hyperbagel.toybox.captions import CATEGORIES
from hyperbagel.toybox.edits import GROUPS


def summarise_t2i(records: Sequence[Record]) -> dict[str, Any]:
    """{"plain": {category: interval, ..., "overall": interval}, "strict": ..., "re-render PSNR, dB": ...}."""
    return {
        "plain": _shares(records, "category", "plain", CATEGORIES),
        "strict": _shares(records, "category", "strict", CATEGORIES),
        "re-render PSNR, dB": _means(records, "category", "psnr", CATEGORIES),
    }


def summarise_diversity(records: Sequence[Record]) -> dict[str, Any]:
    """How much pictures of one prompt differ, for each category: in their scene graphs, and in their pixels."""
    return {f"differ in {name}": _means(records, "category", name, CATEGORIES) for name in ("scene", "pixel")}


def summarise_edits(records: Sequence[Record]) -> dict[str, Any]:
    """For each group, O and its parts (out of ten) and the share of strict successes."""
    table = {name: _means(records, "group", name, GROUPS) for name in ("o", "sc1", "sc2", "pq1", "pq2")}
    return {"O of 10": table["o"], "success": _shares(records, "group", "success", GROUPS)} | {
        k.upper(): table[k] for k in table if k != "o"
    }


def summarise_questions(records: Sequence[Record]) -> dict[str, Any]:
    """The mean score of each kind; for yes/no pairs and rotated choices also the share of sets that are right as a whole; for descriptions
    and step-by-step counts also the share of stated facts that are right."""
    kinds = list(dict.fromkeys(r["kind"] for r in records))
    units = question_units(records)
    together = [unit for unit in units if unit["pair"]]
    stated = [{"kind": r["kind"], "score": r["right"] / max(r["stated"], 1)} for r in records if r["kind"] in DENSE]
    short = [k for k in kinds if k not in DENSE]
    table = {"right": _means(units, "kind", "score", kinds, shares=short)}
    if together:
        table["whole sets right"] = _means(together, "kind", "whole", kinds, shares=short)
    if stated:
        table["stated facts right"] = _means(stated, "kind", "score", kinds)
    return table


def question_units(records: Sequence[Record]) -> list[Record]:
    """The independent units that intervals count: records of questions that belong together (both sides of a yes/no pair, the rotations of
    a choice) as one, with their mean score and whether all are right (`whole`)."""
    units: dict[tuple[str, str], list[Record]] = {}
    for r in records:
        units.setdefault((r["kind"], r["pair"] or r["id"]), []).append(r)
    found = []
    for (kind, name), of in units.items():
        scores = [r["score"] for r in of]
        row = {"id": f"{kind}/{name}", "kind": kind, "pair": of[0]["pair"], "score": sum(scores) / len(scores)}
        found.append(row | {"whole": all(score == 1.0 for score in scores)})
    return found


def _shares(records: Sequence[Record], by: str, figure: str, order: Sequence[str]) -> dict[str, dict[str, float | int]]:
    return _means(records, by, figure, order, shares=order)


def _means(
    records: Sequence[Record], by: str, figure: str, order: Sequence[str], *, shares: Sequence[str] = ()
) -> dict[str, dict[str, float | int]]:
    """The mean of each group, and `overall` with a bootstrap interval. Groups named in `shares` count right items: they get Wilson
    intervals, the others bootstrap ones."""
    groups = _grouped(records, by, figure, order)
    rows = {name: wilson(min(sum(v), len(v)), len(v)) if name in shares else bootstrap_mean(v) for name, v in groups.items()}
    return {name: estimate.to_dict() for name, estimate in (rows | {"overall": bootstrap_groups(groups)}).items()}


def _grouped(records: Sequence[Record], by: str, figure: str, order: Sequence[str]) -> dict[str, Sequence[float]]:
    return {name: values for name in order if (values := [float(r[figure]) for r in records if r[by] == name])}
