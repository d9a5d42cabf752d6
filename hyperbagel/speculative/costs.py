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

READ = (1, 4, 8, 16)  # tokens that the target reads
NEWS = 3  # slots that are new to a drafter when it is asked: as many as a round yields
DRAFTED = (1, 8)  # depths drafted; a straight line through both gives DraftCost
REPEATS = 4  # after a warm-up; the fastest counts


class _Probe:
    """Times a drafter at a given depth, then drafts something else: `read` - 1 tokens that are hardly ever right. At depth 0 the drafter is
    not asked, and is shown later what it missed."""

    def __init__(self, drafter: Drafter | None, taps: tuple[int, ...], clock: Callable[[], float]) -> None:
        self.drafter, self.taps, self.clock = drafter, taps, clock
        self.width, self.threshold = max(READ), 0.0
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
        # no q: a draft that was not drawn, which sampling accepts with the target's own probability of it
        return Draft(seen.root.new_zeros(len(seen.root), self.read - 1))

    def end(self, counts: Sequence[int]) -> None:
        """It learns nothing."""


def _clock(device: torch.device) -> Callable[[], float]:
    """Process time where one thread does all the work, so that a busy machine does not count; else `hardware.clock`."""
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return time.process_time
    return partial(clock, device)


Found = dict[tuple[int, int], list[tuple[float, float]]]  # by turn (depth drafted, tokens read): seconds of (draft, rest of the round)


@torch.inference_mode()
def measure_costs(
    session: Session, drafters: Mapping[str, Drafter], rows: int, sampled: bool = False, graphs: GraphRunner | None = None
) -> Costs:
    """Costs for `rows` rows, greedy or sampled, after contexts like `session`'s, which has the taps of all `drafters` and stays as it is.

    Several rows get different lengths, as those of requests have: the mask that they need costs too. Sizes take turns, so that other load
    on the machine hits all of them, and the fastest of each counts. graphs: the runner that verifies drafts when requests are served.
    """
    now = _clock(session.parts.model.device)
    shorter = [session.cache.prefix(max(1, session.cache.lengths[0] - i)) for i in range(1, rows)]
    sessions = [session, *(replace(session, cache=cache) for cache in shorter)]
    taps, generators = session.cache.taps, [torch.Generator().manual_seed(i) for i in range(rows)]

    def rounds(probe: _Probe, turns: Sequence[tuple[int, int]], repeats: int, before: int = 0) -> Found:
        """Each turn (depth drafted, tokens read) `repeats` times, in one request. before: rounds without a draft ahead of each."""
        most = repeats * sum(read + 1 + 2 * before for _, read in turns)
        # no token has the id -1: no answer ends early
        work = Rounds(sessions, most, float(sampled), generators, None, False, probe, im_end=-1, graphs=graphs)
        found: Found = {turn: [] for turn in turns}
        try:
            for _ in range(repeats):
                for turn in turns:
                    probe.depth, probe.read = 0, 1
                    for _ in range(before):
                        work.round()
                    probe.depth, probe.read = turn
                    start = now()
                    work.round()
                    found[turn].append((probe.seconds, now() - start - probe.seconds))
        finally:
            work.cache.truncate(work.before)
        return found

    def times(probe: _Probe, turns: Sequence[tuple[int, int]]) -> dict[tuple[int, int], tuple[float, float]]:
        """The fastest (draft, rest of the round) of each turn, after a warm-up."""
        found = rounds(probe, turns, REPEATS + 1, before=0 if probe.drafter is None else NEWS - 1)
        return {turn: (min(d for d, _ in timed[1:]), min(r for _, r in timed[1:])) for turn, timed in found.items()}

    def start_seconds(probe: _Probe) -> float:
        """The fastest first draft of a request, before which the drafter reads the whole context."""
        turn = DRAFTED[0], 1
        return min(rounds(probe, [turn], 1)[turn][0][0] for _ in range(REPEATS))

    rests = times(_Probe(None, taps, now), [(0, read) for read in READ])
    # a round of more tokens cannot be cheaper: a measurement that says so is noise
    verify = tuple(zip(READ, accumulate((rests[0, read][1] for read in READ), max), strict=True))
    draft = {}
    for name, drafter in drafters.items():
        depths = DRAFTED[0], min(DRAFTED[1], drafter.depth)
        probe = _Probe(drafter, taps, now)
        drafts = times(probe, [(depth, 1) for depth in depths])
        first, second = (drafts[depth, 1][0] for depth in depths)
        more = max(0.0, (second - first) / max(1, depths[1] - depths[0]))
        draft[name] = DraftCost(first, more, max(0.0, start_seconds(probe) - first))
    return Costs(verify, draft)
