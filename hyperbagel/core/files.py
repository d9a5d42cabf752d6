"""Files that are whole or absent: write to a neighbour, fsync, rename, fsync the folder.

A process killed at any moment leaves either the old file (or folder) or the new one, never half of one. What it had begun, and a folder
that it was replacing at that very moment, stay beside it under a name that begins with a dot.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hyperbagel.core.errors import InputError

try:
    import fcntl
except ImportError:  # Windows has no fcntl: `sole_writer` then locks nothing
    fcntl = None  # type: ignore[assignment]

_WINDOWS = os.name == "nt"

# errno of a failed write -> (got, what to do)
_REASONS = {
    errno.EACCES: ("no permission to write", "choose a folder you may write to"),
    errno.EPERM: ("no permission to write", "choose a folder you may write to"),
    errno.EROFS: ("a read-only file system", "choose a folder on a writable disk"),
    errno.ENOSPC: ("a full disk", "free some space or choose another disk"),
    errno.EDQUOT: ("a full quota", "free some space or choose another disk"),
    errno.EFBIG: ("a file that is larger than this process or disk may have", "raise the limit (ulimit -f) or choose another disk"),
    errno.ENOENT: ("a folder that does not exist", "create the folder first"),
    errno.ENOTDIR: ("a path that runs through a file", "choose a path whose parents are folders"),
    errno.ENAMETOOLONG: ("a name that is too long", "choose a shorter one"),
    errno.EISDIR: ("a folder where a file should go", "choose another name or remove the folder"),
}

# The same for errors that reached the top, where nobody knows whether a read or a write failed.
_PLAIN = {
    errno.EACCES: ("no permission", "choose a place that you may use"),
    errno.EPERM: ("no permission", "choose a place that you may use"),
    errno.ENOSPC: ("a full disk", "free some space or choose another disk"),
    errno.EFBIG: ("a file that is larger than allowed", "raise the limit (ulimit -f) or choose another disk"),
    errno.ENOENT: ("nothing there", "check the path"),
    errno.ENOTDIR: ("a path that runs through a file", "check the path"),
    errno.EISDIR: ("a folder where a file should be", "put the file there"),
    errno.ENAMETOOLONG: ("a name that is too long", "shorten it"),
}


def plain_error(error: OSError) -> str:
    """An OSError worded as got, expected, what to do; one of an unusual kind keeps Python's own text."""
    if error.errno not in _PLAIN:
        return str(error)
    got, do = _PLAIN[error.errno]
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes | os.PathLike) else ""
    name = name if len(name) <= 200 else f"{name[:60]}..."
    return f"{name}{': ' if name else ''}got {got}, expected a file or folder that can be used, {do}"


def one_line(error: Exception) -> str:
    """An error as one line for the user, an OSError in plain words."""
    return " ".join((plain_error(error) if isinstance(error, OSError) else str(error)).split())


def read_json(path: Path, missing: str = "restore the file") -> dict[str, Any]:
    """The object in a JSON file. Raises InputError if it is missing (`missing`: the advice given then), unreadable or no JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: missing; {missing}") from error
    except OSError as error:
        raise InputError(plain_error(error)) from error
    except ValueError as error:
        raise InputError(f"{path}: got a file that is not readable as JSON ({error}), expected it whole, restore it") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: got a {type(found).__name__}, expected a JSON object, restore it")
    return found


@contextmanager
def readable_errors(path: Path) -> Iterator[None]:
    """Turns an OSError about writing `path` into an InputError that says what to do; all other errors pass through."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REASONS or not _concerns(path, error):
            raise
        got, do = _REASONS[error.errno]
        raise InputError(f"{path}: got {got}, expected a place that can be written, {do}") from error


def _concerns(path: Path, error: OSError) -> bool:
    """Whether `error` is about `path`: itself, a folder above it, something in it, or its temporary neighbour."""
    named = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if name is not None]  # a copy names both ends

    def near(other: Path) -> bool:
        below = other.relative_to(path.parent).parts if other.is_relative_to(path.parent) else ()
        return (bool(below) and below[0].startswith(_beside(path))) or path.is_relative_to(other) or other.is_relative_to(path)

    return not named or any(map(near, named))


def _beside(path: Path) -> str:
    """Prefix of the names of its temporary neighbours. Cut at 32 characters, since a name alone may fill the 255 bytes allowed."""
    return f".{path.name[:32]}."


def fsync_path(path: Path) -> None:
    """Flushes one file or folder to the disk. Windows flushes only files, and those only through a handle that may write."""
    if _WINDOWS and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if _WINDOWS else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _fsync_tree(path: Path) -> None:
    if path.is_dir():
        for child in path.iterdir():
            _fsync_tree(child)
    fsync_path(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _replace(temporary: Path, path: Path) -> None:
    """Renames over whatever is at `path`. A folder cannot replace a non-empty one in a single step, so the old one is moved aside first.
    Other processes may do the same at the same time; the last one's folder stays."""
    while True:
        aside = None
        if temporary.is_dir() and path.is_dir():
            aside = path.with_name(f"{_beside(path)}old-{uuid.uuid4().hex[:8]}")
            try:
                os.replace(path, aside)
            except FileNotFoundError:  # another process has moved it
                continue
        try:
            os.replace(temporary, path)
        except BaseException as error:
            put = isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST)  # another process has put its own there
            if aside is not None:
                _remove(aside) if put else os.replace(aside, path)
            if put and temporary.is_dir():  # whether or not a third process has moved that away meanwhile
                continue
            raise
        if aside is not None:
            _remove(aside)
        return


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what the caller makes there (a file or a folder) is fsynced and renamed to `path` on success.

    On an exception the temporary is removed and `path` is untouched. The parent folder must exist.

    Raises:
        InputError: no permission, full disk, or missing folder.
    """
    target = Path(path)
    temporary = target.with_name(f"{_beside(target)}tmp-{uuid.uuid4().hex[:8]}")
    with readable_errors(target):
        if not target.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(target.parent))
        try:
            yield temporary
            _fsync_tree(temporary)
            _replace(temporary, target)
            fsync_path(target.parent)
        except BaseException:
            with suppress(OSError):
                _remove(temporary)
            raise


def atomic_write_bytes(path: Path | str, data: bytes) -> None:
    """Writes `data` to `path`, leaving the old file or the new one, never a part. Raises InputError as `atomic_path` does."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: Path | str, text: str) -> None:
    """`atomic_write_bytes` of UTF-8 text, newlines as given."""
    atomic_write_bytes(path, text.encode("utf-8"))


def make_folder(path: Path | str) -> Path:
    """Creates a folder and its parents; an existing one is fine. Raises InputError as `atomic_path` does."""
    folder = Path(path)
    with readable_errors(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise InputError(f"{folder}: got a file, expected a folder or nothing, choose another name") from error
    return folder


def check_name(name: str, *reserved: str) -> str:
    """The name of a student or drafter in its model's folder. Raises InputError for one that leads elsewhere or means something else."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or name in reserved:
        words = " or ".join(repr(word) for word in reserved)
        raise InputError(f"got name {name!r}, expected letters, digits, '-', '_' and '.', not {words}, choose another one")
    return name


def shelf(folder: Path | None, file: str) -> list[str]:
    """Names of the folders in `folder` that hold such a file, without hidden ones: those a killed process left behind."""
    if folder is None or not folder.is_dir():
        return []
    return sorted(path.parent.name for path in folder.glob(f"*/{file}") if not path.parent.name.startswith("."))


@contextmanager
def sole_writer(path: Path, about: str = "") -> Iterator[None]:
    """Holds an exclusive lock on the file `path` (made if absent) against other processes. A killed process leaves no lock behind.

    Raises InputError if another process holds it; `about` then says what was got, in place of the path. Without file locks (Windows,
    some network file systems) nothing is locked.
    """
    with readable_errors(path):
        file = path.open("ab")
    with file:
        locked = False
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = True
            except BlockingIOError as error:
                raise InputError(
                    f"{about or f'{path}: got a file'} that another process is writing, expected one of this process alone; "
                    "wait for the other or give another folder"
                ) from error
            except OSError:
                pass
        try:
            yield
        finally:
            if locked:
                fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough: a child forked meanwhile would still hold the lock
