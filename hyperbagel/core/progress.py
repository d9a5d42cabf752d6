"""Progress of a long job: a bar with the time left on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TextIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

T = TypeVar("T")


def format_seconds(seconds: float) -> str:
    """1:05:09 for 3909 seconds; 5:09 below an hour."""
    whole = max(0, int(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def count_step(done: int, total: int) -> None:
    """Redraws a step counter in place and erases it at the last step; on a terminal only."""
    if sys.stderr.isatty():
        print(f"\rstep {done} of {total}", end=clear_line() if done == total else "", file=sys.stderr, flush=True)


def clear_line() -> str:
    """The escape sequence that erases a counter left on the line; empty where stderr is no terminal."""
    return "\r\033[K" if sys.stderr.isatty() else ""


class ProgressReport:
    """Context manager. Call `update(share, text)` as often as you like: it prints at most one plain line every `every` seconds."""

    def __init__(
        self, title: str, *, every: float = 20.0, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._title, self._every, self._clock = title, every, clock
        self._stream = stream if stream is not None else sys.stderr
        self._bar: Progress | None = None
        if self._stream.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[text]}"))
            self._bar = Progress(*columns, console=Console(file=self._stream))
        self._began = clock()
        self._last = float("-inf")
        # (time, share) of the first update: time left is judged by what was done since, not by a resumed job's or by what came before
        self._first: tuple[float, float] | None = None

    def __enter__(self) -> ProgressReport:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=1.0, text="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def due(self) -> bool:
        """Whether an `update` now would be seen: on a terminal ten times a second, elsewhere every `every` seconds."""
        return self._clock() - self._last >= (0.1 if self._bar is not None else self._every)

    def update(self, share: float, text: str = "") -> None:
        """`share` of the job is done, in [0, 1]."""
        now = self._clock()
        since, first = self._first = self._first or (now, share)
        passed, done = now - self._began, share - first
        left = f"{format_seconds((now - since) * (1 - share) / done)} left" if done > 0 else "time left unknown"
        due = self.due
        if due:
            self._last = self._clock()
        if self._bar is not None:
            self._bar.update(self._task, completed=share, text=f"{left}  {text}")  # rich draws no more often than it must
        elif due:
            self.line(f"{100 * share:5.1f} %  {format_seconds(passed)} passed, {left}  {text}")

    def count(self, items: Iterable[T], total: int) -> Iterator[T]:
        """The items, `total` of them; says which one is at work."""
        for i, item in enumerate(items):
            self.update(i / total, f"{i + 1}/{total}")
            yield item
        self.update(1.0)

    def line(self, text: str) -> None:
        """A line that stays: an evaluation, a checkpoint."""
        if self._bar is not None:
            self._bar.console.print(f"{self._title}: {text}", markup=False, highlight=False)
        else:
            print(f"{self._title}: {text}", file=self._stream, flush=True)
