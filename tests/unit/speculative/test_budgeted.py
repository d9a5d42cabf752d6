"""What a budget over several drafters decides from round to round and tells of a request."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_bookkeeping import COSTS, Told, budget, seen, small_parts

from hyperbagel.generate.session import Session
from hyperbagel.speculative import adaptive as module
from hyperbagel.speculative.adaptive import DARING, Adaptive
from hyperbagel.speculative.budget import Costs, DraftCost, Record, least_chance
from hyperbagel.speculative.drafters.config import DrafterConfig
from hyperbagel.speculative.drafters.folder import make_drafter, make_module
from hyperbagel.speculative.drafters.lookup import Lookup
from hyperbagel.speculative.types import Seen, Speculated, Stats


class Drawn(Told):
    draws = True


class Reads(Told):
    """Looks at hidden states, so that looking costs something."""

    taps = (0,)


def several(**told: Told) -> tuple[Adaptive, list[Session]]:
    """A budget over drafters, of which each is believed to be a little worse than the one before, and sessions for their rows."""
    costs = Costs(((1, 1.0), (16, 1.1)), dict.fromkeys(told, DraftCost(0.01)))
    adaptive = Adaptive(told, {name: (0.99 - 0.1 * i,) for i, name in enumerate(told)}, costs=costs)
    _, sessions = budget(next(iter(told.values())))
    adaptive.begin(sessions, 0.0, [])
    return adaptive, sessions


def test_where_a_trial_finds_nothing_at_no_cost_the_best_drafts() -> None:
    adaptive, sessions = several(something=Told([7]), nothing=Told([]))
    assert adaptive.propose(seen(sessions), 8).tokens.tolist() == [[7]]
    assert adaptive.rounds_drafted == {"nothing": 0, "something": 1} and adaptive.most_used() == "something"


def test_a_search_that_cost_something_is_a_round_though_it_found_nothing() -> None:
    adaptive, sessions = several(something=Told([7]), nothing=Reads([]))
    assert adaptive.propose(seen(sessions), 8).tokens.shape == (1, 0)
    assert adaptive.rounds_drafted == {"nothing": 1, "something": 0} and adaptive.last is not None


def test_a_request_is_told_of_its_own_rounds() -> None:
    adaptive, sessions = budget(Told([7]))
    adaptive.propose(seen(sessions), 8)
    assert adaptive.told(Speculated([5, 6], stats=Stats(rounds=1, tokens=2))) == {"tau": 2.0, "drafter": "told"}
    adaptive.begin(sessions, 0.0, [])
    assert adaptive.told(Speculated([5])) == {"tau": None, "drafter": "none"}


def test_one_that_draws_is_enough_for_another_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is chosen costs the same at any temperature."""
    monkeypatch.setattr(module, "measure_costs", lambda *given, **more: COSTS)
    _, sessions = budget(Told([7]))
    for drafters, keys in (({"a": Told([7])}, [False]), ({"a": Told([7]), "b": Drawn([7])}, [False, True])):
        adaptive = Adaptive(drafters)
        for temperature in (0.0, 1.0, 2.0):
            adaptive.prepare(sessions[0], 1, temperature)
        assert list(adaptive.measured) == [(1, sampled) for sampled in keys]


def test_a_finished_row_has_no_share_in_what_a_round_yielded() -> None:
    adaptive, sessions = budget(Told([7, 8], [7, 8]))
    adaptive.propose(seen(sessions), 8)
    assert adaptive.last is not None
    record = adaptive.last.phase.records["told"]
    before = record.tokens
    adaptive.end([3, 0])
    assert record.tokens == pytest.approx((before + 3) / 2)


def test_a_batch_has_come_as_far_as_its_longest_answer() -> None:
    adaptive, sessions = budget(Told([7, 8], [7, 8]))
    n, nothing = sessions[0].cache.lengths[0], torch.zeros(2)
    adaptive.propose(Seen(sessions[0].cache, [n + 3, n], [1, 0], [[5], []], nothing, nothing), 8)
    assert [far for _, _, far in adaptive.phases] == [3]


def test_a_first_round_is_as_daring_as_its_first_token_allows() -> None:
    told = Told([7])
    adaptive, sessions = budget(told)
    for record in ({}, {6: {"told": Record(2.0, 1.0)}}):  # 6 is the token that the target reads next
        firsts: dict[int, Any] = adaptive._phase(0).firsts
        firsts |= record
        adaptive.begin(sessions, 0.0, [])
        adaptive.propose(seen(sessions), 8)
    (_, before), (_, after) = told.asked
    assert after == DARING * least_chance(COSTS, "told", 2.0, told.width) != before


@pytest.mark.parametrize(("threshold", "nodes"), [(0.0, 9), (1.1, 0)])
@torch.inference_mode()
def test_a_grown_tree_has_no_nodes_that_are_too_unlikely(threshold: float, nodes: int) -> None:
    parts = small_parts()
    weights = make_module(DrafterConfig.for_target("eagle3", parts.model.config.llm))
    drafter = make_drafter(weights.eval(), parts.model, depth=3, nodes=9)
    session = Session.new(parts, drafter.taps)
    session.add_text("a car")
    drafter.begin([session], 0.0, ())
    drafter.threshold = threshold
    root, position = torch.tensor([parts.tokenizer.im_start]), torch.tensor([session.position])
    draft = drafter.propose(Seen(session.cache, [0], session.cache.lengths, [[]], root, position), 3)
    assert draft.tokens.shape == (1, nodes)


def test_lookup_looks_in_all_that_was_said() -> None:
    session, lookup = Session.new(small_parts()), Lookup()
    session.add_text("a red car")
    session.add_text("why")
    first = session.texts[0]
    lookup.begin([session], 0.0, ())
    draft = lookup.propose(Seen(session.cache, [0], [0], [[]], torch.tensor([first[1]]), torch.tensor([0])), 1)
    assert draft.tokens.tolist() == [[first[2]]]
