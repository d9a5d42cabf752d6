"""Seconds of drafts and of the target's forwards, measured on this machine with the serving code (half a second on an AVX2 core).

Shape legend: B rows, n tokens that the target reads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate

import torch

from hyperbagel.core.hardware import clock
from hyperbagel.generate.graphs import GraphRunner
from hyperbagel.generate.session import Session
from hyperbagel.speculative.budget import Costs, DraftCost
from hyperbagel.speculative.decode import Rounds
from hyperbagel.speculative.types import Draft, Drafter, Seen

READ = (1, 4, 8, 16)  # tokens that the target reads; half of these rounds before each draft, so that it meets as many new slots as usual
DRAFTED = (1, 8)  # depths drafted; a straight line through both gives DraftCost
REPEATS = 4  # after a warm-up; the fastest counts
ENOUGH = 2.0  # seconds after which nothing is measured more than once: what takes long is little disturbed


class _Probe:
    """Times a drafter at a given depth, then drafts something else: `read` - 1 tokens that are hardly ever right. At depth 0 the drafter is
    not asked, and is shown later what it missed."""

    def __init__(self, drafter: Drafter | None, taps: tuple[int, ...], clock: Callable[[], float]) -> None:
        self.drafter, self.taps, self.clock = drafter, taps, clock
        self.width, self.draws, self.threshold = max(READ), False, 0.0
        self.depth, self.read, self.seconds = 1, 1, 0.0
        self.news: Seen | None = None

    def begin(self, sessions: Sequence[Session], temperature: float, generators: Sequence[torch.Generator]) -> None:
        self.news = None
        if self.drafter is not None:
            self.drafter.begin(sessions, temperature, generators)
            self.drafter.threshold = 0.0
            if hasattr(self.drafter, "im_end"):
                self.drafter.im_end = -1  # a drafter that believes the answer to be over would stop short

    def propose(self, seen: Seen, limit: int) -> Draft:
        self.news = seen.after(self.news)
        start = self.clock()
        if self.drafter is not None and self.depth:
            self.drafter.propose(self.news, self.depth)
            self.news = None
        self.seconds = self.clock() - start
        return Draft(seen.root.new_zeros(len(seen.root), self.read - 1))

    def narrow(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        """Its rows never end."""

    def widen(self, sessions: Sequence[Session], generators: Sequence[torch.Generator], counts: Sequence[int]) -> None:
        """Nor does any join."""

    def end(self, counts: Sequence[int]) -> None:
        """It learns nothing."""


def _clock(device: torch.device) -> Callable[[], float]:
    """Process time where one thread does all the work, so that a busy machine does not count; else `hardware.clock`."""
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return time.process_time
    return partial(clock, device)


Turn = tuple[int, int]  # (depth drafted, tokens read)
Found = dict[Turn, list[tuple[float, float]]]  # seconds of (draft, rest of the round)


@torch.inference_mode()
def measure_costs(
    session: Session, drafters: Mapping[str, Drafter], rows: int, sampled: bool = False, graphs: GraphRunner | None = None
) -> Costs:
    """Costs for `rows` rows, greedy or sampled, after contexts like `session`'s, which has the taps of all `drafters` and stays as it is.

    Several rows get different lengths, as those of requests have: the mask that they need costs too. Sizes and drafts take turns, so that
    other load on the machine hits all of them, and the fastest of each counts.
    graphs: the runner that verifies drafts when requests are served.
    """
    now = _clock(session.parts.model.device)
    shorter = [session.cache.prefix(max(1, session.cache.lengths[0] - i)) for i in range(1, rows)]
    sessions = [session, *(replace(session, cache=cache) for cache in shorter)]
    taps, generators = session.cache.taps, [torch.Generator().manual_seed(i) for i in range(rows)]

    def rounds(probe: _Probe, turns: Sequence[Turn], repeats: int) -> Found:
        """All turns in order, `repeats` times, in one request."""
        # no token has the id -1: no answer ends early
        most = repeats * sum(read + 1 for _, read in turns)
        work = Rounds(sessions, most, float(sampled), generators, None, False, probe, im_end=-1, graphs=graphs)
        found: Found = {turn: [] for turn in turns}
        begun = now()
        try:
            for done in range(repeats):
                if done > 1 and now() - begun > ENOUGH:
                    break
                for turn in turns:
                    probe.depth, probe.read = turn
                    start = now()
                    work.round()
                    found[turn].append((probe.seconds, now() - start - probe.seconds))
        finally:
            work.cache.truncate(work.before)
        return found

    rests: dict[int, list[float]] = {read: [] for read in READ}  # seconds of rounds without a draft

    def timed(probe: _Probe, turns: Sequence[Turn]) -> Found:
        """All turns, `REPEATS` times after a warm-up; rounds without a draft go into `rests`."""
        found = {turn: seconds[1:] for turn, seconds in rounds(probe, turns, REPEATS + 1).items()}
        for (depth, read), seconds in found.items():
            if not depth:
                rests[read] += [rest for _, rest in seconds]
        return found

    reads, draft = [(0, read) for read in READ], {}
    for name, drafter in drafters.items():
        probe, one, other = _Probe(drafter, taps, now), (DRAFTED[0], 1), (min(DRAFTED[1], drafter.depth), 1)
        half = len(reads) // 2 if drafter.taps else 0  # a drafter that reads no hidden states has no news to read
        found = timed(probe, [*reads[:half], one, *reads[half : 2 * half], other])
        first, second = (min(seconds for seconds, _ in found[turn]) for turn in (one, other))
        more = max(0.0, (second - first) / max(1, other[0] - one[0]))
        # a request's first draft, before which the drafter reads the whole context
        start = min(rounds(probe, [one], 1)[one][0][0] for _ in range(REPEATS)) if drafter.taps else first
        draft[name] = DraftCost(first, more, max(0.0, start - first))
    if not all(rests.values()):
        timed(_Probe(None, taps, now), reads)
    # a round of more tokens cannot be cheaper: a measurement that says so is noise
    verify = tuple(zip(READ, accumulate((min(rests[read]) for read in READ), max), strict=True))
    return Costs(verify, draft)
