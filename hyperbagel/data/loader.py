"""A mixture of sources as a stream of groups of samples: weighted, sharded by rank, prefetched by workers, exactly resumable.

No generator runs along: the source of group n is a pure function of (seed, n), and a source's sample one of (seed, index). So the position
is a handful of counters, and the order does not depend on the number of workers.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, Literal, Protocol

import numpy as np

from hyperbagel.core.errors import InputError
from hyperbagel.data.plan import Sample

log = logging.getLogger(__name__)
SHOWN = 5  # broken rows that are named one by one; further ones are only counted


class BrokenRow(Exception):
    """A row of a source cannot be used; it is skipped, counted and, at first, named in a warning."""


class Source(Protocol):
    """Random access to samples. Must be picklable for worker processes."""

    def __len__(self) -> int:
        """The number of rows in one pass; 0 for an endless source."""
        ...

    def sample(self, index: int) -> Sample:
        """Sample `index` (0, 1, ... without end; each pass is in a new order): a pure function of the index. Raises BrokenRow."""
        ...


Check = Callable[[Sample], None]  # raises BrokenRow


@dataclass(frozen=True)
class Checked:
    """A source whose samples must also pass a check."""

    source: Source
    check: Check

    def __len__(self) -> int:
        return len(self.source)

    def sample(self, index: int) -> Sample:
        sample = self.source.sample(index)
        self.check(sample)
        return sample


@dataclass(frozen=True)
class Group:
    """Consecutive samples of one source."""

    source: str
    samples: list[Sample]
    broken: list[str]  # what was skipped on the way, one line each
    made: Any = None  # what the loader's `prepare` made of the samples, which are then not kept


Prepare = Callable[[str, list[Sample], int], Any]  # (source, samples, number of the group) -> Group.made


@dataclass(frozen=True)
class Phase:
    """Mixture weights until a group number (None: to the end)."""

    until: int | None
    weights: Mapping[str, float]


def draw_source(phases: Sequence[Phase], seed: int, n: int) -> str:
    """The source of group n."""
    phase = next((p for p in phases if p.until is None or n < p.until), phases[-1])
    names = [name for name, weight in phase.weights.items() if weight > 0]
    weights = np.array([phase.weights[name] for name in names])
    rng = np.random.default_rng([seed, n])
    return names[int(rng.choice(len(names), p=weights / weights.sum()))]


def read_group(
    source: Source, name: str, first: int, size: int, rank: int, world: int, number: int = 0, *, prepare: Prepare | None = None
) -> Group:
    """`size` samples of this rank's shard from index `first` on; a broken row is replaced by the next one. prepare: see Loader.

    Raises:
        InputError: the source has no usable row: a thousand in a row (of a small source, over many passes) were broken.
    """
    limit = 1000
    samples: list[Sample] = []
    broken: list[str] = []
    for i in range(first, first + size):
        for attempt in range(limit):
            try:
                # attempts go on within this rank's shard, so that no two ranks read the same row
                samples.append(source.sample((i + attempt) * world + rank))
                break
            except BrokenRow as error:
                broken.append(str(error))
        else:
            raise InputError(
                f"source {name!r}: got nothing but broken rows {limit} times one after the other (last: {broken[-1]}), "
                "expected rows that can be read, check the files"
            )
    if prepare is not None:
        return Group(name, [], broken, prepare(name, samples, number))
    return Group(name, samples, broken)


def count_broken(broken: Counter[str], group: Group) -> None:
    """Adds a group's skipped rows to the count of their source, and warns of the first few by name."""
    for line in group.broken:
        broken[group.source] += 1
        if broken[group.source] <= SHOWN:
            log.warning("source %r: skipped a broken row: %s", group.source, line)
        elif broken[group.source] == SHOWN + 1:
            log.warning("source %r: more broken rows are skipped and only counted", group.source)


_SOURCES: Mapping[str, Source] = {}  # of a worker process, set once when it starts
_PREPARE: Prepare | None = None  # likewise


def _start_process(sources: Mapping[str, Source], prepare: Prepare | None) -> None:
    global _SOURCES, _PREPARE
    _SOURCES, _PREPARE = sources, prepare


def _read_in_process(name: str, *where: int) -> Group:
    return read_group(_SOURCES[name], name, *where, prepare=_PREPARE)


class Loader:
    """`next_group` hands out groups; `state_dict` is the position after the last one that was handed out.

    Args:
        sources: by name.
        phases: mixture weights, in order of `until`.
        group: samples per group, by source name.
        workers: 0 reads in the caller's thread; else that many groups are read at once and `2 * workers` are kept ready.
        kind: "process" for sources that are busy in Python (rendering), "thread" for files.
        rank, world: this process's shard. All ranks draw the same source for the same group.
        prepare: applied to each group's samples where they are read, so by the workers; a pure function, picklable for processes.
    Raises:
        InputError: a weight or phase makes no sense.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        phases: Sequence[Phase],
        group: Mapping[str, int],
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        kind: Literal["thread", "process"] = "thread",
        prepare: Prepare | None = None,
    ) -> None:
        _check(sources, phases)
        self.prepare = prepare
        self.sources, self.phases, self.group = dict(sources), list(phases), dict(group)
        self.seed, self.rank, self.world, self.workers = seed, rank, world, workers
        self.broken: Counter[str] = Counter()  # rows skipped so far, by source
        self.pool: Executor | None = None
        if workers and kind == "thread":
            self.pool = ThreadPoolExecutor(workers, thread_name_prefix="loader")
        elif workers:  # spawn: a fork would copy the locks of the caller's threads
            self.pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_process, (self.sources, prepare))
        self._go_to(0, {})

    def _go_to(self, n: int, next_index: Mapping[str, int]) -> None:
        self.done, self.done_index = n, Counter(next_index)  # handed out
        self.asked, self.asked_index = n, Counter(next_index)  # given to workers
        self.ready: deque[tuple[str, Future[Group]]] = deque()

    def _ask(self) -> tuple[str, tuple[Any, ...]]:
        name = draw_source(self.phases, self.seed, self.asked)
        where = (name, self.asked_index[name], self.group[name], self.rank, self.world, self.asked)
        self.asked += 1
        self.asked_index[name] += self.group[name]
        return name, where

    def next_group(self) -> Group:
        """The next group; blocks until it is read. Raises what its source raised."""
        if self.pool is None:
            name, where = self._ask()
            group = read_group(self.sources[name], *where, prepare=self.prepare)
        else:
            while len(self.ready) < 2 * self.workers:
                name, where = self._ask()
                if isinstance(self.pool, ThreadPoolExecutor):
                    future = self.pool.submit(read_group, self.sources[name], *where, prepare=self.prepare)
                else:
                    future = self.pool.submit(_read_in_process, *where)
                self.ready.append((name, future))
            name, future = self.ready.popleft()
            group = future.result()
        self.done += 1
        self.done_index[name] += self.group[name]
        count_broken(self.broken, group)
        return group

    def state_dict(self) -> dict[str, Any]:
        """The position, ready for JSON."""
        return {"group": self.done, "next": dict(self.done_index), "broken": dict(self.broken), "size": self.group, "world": self.world}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a position. Raises InputError if it belongs to another mixture or number of ranks."""
        unknown = set(state["next"]) - set(self.sources)
        if unknown or state["world"] != self.world:
            raise InputError(
                f"resume: got a loader position of sources {sorted(state['next'])} on {state['world']} ranks, expected sources "
                f"{sorted(self.sources)} on {self.world}, resume with the recipe and the number of ranks that the run began with"
            )
        for _, future in self.ready:
            future.cancel()
        self.broken = Counter(state["broken"])
        self._go_to(state["group"], state["next"])

    def close(self) -> None:
        """Stop the workers."""
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)
            self.pool = None


def _check(sources: Mapping[str, Source], phases: Sequence[Phase]) -> None:
    if not phases:
        raise InputError("mixture: got no phase, expected at least one, add weights to the recipe")
    for before, after in itertools.pairwise(phases):
        if before.until is None or (after.until is not None and after.until <= before.until):
            raise InputError(f"mixture: got phases until {before.until} then {after.until}, expected growing numbers, only the last open")
    for phase in phases:
        unknown = set(phase.weights) - set(sources)
        if unknown:
            raise InputError(f"mixture: got weights for {sorted(unknown)}, expected sources among {sorted(sources)}, correct the names")
        if any(w < 0 for w in phase.weights.values()) or not sum(phase.weights.values()) > 0:
            raise InputError(f"mixture: got weights {dict(phase.weights)}, expected numbers >= 0 of which one is > 0, correct them")
