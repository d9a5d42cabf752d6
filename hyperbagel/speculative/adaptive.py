"""A drafter that decides every round which drafter drafts how much, if any: measured costs against running acceptance.

Answers stay the target's own whatever it decides, since any draft is verified. What it has learnt lasts from request to request.

Shape legend: B rows, N drafted nodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from hyperbagel.generate.decode import Decoded, taken
from hyperbagel.generate.graphs import GraphRunner
from hyperbagel.generate.session import Session
from hyperbagel.speculative.budget import Acceptance, Costs, Record, after_round, best_depth, choose, expected_tokens, least_chance
from hyperbagel.speculative.costs import measure_costs
from hyperbagel.speculative.kept_costs import KeptCosts
from hyperbagel.speculative.types import Draft, Drafter, Seen, Speculated

UNKNOWN = (0.6,)  # believed acceptance by depth of a drafter whose folder says nothing
DARING = 0.8  # factor on the threshold: drafters are right more often than they believe. Shipped one: 0.65 to 1 as fast, 0.5, 1.4 slower
TRIAL_DEPTH = 2  # least depth drafted, even where acceptance so far says that drafting does not pay
LATE = 3  # the last phase: rounds are grouped by answer tokens before them, 0, 1, 2 to 3, and 4 or more
FIRSTS = 1024  # most first tokens that are remembered
_TEXT = "what do you see? Name everything. " * 4  # the context in which costs are measured


@dataclass
class _Phase:
    """What is known of one phase of an answer: an answer may be one word, so its first rounds differ from later ones.

    firsts: records of rounds behind the token that a lone answer begins with. Behind "yes" mostly nothing follows, behind "there" a
    sentence. Of a token that no drafted round has followed, they say nothing more than `records`.
    """

    records: dict[str, Record]
    acceptance: dict[str, Acceptance]
    firsts: dict[int, dict[str, Record]] = field(default_factory=dict)  # the one that was added to last is last

    def behind(self, first: int | None) -> dict[str, Record]:
        """What a round goes by. first: the answer's first token, if it is a lone one's first round."""
        return self.records if first is None else self.firsts.get(first, self.records)

    def note(self, name: str, first: int | None, tokens: float, seconds: float, plain: float) -> None:
        """Counts a round that `name` drafted. first: as in `behind`; plain: tokens a second of plain decoding."""
        known = [self.records]
        if first is not None:
            own = self.firsts.pop(first, None) or {name: replace(record, seen=0) for name, record in self.records.items()}
            if len(self.firsts) >= FIRSTS:
                del self.firsts[next(iter(self.firsts))]
            self.firsts[first] = own
            known.append(own)
        for records in known:
            records[name].note(tokens, seconds)
            after_round(records, name, plain)


@dataclass
class _Last:
    """The last draft, until the next call says how much of it was accepted."""

    name: str
    phase: _Phase
    first: int | None  # see _Phase.behind
    draft: Draft  # its nodes are counted only afterwards: before its round that would be a wait for the device
    seconds: float  # what its round is expected to take


class Adaptive:
    """A `Drafter` over several. drafters: by name. priors: the acceptance by depth that each is believed to have at first."""

    threshold = 0.0

    def __init__(
        self,
        drafters: Mapping[str, Drafter],
        priors: Mapping[str, Sequence[float]] | None = None,
        costs: Costs | None = None,
        graphs: GraphRunner | None = None,
        kept: KeptCosts | None = None,
    ) -> None:
        """costs: used for every batch size instead of measured ones (tests). graphs: the runner that verifies drafts; None: eager. kept:
        costs that an earlier process measured; None: they are measured."""
        self.graphs, self.kept = graphs, kept
        self.drafters, self.priors = dict(drafters), dict(priors or {})
        self.taps: tuple[int, ...] = tuple(sorted({tap for drafter in drafters.values() for tap in drafter.taps}))
        self.width = max(drafter.width for drafter in drafters.values())
        self.depth = max(drafter.depth for drafter in drafters.values())
        self.draws = any(drafter.draws for drafter in drafters.values())
        self.given, self.measured = costs, dict[tuple[int, bool], Costs]()
        self.phases: dict[tuple[int, bool, int], _Phase] = {}  # (batch size, sampled, how far the answer has come)
        self.rounds_drafted = dict.fromkeys(drafters, 0)  # in the current request
        self.last: _Last | None = None
        self.news: dict[str, Seen | None] = dict.fromkeys(self.drafters)  # what each drafter has not been shown yet

    # -- costs -----------------------------------------------------------------------------------------------------------------

    def prepare(self, session: Session, rows: int, temperature: float = 0.0) -> Costs:
        """Costs at a batch size (rounded up to a power of two), measured at first use, unless they are kept. Of `session` only the model
        is used."""
        key = _size(rows), temperature > 0 and self.draws  # a choice costs nearly the same at any temperature
        costs = self._known(*key)
        if costs is None:
            context = Session.new(session.parts, self.taps)
            context.add_text(_TEXT)
            costs = self.measured[key] = measure_costs(context, self.drafters, *key, graphs=self.graphs)
            if self.kept is not None:
                self.kept.save(self.drafters, *key, costs)
        return costs

    def _known(self, size: int, sampled: bool) -> Costs | None:
        """The costs of a batch size, if they were measured or kept."""
        if self.given is not None:
            return self.given
        if (size, sampled) not in self.measured and self.kept is not None and (costs := self.kept.load(self.drafters, size, sampled)):
            self.measured[size, sampled] = costs
        return self.measured.get((size, sampled))

    def expected_rates(self, name: str) -> list[float]:
        """Acceptance by depth that drafter `name` is believed to have before it has drafted."""
        return Acceptance(self.priors.get(name, UNKNOWN)).rates(self.drafters[name].depth)

    # -- the Drafter protocol --------------------------------------------------------------------------------------------------

    def begin(self, sessions: Sequence[Session], temperature: float, generators: Sequence[torch.Generator]) -> None:
        self.costs = self.prepare(sessions[0], len(sessions), temperature)
        self.sampled, self.rows, self.size = temperature > 0, len(sessions), _size(len(sessions))
        self.contexts = [session.cache.lengths[0] for session in sessions]
        self.news, self.last = dict.fromkeys(self.drafters), None
        self.rounds_drafted = dict.fromkeys(self.drafters, 0)
        for drafter in self.drafters.values():
            drafter.begin(sessions, temperature, generators)

    def propose(self, seen: Seen, limit: int) -> Draft:
        self._learn(seen.counts)
        for other, news in self.news.items():
            self.news[other] = seen.after(news)
        answered = max(start + n - context for start, n, context in zip(seen.start, seen.counts, self.contexts, strict=True))
        phase = self._phase(min(LATE, answered.bit_length()))
        first = seen.roots()[0] if self.rows == 1 and not answered else None
        records = phase.behind(first)
        plain = 1 / self.costs.plain
        open_to = dict(records)
        while (name := choose(open_to, plain)) is not None:
            news = self.news[name]
            assert news is not None
            draft, asked = self._draft(name, phase.acceptance[name], records[name].speed, news, limit)
            if draft.tokens.shape[1] or not _free(self.drafters[name]):
                columns = draft.tokens.shape[1]
                depth = max(1, min(columns, asked))  # a tree has more columns than depths
                seconds = self.costs.round_seconds(name, depth, columns + 1, fresh=not any(news.start))
                self.last = _Last(name, phase, first, draft, seconds)
                self.rounds_drafted[name] += 1
                return draft
            del open_to[name]  # finding nothing cost nothing; another one may know more
        after_round(records, None, plain)
        return Draft(seen.root.new_empty(len(seen.root), 0))

    def narrow(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        self._resize(len(rows), counts)
        self.contexts = taken(self.contexts, rows)
        self.news = {name: None if news is None else news.of_rows(rows) for name, news in self.news.items()}
        for drafter in self.drafters.values():
            drafter.narrow(rows, counts)

    def widen(self, sessions: Sequence[Session], generators: Sequence[torch.Generator], counts: Sequence[int]) -> None:
        self._resize(self.rows + len(sessions), counts)
        self.contexts = [*self.contexts, *(session.cache.lengths[0] for session in sessions)]
        self.news = {name: None if news is None else news.with_rows(len(sessions)) for name, news in self.news.items()}
        for drafter in self.drafters.values():
            drafter.widen(sessions, generators, counts)

    def _resize(self, rows: int, counts: Sequence[int]) -> None:
        """Learns what the batch has to teach so far, and goes on with another number of rows. Their costs are taken if they are known:
        measuring them now would cost more than they save."""
        self._learn(counts)
        self.rows = rows
        if (costs := self._known(_size(rows), self.sampled and self.draws)) is not None:
            self.size, self.costs = _size(rows), costs

    def end(self, counts: Sequence[int]) -> None:
        self._learn(counts)
        self.news = dict.fromkeys(self.drafters)  # they hold the target's cache
        for drafter in self.drafters.values():
            drafter.end(counts)

    def most_used(self) -> str:
        """The drafter of most rounds of the current request; "none" if there was none."""
        name = max(self.rounds_drafted, key=lambda name: self.rounds_drafted[name])
        return name if self.rounds_drafted[name] else "none"

    def told(self, out: Decoded) -> dict[str, Any]:
        """The fields tau and drafter of a result that it drafted last; none if it was decoded plainly after all."""
        if not isinstance(out, Speculated):
            return {}
        return {"tau": out.stats.tau if out.stats.rounds else None, "drafter": self.most_used()}

    # -- decisions -------------------------------------------------------------------------------------------------------------

    def _draft(self, name: str, acceptance: Acceptance, speed: float, seen: Seen, limit: int) -> tuple[Draft, int]:
        """A draft of `name`, as deep and as daring as costs, acceptance and its speed so far make worthwhile, and the depth asked for."""
        drafter = self.drafters[name]
        depth, _ = best_depth(self.costs, name, acceptance.rates(drafter.depth))
        drafter.threshold = DARING * least_chance(self.costs, name, max(speed, 1 / self.costs.plain), drafter.width)
        self.news[name] = None
        asked = min(limit, max(depth, TRIAL_DEPTH))
        draft = drafter.propose(seen, asked)
        if draft.tree is None and draft.tokens.device.type == "cpu":  # on a GPU the look would be a wait for the device
            used = max(draft.deepest(), default=0)
            if used < draft.tokens.shape[1]:
                draft = replace(draft, tokens=draft.tokens[:, :used])
        return draft, asked

    def _learn(self, counts: Sequence[int]) -> None:
        """Notes how the last draft fared: a row's new slots are its root and the accepted nodes; a finished row has none."""
        last, self.last = self.last, None
        if last is None:
            return
        name, phase = last.name, last.phase
        alive = [(n - 1, tried) for n, tried in zip(counts, last.draft.deepest(), strict=True) if n]
        for accepted, tried in alive:
            phase.acceptance[name].note(tried, accepted)
        if alive:
            tokens = 1 + sum(accepted for accepted, _ in alive) / len(alive)
            phase.note(name, last.first, tokens, last.seconds, 1 / self.costs.plain)

    def _phase(self, far: int) -> _Phase:
        """The records of phase `far` (see LATE) at this batch size; those of a new one start from the priors."""
        key = self.size, self.sampled, far
        if key not in self.phases:
            acceptance, records = {}, {}
            for name, drafter in self.drafters.items():
                acceptance[name] = Acceptance(self.priors.get(name, UNKNOWN))
                rates = acceptance[name].rates(drafter.depth)
                depth = max(1, best_depth(self.costs, name, rates)[0])
                seconds = self.costs.round_seconds(name, depth, depth + 1, fresh=far == 0)
                records[name] = Record(expected_tokens(rates[:depth]), seconds)
            self.phases[key] = _Phase(records, acceptance)
        return self.phases[key]


def _size(rows: int) -> int:
    """The next power of two."""
    return 1 << max(0, rows - 1).bit_length()


def _free(drafter: Drafter) -> bool:
    """Whether a search that finds nothing costs nothing: the drafter reads no hidden states."""
    return not drafter.taps
