"""Records of scored items, one JSON line each: written as they come, and read back when a stopped evaluation is resumed."""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from hyperbagel.core.errors import InputError
from hyperbagel.core.files import readable_errors, sole_writer
from hyperbagel.core.progress import ProgressReport

Record = dict[str, Any]  # what is known of one scored item
Worker = Callable[[list[Any], list[int]], list[Record]]  # (items, seeds) -> a record each


def run_items(
    part: str, items: Sequence[Any], work: Worker, *, seed: int, batch: int, header: dict[str, Any], path: Path | None
) -> list[Record]:
    """The records of all `items` (each with an `id`), in order. Those in the file `path` are read back; the others are made, `batch` at a
    time, and appended to it. path: None keeps nothing.

    header: what the records depend on, the first line of the file. Raises InputError if the file has another one, or if another process
    is writing to it.
    """
    with nullcontext() if path is None else sole_writer(path), ProgressReport(part) as progress:
        done = open_records(path, header) if path is not None else {}
        todo = [item for item in items if item.id not in done]
        began = time.monotonic()
        for start in range(0, len(todo), batch):
            chunk = todo[start : start + batch]
            records = work(chunk, [item_seed(seed, item.id) for item in chunk])
            fresh = [{"id": item.id, **record} for item, record in zip(chunk, records, strict=True)]
            done |= {r["id"]: r for r in fresh}
            if path is not None:
                _append(path, fresh)
            made = len(items) - len(todo) + start + len(chunk)
            progress.update(made / len(items), f"{made}/{len(items)}")
        progress.line(f"{len(todo)} items in {time.monotonic() - began:.0f} s, {len(items) - len(todo)} read back")
    return [done[item.id] for item in items]


def item_seed(seed: int, name: str) -> int:
    """The seed of an item's noise, from `seed` and its id alone: the same for any model and batch size, and after an interruption."""
    return (zlib.crc32(name.encode()) + seed * 1_000_003) % 2**31


def open_records(path: Path, header: dict[str, Any]) -> dict[str, Record]:
    """The records that a file already holds, by id. A new file gets its header line; a last line that a kill cut short is removed. Raises
    InputError if the header is another one."""
    expected = json.dumps(header, sort_keys=True)
    with readable_errors(path):
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(path, len(whole))
        if not whole:
            path.write_text(expected + "\n", "utf-8")
            return {}
    first = whole.split(b"\n", 1)[0].decode("utf-8", errors="replace")
    if first != expected:
        got, asked = unlike(first, expected)
        raise InputError(f"{path}: got records made with {got}, expected {asked}; give another folder or the same settings")
    return {r["id"]: r for r in read_records(path)}


def unlike(found: str, asked: str) -> tuple[str, str]:
    """How two settings, given as JSON, differ: the differing values of each, in words; both texts as they are if one cannot be read."""

    def walk(a: Any, b: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
        if isinstance(a, dict) and isinstance(b, dict):
            for key in dict.fromkeys([*a, *b]):
                yield from walk(a.get(key), b.get(key), f"{name}.{key}" if name else key)
        elif a != b:
            yield name, a, b

    try:
        parts = list(walk(json.loads(found), json.loads(asked), ""))
    except ValueError:
        parts = []
    if not parts:
        return " ".join(found.split()), " ".join(asked.split())
    return ", ".join(f"{name} {a!r}" for name, a, _ in parts), ", ".join(f"{name} {b!r}" for name, _, b in parts)


def read_records(path: Path) -> list[Record]:
    """The records of a file, without its header line; a last line that was cut short is ignored. No file: no records.

    Raises InputError for any other damaged line.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [_record(path, number, line) for number, line in enumerate(lines, 1) if number > 1]


def _record(path: Path, number: int, line: bytes) -> Record:
    try:
        record = json.loads(line.decode("utf-8"))
    except ValueError as error:
        record, reason = None, str(error)
    else:
        reason = "no object with an id"
    if not isinstance(record, dict) or "id" not in record:
        raise InputError(f"{path} line {number}: got a damaged record ({reason}), expected JSON; remove it and its item is made again")
    return record


def read_header(path: Path) -> dict[str, Any]:
    """What the records of a file depend on; empty if there is no file. Raises InputError for a damaged one."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        line = file.readline()
    try:
        return json.loads(line.decode("utf-8") or "{}")
    except ValueError as error:
        raise InputError(f"{path} line 1: got a damaged header ({error}), expected JSON; evaluate again in another folder") from error


def digest(folder: Path) -> str:
    """A digest of a student's or a drafter's files, so that records made with other weights are not mistaken for its own."""
    whole = hashlib.sha256()
    with readable_errors(folder):
        for path in sorted(path for path in folder.iterdir() if path.is_file()):  # a download leaves folders beside them
            whole.update(path.name.encode() + b"\0" + path.read_bytes())
    return whole.hexdigest()[:16]


def _append(path: Path, records: list[Record]) -> None:
    with readable_errors(path), path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(r) + "\n" for r in records))
        file.flush()
        os.fsync(file.fileno())
