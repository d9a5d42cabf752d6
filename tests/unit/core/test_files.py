"""Files are whole or absent."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from hyperbagel.core import files
from hyperbagel.core.errors import InputError
from hyperbagel.core.files import atomic_path, atomic_write_bytes, atomic_write_text, make_folder, plain_error, sole_writer


def test_writes_and_replaces(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "a.txt", "één\n")
    atomic_write_bytes(tmp_path / "a.txt", b"two")
    assert (tmp_path / "a.txt").read_bytes() == b"two"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_failure_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "a.txt", "old")
    with pytest.raises(RuntimeError, match="halfway"), atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("ne")
        raise RuntimeError("halfway")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_replaces_a_full_folder(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with atomic_path(tmp_path / "f") as temporary:
            temporary.mkdir()
            (temporary / text).write_text(text)
    assert [p.name for p in tmp_path.rglob("*")] == ["f", "new"]


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "full disk.*free some space"), (errno.EACCES, "no permission.*may write to"), (errno.EROFS, "read-only")],
)
def test_refusals_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number), str(tmp_path / "a.txt"))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(InputError, match=words):
        atomic_write_text(tmp_path / "a.txt", "x")
    assert list(tmp_path.iterdir()) == []


def test_a_copy_that_finds_no_room_is_about_where_it_goes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="full disk"), atomic_path(tmp_path / "f") as temporary:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/elsewhere/a", None, str(temporary / "a"))


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="create the folder first"):
        atomic_write_text(tmp_path / "none" / "a.txt", "x")


def test_an_error_about_another_file_passes_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a.txt"):
        (tmp_path / "elsewhere" / "b.txt").read_text()


def test_make_folder_refuses_a_file(tmp_path: Path) -> None:
    assert make_folder(tmp_path / "a" / "b").is_dir()
    (tmp_path / "c").write_text("")
    with pytest.raises(InputError, match="got a file"):
        make_folder(tmp_path / "c")


@pytest.mark.parametrize("name", ["a" * 251 + ".png", "é" * 127, "f" * 255])
def test_the_longest_names_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for text in ("one", "two"):
        with atomic_path(tmp_path / name) as temporary:
            temporary.mkdir()
            (temporary / text).write_text(text)
    assert [p.name for p in tmp_path.rglob("*")] == [name, "two"]

    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(source))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(InputError, match="no permission"):
        atomic_write_text(tmp_path / name, "x")


def test_a_file_over_the_limit_is_told(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(InputError, match=r"a\.txt: got a file that is larger .* raise the limit \(ulimit -f\)"):
            atomic_write_text(tmp_path / "a.txt", "x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [] and "raise the limit" in plain_error(OSError(errno.EFBIG, os.strerror(errno.EFBIG)))


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with sole_writer(tmp_path / "a"):
        with pytest.raises(InputError, match="a: got a file that another process is writing"), sole_writer(tmp_path / "a"):
            pass
        with pytest.raises(InputError, match="got two that another"), sole_writer(tmp_path / "a", "got two"):
            pass
        with sole_writer(tmp_path / "b"):
            pass
    with sole_writer(tmp_path / "a"):
        pass


def test_all_is_on_the_disk_before_it_has_its_name_and_the_name_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    replace = os.replace
    monkeypatch.setattr(files, "fsync_path", told.append)
    monkeypatch.setattr(os, "replace", lambda source, target: (told.append("rename"), replace(source, target)))
    with atomic_path(tmp_path / "f") as temporary:
        temporary.mkdir()
        (temporary / "a").write_text("x")
    assert told == [temporary / "a", temporary, "rename", tmp_path]


def test_on_windows_files_are_flushed_through_handles_that_may_write_and_folders_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its os.open refuses folders, its os.fsync handles that only read."""
    usual_open, usual_fsync, flushed = os.open, os.fsync, []

    def open_(path: Path, flags: int, *mode: int, **more: int) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return usual_open(path, flags, *mode, **more)

    def fsync(handle: int) -> None:
        if not fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_RDWR:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flushed.append(os.readlink(f"/proc/self/fd/{handle}"))
        usual_fsync(handle)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(files, "_WINDOWS", True)
    with atomic_path(tmp_path / "made") as folder:
        folder.mkdir()
        (folder / "a").write_bytes(b"1")
    atomic_write_text(tmp_path / "b", "2")
    assert (tmp_path / "made" / "a").read_bytes() == b"1" and (tmp_path / "b").read_bytes() == b"2" and len(flushed) == 2


def test_a_folder_that_cannot_be_replaced_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "old").write_text("")
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        if ".tmp-" in Path(source).name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(InputError, match="full disk"), atomic_path(tmp_path / "f") as temporary:
        temporary.mkdir()
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == ["f", "f/old"]


def replace_folder(target: Path, rename: Callable[[Path, Path], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with `old` in it becomes one with `mine`; every rename goes through `rename`."""
    target.mkdir()
    (target / "old").write_text("")
    monkeypatch.setattr(os, "replace", rename)
    with atomic_path(target) as temporary:
        temporary.mkdir()
        (temporary / "mine").write_text("")


@pytest.mark.parametrize("moment", ["before the old one is aside", "after"])
def test_two_that_replace_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Another process puts its own folder there between any two steps: no error, nothing left beside it."""
    target, replace, others = tmp_path / "f", os.replace, iter(["once"])

    def other() -> None:
        replace(target, tmp_path / "gone") if target.exists() else None
        if moment == "after":
            target.mkdir()
            (target / "theirs").write_text("")

    def meanwhile(source: Path, to: Path) -> None:
        aside = ".old-" in Path(to).name
        if aside == (moment != "after") and next(others, None):
            other()
        replace(source, to)

    replace_folder(target, meanwhile, monkeypatch)
    assert next(others, None) is None, "the other was there"
    assert [p.name for p in target.iterdir()] == ["mine"] and {p.name for p in tmp_path.iterdir()} <= {"f", "gone"}


def test_a_third_that_moves_the_second_s_folder_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the failed rename and the next look at the place, a third process has moved away what the second had put there."""
    target, replace, others = tmp_path / "f", os.replace, iter(["once"])

    def meanwhile(source: Path, to: Path) -> None:
        if ".tmp-" in Path(source).name and next(others, None):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(source))  # and now nothing is there any more
        replace(source, to)

    replace_folder(target, meanwhile, monkeypatch)
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == ["f", "f/mine"]


def test_a_shelf_knows_nothing_of_what_a_killed_process_left(tmp_path: Path) -> None:
    for name in ("6", "1", ".6.tmp-1a2b3c4d", ".6.old-1a2b3c4d", "empty"):
        (tmp_path / name).mkdir()
        if name != "empty":
            (tmp_path / name / "sampler.json").write_text("{}")
    assert files.shelf(tmp_path, "sampler.json") == ["1", "6"]
    assert files.shelf(tmp_path / "none", "sampler.json") == files.shelf(None, "sampler.json") == []
