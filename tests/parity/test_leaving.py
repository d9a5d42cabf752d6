"""Finished rows leave their batch: what is left costs as many rows, and says, drafts and learns what it would have alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from parity_world import SERVED, STUBS, Shadow, Twins, batches, drafter_of, served, unlike_sessions

from hyperbagel.generate.decode import Decoded
from hyperbagel.generate.decode import decode as plain_decode
from hyperbagel.generate.graphs import GraphRunner
from hyperbagel.generate.session import Parts, Session
from hyperbagel.speculative.adaptive import Adaptive
from hyperbagel.speculative.budget import Costs, DraftCost
from hyperbagel.speculative.decode import decode
from hyperbagel.speculative.drafters.lookup import Lookup

TAPS = (0, 1, 2, 3, 4, 5)
ROWS, LENGTH = 9, 24


@pytest.fixture(scope="module")
def sessions(parts: Parts) -> list[Session]:
    return unlike_sessions(parts, ROWS, LENGTH, TAPS)


@pytest.fixture(scope="module")
def alone(sessions: list[Session]) -> list[Decoded]:
    return [plain_decode([session], max_tokens=LENGTH)[0] for session in sessions]


def said(outs: Sequence[Decoded]) -> list[tuple[list[int], str]]:
    return [(out.ids, out.finish_reason) for out in outs]


def one_by_one(rows: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(row) for row in range(rows)]


def expected_batches(steps: Sequence[int]) -> list[int]:
    """The rows of each step of plain decoding, from how many steps each answer takes."""
    return [sum(n >= step for n in steps) for step in range(1, max(steps) + 1)]


def test_the_fixture_has_answers_of_many_lengths(alone: list[Decoded]) -> None:
    lengths = sorted(len(out.ids) for out in alone)
    assert len(set(lengths)) >= 5 and lengths[-1] > 2 * lengths[ROWS // 2], lengths


@pytest.mark.parametrize("opened", [False, True])
def test_plain_decoding_goes_on_with_those_at_work(
    opened: bool, sessions: list[Session], alone: list[Decoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From im_start, and from first tokens that reading has given: an answer may then be over before the first step."""
    steps = [len(out.ids) + (out.finish_reason == "stop") for out in alone]
    given = [session.fork() for session in sessions]
    if opened:
        with torch.inference_mode():
            for session in given:
                session.open_answer()
    with batches(monkeypatch) as found:
        outs = plain_decode(given, max_tokens=LENGTH)
    assert said(outs) == said(alone)
    assert found == expected_batches(steps)[opened:] and min(found) <= ROWS // 4


def test_logits_of_each_row_are_its_own(sessions: list[Session], parts: Parts) -> None:
    together = plain_decode(sessions, max_tokens=LENGTH, keep_logits=True)
    again = decode(sessions, max_tokens=LENGTH, keep_logits=True, drafter=drafter_of("random tree", together, parts))
    for session, out, drafted in zip(sessions, together, again, strict=True):
        [one] = plain_decode([session], max_tokens=LENGTH, keep_logits=True)
        for logits in (out.logits, drafted.logits):
            torch.testing.assert_close(torch.stack(logits), torch.stack(one.logits), atol=2e-5, rtol=2e-5)


def test_tokens_are_told_of_the_right_row(sessions: list[Session], alone: list[Decoded], parts: Parts) -> None:
    for drafter in (None, drafter_of("echo", alone, parts)):
        told: list[list[int]] = [[] for _ in sessions]
        decode(sessions, max_tokens=LENGTH, on_token=lambda row, id_, told=told: told[row].append(id_), drafter=drafter)  # type: ignore[misc]
        assert told == [out.ids for out in alone]


@pytest.mark.parametrize("name", ["none", "echo", "lookup", "fixed shapes", "fixed shapes, block"])
@pytest.mark.parametrize("opened", [False, True])
def test_an_answer_is_handed_over_when_it_is_whole(
    opened: bool, name: str, sessions: list[Session], alone: list[Decoded], parts: Parts
) -> None:
    """Once, by the session's number, and as soon as its last token is there: with one a step, at the step of that token."""
    given = [session.fork() for session in sessions]
    if opened:
        with torch.inference_mode():
            for session in given:
                session.open_answer()
    told: list[tuple[int, list[int], str]] = []
    longest_then: list[int] = []
    said = [0] * ROWS

    def on_token(row: int, id_: int) -> None:
        said[row] += 1

    def on_done(row: int, out: Decoded) -> None:
        told.append((row, list(out.ids), out.finish_reason))
        longest_then.append(max(said))

    drafter = None if name in ("none", "fixed shapes") else served("block", parts) if "block" in name else drafter_of(name, alone, parts)
    runner = GraphRunner(parts.model) if "fixed" in name else None
    outs = decode(given, max_tokens=LENGTH, on_token=on_token, on_done=on_done, drafter=drafter, runner=runner)
    assert said == [len(out.ids) for out in outs]
    assert sorted(told) == [(row, out.ids, out.finish_reason) for row, out in enumerate(alone)]
    if drafter is None:
        assert all(longest - len(ids) in (0, 1) for longest, (_, ids, _) in zip(longest_then, told, strict=True))
    assert longest_then[0] < max(said) / 2


@pytest.mark.parametrize("drafted", [False, True])
def test_each_row_goes_on_drawing_from_its_own_generator(drafted: bool, sessions: list[Session]) -> None:
    drafter = Lookup() if drafted else None
    how: dict[str, Any] = {"max_tokens": LENGTH, "temperature": 0.7, "drafter": drafter}
    together = decode(sessions, generators=one_by_one(ROWS), **how)
    assert len({len(out.ids) for out in together}) > 2
    for row, session in enumerate(sessions):
        assert said(decode([session], generators=one_by_one(ROWS)[row : row + 1], **how)) == said([together[row]])


@pytest.mark.parametrize("name", [*STUBS, "lookup"])
def test_rounds_halve_their_batch(
    name: str, sessions: list[Session], alone: list[Decoded], parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    with batches(monkeypatch) as found:
        outs = decode(sessions, max_tokens=LENGTH, drafter=drafter_of(name, alone, parts))
    assert said(outs) == said(alone)
    assert found[0] == ROWS and found == sorted(found, reverse=True) and found[-1] <= ROWS // 2


@pytest.mark.parametrize("name", SERVED)
def test_a_drafter_drafts_as_if_the_other_rows_had_never_been(
    name: str, sessions: list[Session], alone: list[Decoded], parts: Parts
) -> None:
    """Its keys, n-grams and news of the rows that stay are their own."""
    inner = served(name, parts)
    shadow = Shadow(inner, alone, parts)
    assert said(decode(sessions, max_tokens=LENGTH, drafter=shadow)) == said(alone)
    together = shadow.drafted
    for session, answer, drafted in zip(sessions, alone, together, strict=True):
        one = Shadow(inner, [answer], parts)
        decode([session], max_tokens=LENGTH, drafter=one)
        assert drafted[: len(one.drafted[0])] == one.drafted[0]  # near the limit a lone row is asked once less
    assert max(map(len, together)) > 2 * sorted(map(len, together))[ROWS // 2]
    assert len({str(draft) for drafted in together for draft in drafted}) > ROWS


def test_a_budget_holds_back_the_news_of_the_rows_that_stay(sessions: list[Session], alone: list[Decoded], parts: Parts) -> None:
    """Of two drafters one is asked every third round: it drafts what a twin does that is asked every round, also after rows have left."""
    both = Twins(parts)
    assert said(decode(sessions, max_tokens=LENGTH, drafter=both)) == said(alone)
    assert len(set(both.compared)) >= 3, both.compared  # before and after rows had left, twice


def test_work_that_is_stopped_after_rows_have_left(sessions: list[Session], parts: Parts) -> None:
    """It ends with the reason why, and no drafter holds anything."""

    class Left(Exception): ...

    block = served("block", parts)
    drafter = Adaptive({"block": block}, costs=Costs(((1, 1.0), (8, 1.01)), {"block": DraftCost(0.01)}))
    said = [0] * ROWS

    def on_token(row: int, id_: int) -> None:
        said[row] += 1
        if drafter.rows < ROWS // 2 and drafter.last is not None:
            raise Left

    with pytest.raises(Left):
        decode(sessions, max_tokens=LENGTH, on_token=on_token, drafter=drafter)
    assert drafter.last is None and not any(drafter.news.values()) and "cache" not in block.__dict__


def test_steps_of_fixed_shapes_keep_their_rows(sessions: list[Session], alone: list[Decoded], parts: Parts) -> None:
    runner = GraphRunner(parts.model)
    assert said(plain_decode(sessions, max_tokens=LENGTH, runner=runner)) == said(alone)
    assert said(decode(sessions, max_tokens=LENGTH, runner=runner, drafter=served("block", parts))) == said(alone)


def test_rows_keep_their_generators(sessions: list[Session], parts: Parts) -> None:
    drafter, draws = served("eagle3", parts), one_by_one(4)
    drafter.begin(sessions[:3], 1.0, draws[:3])
    drafter.narrow([2, 1], [1, 1, 1])
    drafter.widen(sessions[3:4], draws[3:], [1, 1])
    assert drafter.generators == [draws[2], draws[1], draws[3]]
