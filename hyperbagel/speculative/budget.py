"""How much to draft, from measured costs and running acceptance. Pure: seconds and counts in, decisions out.

A round that drafts k tokens takes draft(k) + verify(k + 1) seconds and yields 1 + a_1 + a_1 a_2 + ... + a_1 ... a_k tokens, a_d being the
chance that depth d is accepted if depth d - 1 was. Plain decoding yields one token in verify(1). Whatever yields most tokens a second is
done, plain decoding included.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul


@dataclass(frozen=True)
class DraftCost:
    """Seconds of a draft.

    first: reading the target's news and drafting one token, or a whole block. more: each further token. start: what reading the whole
    context costs on top, once per request.
    """

    first: float
    more: float = 0.0
    start: float = 0.0

    def seconds(self, depth: int) -> float:
        """Seconds of a draft of `depth` tokens, without `start`."""
        return self.first + self.more * max(0, depth - 1) if depth else 0.0


@dataclass(frozen=True)
class Costs:
    """Seconds of the parts of a round, at one batch size.

    verify: (tokens read, seconds of a round without its draft), by rising tokens; the first is (1, a plain step).
    """

    verify: tuple[tuple[int, float], ...]
    draft: Mapping[str, DraftCost] = field(default_factory=dict)
    known: dict[int, float] = field(default_factory=dict, compare=False, repr=False)  # memo of verify_seconds, asked every round

    @property
    def plain(self) -> float:
        """Seconds of a step of plain decoding."""
        return self.verify[0][1]

    def verify_seconds(self, n: int) -> float:
        """Seconds of reading n tokens, on the straight line through the two nearest measured sizes, between and beyond them."""
        if n not in self.known:
            self.known[n] = self._line(n)
        return self.known[n]

    def _line(self, n: int) -> float:
        if len(self.verify) == 1:
            return self.plain
        i = min(max(1, bisect_left(self.verify, (n, 0.0))), len(self.verify) - 1)
        (m0, s0), (m1, s1) = self.verify[i - 1 : i + 1]
        return s0 + (s1 - s0) * (n - m0) / (m1 - m0)

    def round_seconds(self, name: str, drafted: int, read: int, fresh: bool = False) -> float:
        """Seconds of a round in which `name` drafted `drafted` deep and the target read `read` tokens; `fresh`: with DraftCost.start."""
        return self.draft[name].seconds(drafted) + self.verify_seconds(read) + fresh * self.draft[name].start


def expected_tokens(rates: Sequence[float]) -> float:
    """1 + a_1 + a_1 a_2 + ...: tokens of a round, the target's own and the accepted drafts. rates: a_1, a_2, ..."""
    return 1.0 + sum(accumulate(rates, mul))


def best_depth(costs: Costs, name: str, rates: Sequence[float]) -> tuple[int, float]:
    """(depth, tokens a second) of the best chain of drafter `name` with acceptance `rates` by depth; depth 0 is plain decoding."""
    best = 0, 1 / costs.plain
    tokens, chance = 1.0, 1.0
    for depth, rate in enumerate(rates, 1):
        chance *= rate
        tokens += chance
        speed = tokens / costs.round_seconds(name, depth, depth + 1)
        if speed > best[1]:
            best = depth, speed
    return best


def least_chance(costs: Costs, name: str, speed: float, most: int) -> float:
    """The chance of acceptance, in [0, 1], below which one more token is not worth drafting: what its time yields at `speed` tokens/s.

    most: the most tokens drafted. The same for the next token of a chain, a block and a node of a tree (EAGLE's path probability).
    """
    marginal = (costs.verify_seconds(most + 1) - costs.plain) / most + costs.draft[name].more
    return min(1.0, max(0.0, marginal * speed))


class Acceptance:
    """Running acceptance by depth, slowly forgetting. A depth that was never tried takes the rate of the depth before."""

    def __init__(self, prior: Sequence[float] = (0.7,), weight: float = 4.0, memory: float = 48.0) -> None:
        """prior: rates believed at first, as if seen in `weight` trials. memory: number of trials that count."""
        self.tried = [weight] * len(prior)
        self.taken = [weight * rate for rate in prior]
        self.memory = memory

    def note(self, drafted: int, accepted: int) -> None:
        """Counts one row of one round: of `drafted` tokens in line the first `accepted` were accepted."""
        for depth in range(min(accepted + 1, drafted)):
            if depth == len(self.tried):
                last = self.taken[-1] / self.tried[-1]
                self.tried.append(2.0)
                self.taken.append(2.0 * last)
            keep = 1 - 1 / self.memory
            self.tried[depth] = keep * self.tried[depth] + 1
            self.taken[depth] = keep * self.taken[depth] + (depth < accepted)

    def rates(self, depth: int) -> list[float]:
        """Rates of depths 1 to `depth`."""
        known = [a / b for a, b in zip(self.taken, self.tried)]
        return [known[min(i, len(known) - 1)] for i in range(depth)]


SHORTEST_PAUSE, LONGEST_PAUSE = 4, 64  # rounds


@dataclass
class Record:
    """What one drafter has yielded so far: forgetting means of tokens and seconds per round, and when it may be tried again."""

    tokens: float
    seconds: float
    wait: int = 0  # rounds to go before the next trial
    pause: int = SHORTEST_PAUSE  # rounds of the next wait; doubles with each trial that did not pay
    seen: int = 1  # rounds in the means; the initial belief counts as one, or (0) only until the first round

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds

    def note(self, tokens: float, seconds: float, memory: int = 24) -> None:
        """Counts one round. memory: number of rounds that count."""
        self.seen = min(self.seen + 1, memory)
        self.tokens += (tokens - self.tokens) / self.seen
        self.seconds += (seconds - self.seconds) / self.seen


def choose(records: Mapping[str, Record], plain: float) -> str | None:
    """The drafter of this round, None for plain decoding. `plain`: tokens a second of the latter.

    The fastest so far drafts, unless another's wait is over: then that one gets a trial. One that is slower than plain decoding waits
    longer after each trial that did not pay, so that on hopeless text one round in 64 is lost.
    """
    best = max(records, key=lambda name: records[name].speed, default=None)
    if best is not None and records[best].speed <= plain:
        best = None
    due = [name for name in records if name != best and records[name].wait <= 0]
    return due[0] if due else best


def after_round(records: Mapping[str, Record], used: str | None, plain: float) -> None:
    """Shortens the waits by a round. The drafter just used waits twice as long as last time if another way is faster; else it is reset."""
    top = max([plain, *(r.speed for name, r in records.items() if name != used)])
    for name, record in records.items():
        if name != used:
            record.wait -= 1
        elif record.speed < top:
            record.wait = record.pause
            record.pause = min(2 * record.pause, LONGEST_PAUSE)
        else:
            record.wait, record.pause = 0, SHORTEST_PAUSE
