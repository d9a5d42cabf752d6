"""What speculation counts and learns, and where a context leaves no room for it."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "generate"))
from small_world import small_parts

from hyperbagel.core.errors import Notice
from hyperbagel.generate.session import Session
from hyperbagel.speculative.adaptive import DARING, TRIAL_DEPTH, Adaptive
from hyperbagel.speculative.budget import SHORTEST_PAUSE, Costs, DraftCost, Record, after_round, best_depth, least_chance
from hyperbagel.speculative.costs import READ, measure_costs
from hyperbagel.speculative.decode import Rounds, decode
from hyperbagel.speculative.drafters.expand import best_nodes, grow
from hyperbagel.speculative.drafters.lookup import Lookup
from hyperbagel.speculative.types import Draft, Seen, Speculated


def test_an_answer_is_drafted_as_long_as_a_whole_draft_fits_behind_it() -> None:
    session = Session.new(small_parts())
    session.add_text("a car")
    fits = session.room() - 1 - Lookup().width
    assert isinstance(decode([session], max_tokens=fits, drafter=Lookup())[0], Speculated)
    with pytest.warns(Notice, match=f"at most {fits} to have one"):
        assert not isinstance(decode([session], max_tokens=fits + 1, drafter=Lookup())[0], Speculated)


def test_a_single_token_warns_of_nothing() -> None:
    session = Session.new(small_parts())
    while session.room() > 8:
        session.add_text("a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode([session], max_tokens=1, drafter=Lookup())


def test_lookup_drafts_no_more_than_it_is_asked_for() -> None:
    session, lookup = Session.new(small_parts()), Lookup()
    lookup.begin([session], 0.0, ())
    draft = lookup.propose(Seen(session.cache, [0], [4], [[5, 6, 7, 5]], torch.tensor([6]), torch.tensor([4])), 2)
    assert draft.tokens.tolist() == [[7, 5]]
    draft = lookup.propose(Seen(session.cache, [4], [5], [[6, 8, 6, 9, 5]], torch.tensor([6]), torch.tensor([9])), 1)
    assert draft.tokens.tolist() == [[8]]  # 9 followed 6 last, but 8 followed 5 6


def test_a_pause_is_short_again_after_a_round_that_paid() -> None:
    records = {"a": Record(0.5, 1.0)}
    for _ in range(3):
        after_round(records, "a", 1.0)
    assert records["a"].pause == 8 * SHORTEST_PAUSE
    records["a"].tokens = 2.0
    after_round(records, "a", 1.0)
    assert (records["a"].wait, records["a"].pause) == (0, SHORTEST_PAUSE)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_both_rows_of_a_round_are_learnt_from_by_temperature(temperature: float) -> None:
    parts = small_parts()
    costs = Costs(((1, 1.0), (16, 1.1)), {"lookup": DraftCost(0.01)})
    adaptive = Adaptive({"lookup": Lookup()}, {"lookup": (0.9,)}, costs=costs)
    sessions = [Session.new(parts) for _ in range(2)]
    adaptive.begin(sessions, temperature, [torch.Generator().manual_seed(i) for i in range(2)])
    seen = Seen(sessions[0].cache, [0, 0], [0, 0], [[5, 6, 7, 5]] * 2, torch.tensor([6, 6]), torch.tensor([4, 4]))
    assert adaptive.propose(seen, 8).tokens.shape[1] > 1
    adaptive.end([1, 3])
    [(key, phase)] = adaptive.phases.items()
    assert key[1] == (temperature > 0) and phase.acceptance["lookup"].tried[0] > 5.5  # 4 by its prior, and both rows' trials


def test_a_draft_is_as_long_as_its_surest_row_needs() -> None:
    sure, unsure = torch.tensor([[20.0, 0, 0, 0]]), torch.zeros(1, 4)
    for rows in (torch.stack([sure, unsure]), torch.stack([unsure, sure])):
        assert best_nodes([grow(None, rows, 4)], 4, threshold=0.5).tokens.shape[1] == 1
    chances = torch.tensor([[[0.9, 0.1]], [[0.5, 0.5]]])  # the second in the mean: 0.3
    assert [best_nodes([grow(None, chances.log(), 2)], 2, threshold).tokens.shape[1] for threshold in (0.25, 0.35)] == [2, 1]


class Told:
    """Drafts what it is told to, and keeps how it was asked."""

    taps, width, depth, draws, threshold = (), 8, 8, False, 0.0

    def __init__(self, *rows: list[int]) -> None:
        self.rows, self.asked = torch.tensor(rows), list[tuple[int, float]]()

    def begin(self, *given: object) -> None: ...

    def propose(self, seen: Seen, limit: int) -> Draft:
        self.asked.append((limit, self.threshold))
        return Draft(self.rows)

    def narrow(self, rows: list[int], counts: object) -> None:
        self.rows = self.rows[rows]

    def end(self, counts: object) -> None: ...


COSTS = Costs(((1, 1.0), (16, 4.0)), {"told": DraftCost(0.5, 0.1, start=0.25)})


def budget(told: Told, prior: float = 0.9) -> tuple[Adaptive, list[Session]]:
    parts = small_parts()
    adaptive, sessions = Adaptive({"told": told}, {"told": (prior,)}, costs=COSTS), [Session.new(parts) for _ in told.rows]
    for session in sessions:
        session.add_text("a car")
    adaptive.begin(sessions, 0.0, [])
    return adaptive, sessions


def seen(sessions: list[Session], start: int = 0, counts: int | None = None) -> Seen:
    n, b = sessions[0].cache.lengths[0] if counts is None else counts, len(sessions)
    return Seen(sessions[0].cache, [start] * b, [n] * b, [[5]] * b, torch.full((b,), 6), torch.full((b,), start + n))


def test_a_trial_is_no_shorter_than_two_and_no_longer_than_what_is_left() -> None:
    for left, asked in ((8, TRIAL_DEPTH), (1, 1)):
        told = Told([7])
        adaptive, sessions = budget(told, prior=0.01)  # hopeless: best not drafted at all
        adaptive.propose(seen(sessions), left)
        [(depth, threshold)] = told.asked
        assert depth == asked and threshold == DARING * least_chance(COSTS, "told", 1 / COSTS.plain, told.width)


def test_columns_that_no_row_fills_are_not_read() -> None:
    adaptive, sessions = budget(Told([7, -1, -1], [7, 8, -1]))
    assert adaptive.propose(seen(sessions), 8).tokens.tolist() == [[7, -1], [7, 8]]


def test_what_is_learnt_goes_by_how_far_an_answer_has_come() -> None:
    adaptive, sessions = budget(Told([7, 8]))
    context, found = sessions[0].cache.lengths[0], []
    for answered in (0, 1, 2, 3, 4, 50):
        adaptive.propose(seen(sessions) if not answered else seen(sessions, context + answered - 1, 1), 8)
        assert adaptive.last is not None
        found.append(([key[2] for key, phase in adaptive.phases.items() if phase is adaptive.last.phase], adaptive.last.first))
    assert found == [([0], 6), ([1], None), ([2], None), ([2], None), ([3], None), ([3], None)]
    first, later = (adaptive._phase(far).records["told"] for far in (0, 1))
    fresh, second = (budget(Told([7]))[0]._phase(far).records["told"].seconds for far in (0, 1))
    assert fresh == pytest.approx(second + 0.25) and first is not later  # a request's first draft reads its context


@pytest.mark.parametrize(("unit", "times"), [(0.001, 5), (1.0, 2)])
def test_costs_are_the_fastest_of_each_and_a_first_draft_s_are_told_apart(unit: float, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of its own: reading n tokens takes n units or, every other time, twice as long. What takes seconds is measured once."""
    passed, met = [0.0], Counter[int]()

    class Slow(Told):
        taps, fresh = (0,), True

        def begin(self, *given: object) -> None:
            assert given[1] == 1.0
            self.fresh = True

        def propose(self, seen: Seen, limit: int) -> Draft:
            passed[0] += unit * (0.5 + 0.1 * (limit - 1) + 4.0 * self.fresh)
            self.fresh = False
            return Draft(self.rows)

    own = Rounds.round

    def timed(work: Rounds) -> None:
        read = work.drafter.read  # type: ignore[attr-defined]
        met[read] += 1
        passed[0] += unit * read * (1 + met[read] % 2)
        own(work)

    monkeypatch.setattr(Rounds, "round", timed)
    monkeypatch.setattr("hyperbagel.speculative.costs._clock", lambda device: lambda: passed[0])
    session = Session.new(small_parts(), (0,))
    session.add_text("a car")
    costs = measure_costs(session, {"slow": Slow([7])}, 1, sampled=True)
    assert dict(costs.verify) == pytest.approx({n: unit * n for n in READ}) and met[READ[-1]] == times
    draft = costs.draft["slow"]
    assert (draft.first, draft.more, draft.start) == pytest.approx((0.5 * unit, 0.1 * unit, 4.0 * unit))


def test_a_drafter_is_believed_to_be_as_fast_as_at_its_best_depth() -> None:
    record = budget(Told([7]), prior=0.8)[0]._phase(1).records["told"]
    depth, speed = best_depth(COSTS, "told", [0.8] * 8)
    assert 0 < depth < 8 and record.speed == pytest.approx(speed)


def test_rows_that_leave_have_taught_what_they_could() -> None:
    """The last draft is counted for all rows, those that are over too; then the rows that stay are shown what they had not seen."""
    told = Told([7, 8], [7, 8], [7, 8])
    adaptive, sessions = budget(told)
    context = sessions[0].cache.lengths[0]
    adaptive.propose(seen(sessions), 8)
    phase = adaptive.last.phase if adaptive.last else None
    assert phase is not None
    before = list(phase.acceptance["told"].tried)
    adaptive.news["told"] = replace(seen(sessions), counts=[context, context + 1, context + 2], ids=[[1], [2], [3]])
    adaptive.narrow([2], [3, 1, 3])
    tried = phase.acceptance["told"].tried
    assert tried[0] - before[0] == pytest.approx(3, abs=0.5) and adaptive.last is None  # by three rows, with what is forgotten
    news = adaptive.news["told"]
    assert news is not None and (news.counts, news.ids, news.root.shape) == ([context + 2], [[3]], (1,))
    assert adaptive.contexts == [context] and len(told.rows) == 1


@pytest.mark.parametrize("known", [False, True])
def test_a_smaller_batch_goes_by_its_own_costs_if_they_are_known(known: bool) -> None:
    """Else by those of the batch that it was, and learns nothing for smaller ones, where other costs will hold."""
    told = Told(*[[7, 8]] * 4)
    adaptive, sessions = budget(told)
    small = Costs(((1, 0.5), (16, 2.0)), COSTS.draft)
    adaptive.given, adaptive.measured = None, {(4, False): COSTS} | ({(1, False): small} if known else {})
    adaptive.begin(sessions, 0.0, [])
    adaptive.propose(seen(sessions), 8)
    adaptive.narrow([1], [1] * 4)
    assert adaptive.costs is (small if known else COSTS)
    adaptive.propose(seen(sessions[:1], 20, 1), 8)
    assert {key[0] for key in adaptive.phases} == ({4, 1} if known else {4})


def test_a_smaller_batch_s_costs_may_come_from_disk() -> None:
    asked = []

    class Kept:
        def load(self, drafters: object, size: int, sampled: bool) -> Costs | None:
            asked.append((size, sampled))
            return COSTS if size == 1 else None

    adaptive, sessions = budget(Told(*[[7, 8]] * 4))
    adaptive.given, adaptive.kept = None, Kept()  # type: ignore[assignment]
    adaptive.measured = {(4, False): replace(COSTS)}
    adaptive.begin(sessions, 0.0, [])
    adaptive.narrow([0, 3], [1] * 4)
    assert asked == [(2, False)] and adaptive.size == 4
    adaptive.narrow([0], [1] * 2)
    assert asked[1:] == [(1, False)] and adaptive.size == 1 and adaptive.costs is COSTS
