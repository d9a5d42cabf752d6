"""The distillation table: the teacher, what needs no distillation, and the student after each stage, on the same prompts, seeds and noise.

Every row is recorded item by item in its own folder, so a stopped run can be resumed. Differences to the teacher are paired by item and
bootstrapped over prompts. A row whose student was not given is left out and listed.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hyperbagel.core.files import make_folder
from hyperbagel.data.images import captioned_grid, open_image, save_png
from hyperbagel.evaluate.distillation_report import print_table
from hyperbagel.evaluate.records import Record, Worker, digest, read_records, run_items
from hyperbagel.evaluate.report import LOSSLESS, write_report
from hyperbagel.evaluate.rows import TEACHER, Row, choose, is_edit, request_for, settings_of
from hyperbagel.evaluate.statistics import paired_difference
from hyperbagel.evaluate.steer import steer_worker, steering
from hyperbagel.evaluate.summary import summarise_diversity, summarise_edits, summarise_t2i
from hyperbagel.evaluate.toybox import (
    Settings,
    diversity_worker,
    drawn,
    edit_worker,
    load_detector,
    numbers_of,
    planner_of,
    resolve,
    t2i_worker,
)
from hyperbagel.evaluate.wall_clock import time_rows
from hyperbagel.model.student import fingerprint
from hyperbagel.toybox.detector import Detector
from hyperbagel.toybox.items import edit_eval_items, t2i_eval_prompts

# what is compared with the teacher: part, figure of a record, and the factor that makes it a share
COMPARED = (("t2i", "plain", 1.0), ("t2i", "strict", 1.0), ("edits", "success", 1.0), ("edits", "o", 0.1))
SHEET = (6, 4)  # prompts and edits on the contact sheet


def run_distillation_eval(
    model: Any,
    students: Mapping[str, Path],
    *,
    out: Path | str,
    rows: Sequence[str] | None = None,
    n_t2i: int = 2000,
    n_edits: int = 1000,
    n_diversity: int | None = None,
    n_clock: int = 8,
    n_steer: int = 32,
    batch: int = 16,
    seed: int = 0,
    split: str = "train",
    side: int = 64,
    think: bool = False,
    think_temperature: float | None = None,
    detector: Detector | None = None,
    show: bool = True,
) -> dict[str, Any]:
    """Score all rows whose student is in `students` (name -> folder), and write report.json and contact.png into `out`.

    n_diversity: prompts that each row draws four times; None: a fortieth of `n_t2i`. n_clock: items that are timed, of each kind. n_steer:
    items that are drawn with weak and with strong guidance. think, think_temperature: every row writes a plan before each picture, and its
    seconds count.
    Raises InputError if `out` has records made with other settings or other weights.
    """
    out, detector = make_folder(out), detector or load_detector()
    plan = {"think_temperature": think_temperature} if think_temperature else {}
    base = Settings(split, seed, side, think, image=plan, edit=plan)
    n_diversity = n_t2i // 40 if n_diversity is None else n_diversity
    chosen = choose(rows)
    asked = {row.name: s for row in chosen if (s := settings_of(row, students, base)) is not None}
    present = [row for row in chosen if row.name in asked]
    result: dict[str, Any] = {"rows": {}, "left_out": [row.name for row in chosen if row.name not in asked]}
    counts = {"t2i": n_t2i, "diversity": n_diversity, "edits": n_edits, "steer": n_steer}
    items: dict[str, list[Any]] = {
        "t2i": t2i_eval_prompts(n_t2i, seed, split),
        "diversity": t2i_eval_prompts(n_diversity, seed + 1, split),
        "edits": edit_eval_items(n_edits, seed, split),
        "steer": [*t2i_eval_prompts(n_steer // 2, seed + 2, split), *edit_eval_items(n_steer - n_steer // 2, seed + 2, split)],
        "sheet": [*_spread(t2i_eval_prompts(12, seed + 3, split), SHEET[0]), *_spread(edit_eval_items(9, seed + 3, split), SHEET[1])],
    }
    origin = {"base": fingerprint(model.parts.model)} | numbers_of(model) | (planner_of(model) if think else {})
    for row in present:
        s, folder = asked[row.name], make_folder(out / row.name)
        weights = origin["base"] if row.student is None else digest(students[row.student])
        header = {"settings": resolve(s) | {"image": _plain(s.image), "edit": _plain(s.edit)}, "weights": weights, **origin}
        workers: dict[str, Worker] = {
            "t2i": t2i_worker(model, detector, s),
            "diversity": diversity_worker(model, detector, s),
            "edits": edit_worker(model, detector, s),
            "steer": steer_worker(model, s),
            "sheet": sheet_worker(model, s, folder),
        }
        found: dict[str, list[Record]] = {}
        for part, worker in workers.items():
            if items[part]:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="student ")  # a row may use other steps than its student was made for
                    found[part] = run_items(
                        f"{row.name} {part}", items[part], worker, seed=seed, batch=batch,
                        header=header | {"n": counts.get(part, len(items[part]))}, path=folder / f"{part}.jsonl",
                    )  # fmt: skip
        result["rows"][row.name] = {"title": row.title, **_summary(found)}
    for row in present:
        result["rows"][row.name]["differences"] = differences(out / row.name, out / TEACHER)
    if n_clock:
        timed = t2i_eval_prompts(n_clock, seed + 4, split) if n_t2i else []
        timed_edits = edit_eval_items(n_clock, seed + 4, split) if n_edits else []
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="student ")
            result["wall_clock"] = time_rows(model, asked, timed, timed_edits, teacher=TEACHER)
    where = model.parts.model
    result["machine"] = {"device": str(where.device), "dtype": where.precision, "threads": torch.get_num_threads()}
    result["settings"] = {"split": split, "seed": seed, "side": side, "think": think, **plan, "counts": counts}
    result = write_report(result, out / "report.json")
    save_png(contact_sheet(out, present, items["sheet"], side), out / "contact.png")
    if show:
        print_table(result)
    return result


def _plain(request: Mapping[str, Any]) -> dict[str, Any]:
    """A request's settings as plain JSON values, without the student: its digest identifies it, not its folder."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in request.items() if k != "student"}


def _spread(items: Sequence[Any], n: int) -> list[Any]:
    return [items[i * len(items) // n] for i in range(n)]


def _summary(found: Mapping[str, list[Record]]) -> dict[str, Any]:
    """A row's own figures."""
    row: dict[str, Any] = {}
    if "t2i" in found:
        row |= {"t2i": summarise_t2i(found["t2i"]), "t2i_nfe": _mean_nfe(found["t2i"])}
    if "edits" in found:
        row |= {"edits": summarise_edits(found["edits"]), "edits_nfe": _mean_nfe(found["edits"])}
    if "diversity" in found:
        row["diversity"] = summarise_diversity(found["diversity"])
    if "steer" in found:
        row["steer"] = steering(found["steer"])
    return row


def _mean_nfe(records: Sequence[Record]) -> float:
    return sum(r["nfe"] for r in records) / len(records)


def differences(ours: Path, theirs: Path) -> dict[str, Any]:
    """Paired differences (ours - theirs, as shares) in every compared figure; `lossless`: the lower 95 % bound is above -1.5 points."""
    table: dict[str, Any] = {}
    for part, figure, scale in COMPARED:
        a, b = ({r["id"]: scale * float(r[figure]) for r in read_records(folder / f"{part}.jsonl")} for folder in (ours, theirs))
        if a:
            estimate = paired_difference(a, b)
            table[f"{part} {figure}"] = estimate.to_dict() | {"lossless": estimate.low > LOSSLESS}
    return table


# -- contact sheet -----------------------------------------------------------------------------------------------------------------


def sheet_worker(model: Any, s: Settings, folder: Path) -> Worker:
    """Draws the contact sheet's items and keeps the pictures."""

    def work(items: list[Any], seeds: list[int]) -> list[Record]:
        requests = [request_for(item, s, seed) for item, seed in zip(items, seeds, strict=True)]
        records = []
        for item, result in zip(items, model.generate_batch(requests), strict=True):
            save_png(result.image, make_folder(folder / "pictures") / f"{item.id}.png")
            records.append({"nfe": result.nfe})
        return records

    return work


def contact_sheet(out: Path, rows: Sequence[Row], items: Sequence[Any], side: int) -> Image.Image:
    """A sheet with a row for each row of the table, of the same prompts and noise; the top row shows what was asked, and edits' sources."""
    blank = Image.new("RGB", (side, side), (255, 255, 255))
    cells = [(drawn(i.source, side), i.instruction) if is_edit(i) else (blank, i.prompt) for i in items]
    for row in rows:
        nfe = {r["id"]: r["nfe"] for r in read_records(out / row.name / "sheet.jsonl")}
        for item in items:
            cells.append((open_image(out / row.name / "pictures" / f"{item.id}.png"), f"{row.title}\n{nfe[item.id]} NFE"))
    return captioned_grid(cells, len(items), lines=5)
