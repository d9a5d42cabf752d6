"""Pictures for GEdit-Bench's own, external scorer.

OUT/fullset/<task_type>/<instruction_language>/<key>.png            the edit
OUT/fullset/<task_type>/<instruction_language>/<key>_SRCIMG.png     its source picture
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from hyperbagel.core.errors import InputError
from hyperbagel.data.images import open_image
from hyperbagel.evaluate.pictures import Job, Outcome, check_settings, depends_on, make_pictures, place, read_lines
from hyperbagel.evaluate.records import item_seed
from hyperbagel.generate.types import ImageRequest

NEEDED = ("key", "task_type", "instruction", "instruction_language")
_NAME = re.compile(r"\w[\w.-]*")  # these become folders and files; `..` would leave the folder
_BYTES = 200  # of such a name; file systems end at 255


def run_gedit(
    model: Any, prompts: Path, out: Path, *, seed: int = 0, batch: int = 4, language: str = "all", settings: dict[str, Any] | None = None
) -> Outcome:
    """Makes every edit. prompts: JSON lines with key, task_type, instruction, instruction_language and optionally image, a path relative to
    the file's folder; without it the picture is KEY_SRCIMG.png or KEY.png there.

    language: "en", "cn" or "all". settings: fields of ImageRequest. Raises InputError as `run_geneval` does, and if there is no row of the
    language.
    """
    rank, ranks, _ = place()
    asked = settings or {}
    rows, broken = read_lines(prompts, NEEDED)
    taken: dict[tuple[str, str, str], int] = {}  # files so far -> the row that each belongs to
    for row in list(rows):
        odd = next((name for name in ("key", "task_type", "instruction_language") if not _usable(row[name])), None)
        files = [(row["task_type"], row["instruction_language"], row["key"] + end) for end in ("", "_SRCIMG")]
        first = next((taken[file] for file in files if file in taken), None)
        if odd is None and first is None:
            taken |= dict.fromkeys(files, row["_row"])
            continue
        rows.remove(row)
        wrong = f"{odd} {row[odd]!r} cannot be a file's name" if odd else f"key {row['key']!r} names a file of row {(first or 0) + 1}"
        broken.append(f"{prompts} row {row['_row'] + 1}: {wrong}")
    chosen = [row for row in rows if language in ("all", row["instruction_language"])]
    if not chosen:
        raise InputError(f"{prompts}: got no usable row of language {language!r}, expected some; the file has {_languages(rows)}")
    sample = ImageRequest("an edit", (Image.new("RGB", (16, 16)),), **asked)
    check_settings(out, depends_on(model, sample, rows) | {"suite": "gedit", "seed": seed}, rank)

    def jobs() -> Iterator[Job]:
        for row in chosen:
            folder = out / "fullset" / row["task_type"] / row["instruction_language"]
            request = partial(_request, row, prompts.parent, seed, asked)
            yield Job(folder / f"{row['key']}.png", request, source=folder / f"{row['key']}_SRCIMG.png")

    return make_pictures(model, jobs(), rank=rank, ranks=ranks, batch=batch, broken=broken if rank == 0 else ())


def _request(row: dict[str, Any], where: Path, seed: int, asked: dict[str, Any]) -> ImageRequest:
    """Reads the source and asks for the edit."""
    named = [row["image"]] if isinstance(row.get("image"), str) else [f"{row['key']}_SRCIMG.png", f"{row['key']}.png"]
    path = next((where / name for name in named if (where / name).is_file()), None)
    if path is None:
        raise InputError(f"no picture {' or '.join(named)} in {where}")
    return ImageRequest(
        row["instruction"], (open_image(path),), seed=item_seed(seed, f"{row['instruction_language']}/{row['key']}"), **asked
    )


def _usable(name: str) -> bool:
    return _NAME.fullmatch(name) is not None and len(name.encode()) <= _BYTES


def _languages(rows: list[dict[str, Any]]) -> str:
    return ", ".join(sorted({row["instruction_language"] for row in rows})) or "no usable rows"
