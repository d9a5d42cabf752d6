"""From records of single items to figures with intervals.

A part becomes {column: {row: interval}}, rows being categories, groups or kinds and their unweighted mean, `overall`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hyperbagel.evaluate import edits, t2i
from hyperbagel.evaluate.questions import DENSE
from hyperbagel.evaluate.records import Record
from hyperbagel.evaluate.statistics import Estimate, bootstrap_groups, bootstrap_mean, wilson


def summarise_t2i(records: Sequence[Record]) -> dict[str, Any]:
    """{"plain": {category: interval, "overall": ...}, "strict": ..., "psnr": ...}; overall is the unweighted mean of categories."""
    return {
        "plain": _shares(records, "category", "plain", t2i.CATEGORIES),
        "strict": _shares(records, "category", "strict", t2i.CATEGORIES),
        "re-render PSNR, dB": _means(records, "category", "psnr", t2i.CATEGORIES),
    }


def summarise_diversity(records: Sequence[Record]) -> dict[str, Any]:
    """Mean difference of pictures of one prompt, for each category: of their scene graphs, and of their pixels."""
    return {f"differ in {name}": _means(records, "category", name, t2i.CATEGORIES) for name in ("scene", "pixel")}


def summarise_edits(records: Sequence[Record]) -> dict[str, Any]:
    """O and its parts out of ten for each group, and the share of strict successes."""
    table = {name: _means(records, "group", name, edits.GROUPS) for name in ("o", "sc1", "sc2", "pq1", "pq2")}
    return {"O of 10": table["o"], "success": _shares(records, "group", "success", edits.GROUPS)} | {
        k.upper(): table[k] for k in table if k != "o"
    }


def summarise_questions(records: Sequence[Record]) -> dict[str, Any]:
    """Mean score of each kind; of descriptions and counts also the share of stated facts that are right; of yes/no pairs and of rotated
    choices also the share of whole sets right."""
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
    """Records of questions that share a picture and a fate (both sides of a yes/no pair, the rotations of a choice) as one, with their mean
    score and whether all are right (`whole`): what is independent, and so what intervals count."""
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
    """Mean of each group, and the bootstrap of their unweighted mean. Groups in `shares` hold rights and wrongs: a Wilson interval."""
    groups = _grouped(records, by, figure, order)
    rows = {name: wilson(min(sum(v), len(v)), len(v)) if name in shares else bootstrap_mean(v) for name, v in groups.items()}
    return _rows(rows | {"overall": bootstrap_groups(groups)})


def _rows(rows: dict[str, Estimate]) -> dict[str, dict[str, float | int]]:
    return {name: estimate.to_dict() for name, estimate in rows.items()}


def _grouped(records: Sequence[Record], by: str, figure: str, order: Sequence[str]) -> dict[str, Sequence[float]]:
    return {name: values for name in order if (values := [float(r[figure]) for r in records if r[by] == name])}
