"""Pictures for GenEval's own, external scorer (evaluate_images.py).

OUT/00000/metadata.jsonl          the prompt's row of evaluation_metadata.jsonl, unchanged
OUT/00000/samples/00000.png ...   `n` pictures, numbered
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from hyperbagel.core.files import atomic_write_text, make_folder
from hyperbagel.evaluate.pictures import Job, Outcome, check_settings, depends_on, make_pictures, place, read_lines
from hyperbagel.evaluate.records import item_seed
from hyperbagel.generate.types import ImageRequest


def run_geneval(
    model: Any, prompts: Path, out: Path, *, n: int = 4, seed: int = 0, batch: int = 4, settings: dict[str, Any] | None = None
) -> Outcome:
    """Draws every prompt `n` times. prompts: JSON lines with "prompt" (and what the scorer needs: tag, include, exclude).

    settings: fields of ImageRequest. Under torchrun each rank takes its share. Raises InputError for an unusable file, settings that the
    model refuses, or a folder whose pictures were made otherwise.
    """
    rank, ranks, _ = place()
    asked = settings or {}
    rows, broken = read_lines(prompts, ["prompt"])
    noted = depends_on(model, ImageRequest("a picture", **asked), rows) | {"suite": "geneval", "n": n, "seed": seed}
    check_settings(out, noted, rank)
    if rank == 0:
        for row in rows:
            about = {key: value for key, value in row.items() if key != "_row"}
            folder = make_folder(out / f"{row['_row']:05d}" / "samples").parent  # the scorer lists it, also where no picture was made
            atomic_write_text(folder / "metadata.jsonl", json.dumps(about, ensure_ascii=False) + "\n")

    def jobs() -> Iterator[Job]:
        for row in rows:
            first = item_seed(seed, f"{row['_row']:05d}")
            for k in range(n):
                request = partial(ImageRequest, row["prompt"], seed=first + k, **asked)
                yield Job(out / f"{row['_row']:05d}" / "samples" / f"{k:05d}.png", request)

    return make_pictures(model, jobs(), rank=rank, ranks=ranks, batch=batch, broken=broken if rank == 0 else ())
