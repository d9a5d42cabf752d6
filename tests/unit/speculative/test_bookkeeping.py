"""What speculation counts and learns, and where a context leaves no room for it."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "generate"))
from small_world import small_parts

from hyperbagel.core.errors import Notice
from hyperbagel.generate.session import Session
from hyperbagel.speculative.adaptive import Adaptive
from hyperbagel.speculative.budget import SHORTEST_PAUSE, Costs, DraftCost, Record, after_round
from hyperbagel.speculative.decode import decode
from hyperbagel.speculative.drafters.expand import best_nodes, grow
from hyperbagel.speculative.drafters.lookup import Lookup
from hyperbagel.speculative.types import Seen, Speculated


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
