"""Pictures for external scorers: made job by job in the folders that these expect, divided among ranks, resumable.

A job is one file. Files are written whole or not at all, so a file that exists is done; nothing else is kept of a stopped run.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hyperbagel.core.errors import InputError, Notice
from hyperbagel.core.files import atomic_write_text, make_folder, read_json
from hyperbagel.core.progress import ProgressReport
from hyperbagel.data.images import save_png
from hyperbagel.evaluate.records import unlike
from hyperbagel.evaluate.toybox import autoencoder_of, planner_of, weights_of
from hyperbagel.generate.types import ImageRequest, ImageResult

SHOWN = 5  # broken rows that are named one by one
NAMED = "named"  # of settings.json: how the model and its student were called, which no picture depends on


@dataclass(frozen=True)
class Job:
    """A picture to make at `path`. `request` is called when it is its turn, so that source pictures are read then; may raise InputError.
    source: where the scorer looks for the picture that is edited."""

    path: Path
    request: Callable[[], ImageRequest]
    source: Path | None = None


@dataclass
class Outcome:
    """What a rank did. broken: `name: reason` of each row that could not be used."""

    made: int = 0
    found: int = 0
    broken: list[str] = field(default_factory=list)


def place() -> tuple[int, int, str | None]:
    """(rank, ranks, device) that torchrun's environment gives this process; the device is None where it says nothing."""
    try:
        rank, ranks, local = (int(os.environ.get(name, usual)) for name, usual in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    except ValueError as error:
        raise InputError(
            f"got RANK, WORLD_SIZE or LOCAL_RANK that is no number ({error}), expected torchrun's; start without them or with it"
        ) from error
    if not 0 <= rank < ranks:
        raise InputError(f"got RANK {rank} and WORLD_SIZE {ranks}, expected 0 <= RANK < WORLD_SIZE; start without them or with torchrun")
    return rank, ranks, f"cuda:{local}" if "LOCAL_RANK" in os.environ and ranks > 1 else None


def read_lines(path: Path, needed: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """(rows, what is wrong with each broken one) of a JSON-lines file. A row needs non-empty texts under the names in `needed`; `_row` is
    its number, counted from 0 without empty lines.

    Raises InputError for a file that cannot be read or has no usable row.
    """
    try:
        lines = path.read_text("utf-8-sig").split("\n")  # JSON may hold other line ends, such as U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: got a file that cannot be read ({error}), expected JSON, one object a line; check the path") from error
    rows: list[dict[str, Any]] = []
    broken: list[str] = []
    for number, line in enumerate(line for line in lines if line.strip()):
        try:
            row = json.loads(line)
            missing = [name for name in needed if not isinstance(row.get(name), str) or not row[name].strip()]
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair: no tokenizer and no file takes it
            broken.append(f"{path} row {number + 1}: a text that is no Unicode ({error})")
            continue
        except (ValueError, AttributeError) as error:
            broken.append(f"{path} row {number + 1}: no JSON object ({error})")
            continue
        if missing:
            broken.append(f"{path} row {number + 1}: no text {missing[0]!r}")
        else:
            rows.append(row | {"_row": number})
    if not rows:
        raise InputError(f"{path}: got {len(broken)} rows of which none can be used ({(broken or ['it is empty'])[0]}); check the file")
    return rows, broken


def depends_on(model: Any, sample: ImageRequest, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What pictures of these rows depend on besides seed and suite, for `check_settings`: settings with every default filled in, of which
    some are the model's own; weights by what they are, and under `NAMED` how they were called.

    Raises InputError if the model refuses the settings of `sample`, so that they are not noted before.
    """
    denoising = asdict(model.settings(sample, warn=False))
    student = denoising.pop("student")
    if sample.size is not None:
        model.grid(sample)
    size = sample.size or (None if sample.is_edit else model.default_size)
    plan = {"max_tokens": sample.max_think_tokens} | ({"temperature": sample.think_temperature} if sample.sampled else {})
    asked = {"denoising": denoising, "size": size, "think": sample.think and plan}
    weights = weights_of(model, sample.student) | (planner_of(model) if sample.think else {})
    weights["students"] = sorted(weights["students"].values())
    weights["autoencoder"] = autoencoder_of(model)  # its decoder may have been trained further (stage vae)
    told = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]
    return {NAMED: {"model": model.name, "student": student}, "rows": len(rows), "prompts": told} | asked | weights


def check_settings(out: Path, settings: dict[str, Any], rank: int) -> None:
    """Notes beside the pictures what they depend on. Raises InputError if there are pictures made otherwise."""
    path = make_folder(out) / "settings.json"
    if path.is_file():
        found, asked = read_json(path, "give another folder"), json.loads(json.dumps(settings))
        if (made := _unnamed(found)) != (now := _unnamed(asked)):
            got, wanted = unlike(json.dumps(made), json.dumps(now))
            raise InputError(f"{path}: got pictures made with {got}, expected {wanted}; give another folder")
    elif rank == 0:
        atomic_write_text(path, json.dumps(settings, indent=1, sort_keys=True) + "\n")


def _unnamed(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != NAMED}


def make_pictures(model: Any, jobs: Iterable[Job], *, rank: int, ranks: int, batch: int, broken: Sequence[str] = ()) -> Outcome:
    """Makes those of this rank's jobs that are not done yet, `batch` at a time. A job whose source cannot be read or that the model refuses
    is skipped and counted.

    broken: rows that never became jobs. Raises InputError if not one job could be done; with several ranks a rank only warns, since an
    error would end the others.
    """
    own = list(jobs)[rank::ranks]
    outcome = Outcome(broken=list(broken))
    with ProgressReport(f"pictures {rank + 1}/{ranks}") as progress:
        for chunk in _chunks([job for job in own if not job.path.is_file()], batch):
            ready: list[tuple[Job, ImageRequest]] = []
            for job in chunk:
                try:
                    ready.append((job, job.request()))
                except InputError as error:
                    outcome.broken.append(f"{_named(job)}: {error}")
                    continue
                if job.source is not None:  # a place that cannot be written is no broken row: it ends the run
                    make_folder(job.source.parent)
                    save_png(ready[-1][1].images[0], job.source)
            for job, result in _drawn(model, ready, outcome.broken):
                make_folder(job.path.parent)
                save_png(result.image, job.path, result.settings)
                outcome.made += 1
            done = sum(job.path.is_file() for job in own)
            progress.update(done / len(own), f"{done}/{len(own)}")
        outcome.found = sum(job.path.is_file() for job in own) - outcome.made
        for told in outcome.broken[:SHOWN]:
            progress.line(f"skipped {told}")
        progress.line(f"{outcome.made} made, {outcome.found} found, {len(outcome.broken)} broken rows skipped")
    if own and not outcome.made + outcome.found:
        told = f"got {len(outcome.broken)} broken rows and no other (first: {outcome.broken[0]}), expected rows that can be used"
        if ranks == 1:
            raise InputError(told)
        warnings.warn(f"rank {rank}: {told}", Notice, stacklevel=2)
    return outcome


def _drawn(model: Any, ready: Sequence[tuple[Job, ImageRequest]], broken: list[str]) -> list[tuple[Job, ImageResult]]:
    """Jobs and their pictures. Jobs that the model refuses are noted in `broken` and do not affect the others of their batch."""
    try:
        results = model.generate_batch([request for _, request in ready])
    except InputError as error:
        if len(ready) > 1:
            return [pair for one in ready for pair in _drawn(model, [one], broken)]
        broken.append(f"{_named(ready[0][0])}: {error}")
        return []
    return [(job, result) for (job, _), result in zip(ready, results, strict=True)]


def _named(job: Job) -> str:
    return "/".join(job.path.parts[-3:])


def _chunks(jobs: Sequence[Job], size: int) -> Iterator[Sequence[Job]]:
    for start in range(0, len(jobs), size):
        yield jobs[start : start + size]
