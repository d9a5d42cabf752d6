"""The rows of the distillation table: the teacher, shortcuts that need no distillation, and the student after each stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyperbagel.core.errors import InputError
from hyperbagel.evaluate.toybox import Settings, drawn
from hyperbagel.generate.types import PAPER_EDIT, PAPER_TEXT_TO_IMAGE, Denoising, ImageRequest
from hyperbagel.toybox.items import EditItem, T2IItem

TEACHER = "teacher"


@dataclass(frozen=True)
class Row:
    """A row of the table. student: the name under which its folder is given; None: the model itself with guidance. steps: None: the
    student's own."""

    name: str
    title: str
    student: str | None = None
    steps: int | None = None


ROWS = (
    Row(TEACHER, "teacher", steps=PAPER_TEXT_TO_IMAGE.num_steps),
    Row("teacher-6", "teacher, 6 Euler steps", steps=6),
    Row("cfg-50", "guidance distilled, 50 steps", "cfg", 50),
    Row("cfg-6", "guidance distilled, 6 steps", "cfg", 6),
    Row("reflow-6", "reflow, 6 steps", "reflow", 6),
    Row("tscd", "after TSCD", "tscd"),
    Row("refl-six", "after ReFL through six steps", "refl-six"),
    Row("dmdo-paired", "after DMDO, paired (the paper's)", "dmdo-paired"),
    Row("dmdo-independent", "after DMDO, independent", "dmdo-independent"),
    Row("dmdo-reflowed", "after DMDO, reflowed", "dmdo-reflowed"),
    Row("dmdo-tdm", "after DMDO, tdm", "dmdo-tdm"),
    Row("6", "6-NFE student", "6"),
    Row("teacher-1", "teacher, 1 Euler step", steps=1),
    Row("adp", "after ADP", "adp"),
    Row("refl", "after ReFL", "refl"),
    Row("1", "1-NFE student", "1"),
)
STUDENTS = tuple(dict.fromkeys(row.student for row in ROWS if row.student))


def parse_students(given: Sequence[str]) -> dict[str, Path]:
    """Folders by name, from texts of the form NAME=FOLDER. Raises InputError for an unknown name or a folder that holds no student."""
    found: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or name not in STUDENTS:
            raise InputError(f"got --student {text!r}, expected NAME=FOLDER with NAME one of {', '.join(STUDENTS)}")
        if not (Path(folder) / "sampler.json").is_file():
            raise InputError(f"got --student {text!r}, but {folder} has no sampler.json, expected a student's folder (RUN/export)")
        found[name] = Path(folder)
    return found


def choose(names: Sequence[str] | None) -> tuple[Row, ...]:
    """The rows with these names (None: all) in the table's order, always with the teacher, first. Raises InputError for an unknown name."""
    known = [row.name for row in ROWS]
    odd = [name for name in names or () if name not in known]
    if odd:
        raise InputError(f"got row {odd[0]!r}, expected one of {', '.join(known)}")
    return tuple(row for row in ROWS if names is None or row.name in names or row.name == TEACHER)


def settings_of(row: Row, students: Mapping[str, Path], base: Settings) -> Settings | None:
    """How the model is asked for a row's pictures; None if its student was not given."""
    if row.student is not None and row.student not in students:
        return None
    made: list[dict[str, Any]] = []
    for teacher in (PAPER_TEXT_TO_IMAGE, PAPER_EDIT):
        own: dict[str, Any] = _asked(teacher) if row.student is None else {"student": str(students[row.student])}
        made.append(own | ({} if row.steps is None else {"steps": row.steps}))
    return Settings(base.split, base.seed, base.side, base.think, image=base.image | made[0], edit=base.edit | made[1])


def _asked(teacher: Denoising) -> dict[str, Any]:
    """A teacher's settings as options of a request."""
    names = ("text_scale", "image_scale", "interval", "renorm", "renorm_min", "shift")
    return {name: getattr(teacher, name) for name in names} | {"steps": teacher.num_steps}


def is_edit(item: T2IItem | EditItem) -> bool:
    return isinstance(item, EditItem)


def request_for(item: T2IItem | EditItem, s: Settings, seed: int, **changes: Any) -> ImageRequest:
    """A row's request for an item; changes: options that replace the row's."""
    asked: dict[str, Any] = {"seed": seed, "size": (s.side, s.side), "think": s.think}
    if isinstance(item, EditItem):
        return ImageRequest(item.instruction, (drawn(item.source, s.side),), **asked | s.edit | changes)
    return ImageRequest(item.prompt, **asked | s.image | changes)
