"""The budget's arithmetic, and that it never holds on to what does not pay."""

from __future__ import annotations

import itertools
import random

import pytest

from hyperbagel.speculative.budget import (
    LONGEST_PAUSE,
    Acceptance,
    Costs,
    DraftCost,
    Record,
    after_round,
    best_depth,
    choose,
    expected_tokens,
    least_chance,
)

# seconds in units of a plain step: each further token read costs 0.05, a draft step 0.1
COSTS = Costs(((1, 1.0), (4, 1.15), (8, 1.35), (16, 1.75)), {"chain": DraftCost(0.2, 0.1), "block": DraftCost(0.3), "dear": DraftCost(3.0)})


def test_costs_between_and_beyond_the_measured() -> None:
    assert [COSTS.verify_seconds(n) for n in (1, 2.5, 4, 6, 8, 16, 24)] == pytest.approx([1.0, 1.075, 1.15, 1.25, 1.35, 1.75, 2.15])
    assert COSTS.round_seconds("chain", 3, 4) == pytest.approx(0.2 + 0.2 + 1.15)
    assert COSTS.round_seconds("block", 3, 4) == pytest.approx(0.3 + 1.15)
    assert Costs(((1, 2.0),)).verify_seconds(9) == 2.0


@pytest.mark.parametrize("name", ["chain", "block", "dear"])
@pytest.mark.parametrize("rate", [0.05, 0.3, 0.6, 0.8, 0.95])
def test_the_best_depth_is_the_best(name: str, rate: float) -> None:
    """Against all depths one by one, plain decoding (depth 0) among them."""
    rates = [rate] * 12
    speeds = [1.0] + [(1 - rate ** (d + 1)) / (1 - rate) / COSTS.round_seconds(name, d, d + 1) for d in range(1, 13)]
    depth, speed = best_depth(COSTS, name, rates)
    assert speed == pytest.approx(max(speeds)) and depth == speeds.index(max(speeds))
    assert expected_tokens(rates) == pytest.approx((1 - rate**13) / (1 - rate))


def test_hopeless_and_dear_drafts_are_not_made() -> None:
    assert best_depth(COSTS, "chain", [0.05] * 8)[0] == 0
    assert best_depth(COSTS, "dear", [0.6] * 8)[0] == 0
    assert best_depth(COSTS, "block", [0.9] * 8)[0] == 8


def test_a_token_is_drafted_while_it_pays() -> None:
    """The chance below which one more token lowers the rate of a chain, by trial: chances fall by depth, the stop maximises the rate."""
    chances = [0.95, 0.8, 0.6, 0.4, 0.25, 0.15, 0.08, 0.04]

    def speed(depth: int) -> float:
        return (1 + sum(chances[:depth])) / COSTS.round_seconds("block", depth, depth + 1)

    best = max(range(9), key=speed)
    limit = least_chance(COSTS, "block", speed(best), 8)
    assert sum(chance >= limit for chance in chances) == best
    assert least_chance(COSTS, "chain", 1.0, 8) == pytest.approx(0.4 / 8 + 0.1)
    assert least_chance(COSTS, "chain", 1e9, 8) == 1.0


def test_running_acceptance_follows_and_forgets() -> None:
    seen, rng = Acceptance((0.5,)), random.Random(0)
    for rate in (0.9, 0.2):
        for _ in range(400):
            accepted = next((d for d in range(6) if rng.random() > rate), 6)
            seen.note(6, accepted)
        assert seen.rates(2) == pytest.approx([rate] * 2, abs=0.15)
    assert Acceptance((0.5, 0.7)).rates(4) == [0.5, 0.7, 0.7, 0.7]
    deeper = Acceptance((0.8,))
    deeper.note(2, 2)
    assert deeper.rates(2)[1] > 0.8  # as depth 1, then accepted
    unchanged = Acceptance((0.5,))
    unchanged.note(0, 0)
    assert unchanged.rates(1) == [0.5]


def decode(rates: dict[str, float], rounds: int) -> float:
    """Seconds lost or won over plain decoding, a share, if `rates` are the true acceptances: drafts of 4 tokens, in the policy's hands."""
    rng = random.Random(1)
    records = {name: Record(2.5, COSTS.round_seconds(name, 4, 5)) for name in rates}
    tokens, seconds = 0.0, 0.0
    for _ in range(rounds):
        name = choose(records, 1.0)
        if name is None:
            tokens, seconds = tokens + 1, seconds + COSTS.plain
            after_round(records, None, 1.0)
            continue
        got = 1 + next((d for d in range(4) if rng.random() > rates[name]), 4)
        took = COSTS.round_seconds(name, 4, 5)
        tokens, seconds = tokens + got, seconds + took
        records[name].note(got, took)
        after_round(records, name, 1.0)
    return tokens / seconds


def test_it_hardly_loses_on_hopeless_text() -> None:
    """Two drafters that are never right cost 8 % of an answer of 80 tokens here, one 5 %, and less in a long one."""
    assert decode({"chain": 0.0, "block": 0.0}, 80) > 0.92
    assert decode({"block": 0.0}, 80) > 0.95
    assert decode({"chain": 0.0, "block": 0.0}, 2000) > 0.97


def test_it_wins_where_there_is_something_to_win() -> None:
    assert decode({"chain": 0.9, "block": 0.1}, 300) > 0.95 * decode({"chain": 0.9}, 300) > 1.8
    assert decode({"chain": 0.1, "block": 0.9}, 300) > 0.95 * decode({"block": 0.9}, 300) > 2


def test_what_was_slow_for_long_is_tried_again_and_the_other_way_round() -> None:
    records, trials, fast = {"block": Record(2.5, 2.0)}, [0], range(2000, 4900)
    for turn in range(5000):
        if choose(records, 1.0):
            trials.append(turn)
            records["block"].note(5.0 if turn in fast else 1.0, 2.0)
        after_round(records, "block" if trials[-1] == turn else None, 1.0)
    assert max(b - a for a, b in itertools.pairwise(trials)) <= LONGEST_PAUSE + 1
    assert trials[-50] in fast
