"""Answers that end where the caller says: plain and drafted ones alike, within accepted drafts, in batches and for those who joined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from parity_world import SERVED, STUBS, drafter_of, same, served, unlike_sessions

from hyperbagel.generate.decode import Decoded
from hyperbagel.generate.decode import decode as plain_decode
from hyperbagel.generate.graphs import GraphRunner
from hyperbagel.generate.session import Parts, Session
from hyperbagel.speculative.decode import decode
from hyperbagel.speculative.drafters.nobody import Nobody
from hyperbagel.speculative.types import Drafter

TAPS = (0, 1, 2, 3, 4, 5)
ROWS, LENGTH = 9, 24


@pytest.fixture(scope="module")
def sessions(parts: Parts) -> list[Session]:
    return unlike_sessions(parts, ROWS, LENGTH, TAPS)


@pytest.fixture(scope="module")
def whole(sessions: list[Session]) -> list[Decoded]:
    return plain_decode(sessions, max_tokens=LENGTH)


def ends(row: int) -> int:
    """Tokens of row's answer, if it gets that far: every row another number, the longest ones (the last two rows) cut as well."""
    return (7, 3, 1, 5, 11, 2, 9, 4, 13)[row]


def counting(rows: Sequence[int]) -> Callable[[int, int], bool]:
    """Ends the answer of index i as row rows[i] is to end."""
    said = [0] * len(rows)

    def until(i: int, token: int) -> bool:
        said[i] += 1
        return said[i] == ends(rows[i])

    return until


@pytest.fixture(scope="module")
def cut(whole: list[Decoded]) -> list[Decoded]:
    """What is expected, from the whole answers alone."""
    found = [Decoded(out.ids[: ends(row)], "stop" if len(out.ids) >= ends(row) else out.finish_reason) for row, out in enumerate(whole)]
    assert sum(len(a.ids) < len(b.ids) for a, b in zip(found, whole, strict=True)) >= 4
    return found


def drafter(name: str, whole: Sequence[Decoded], parts: Parts) -> Drafter | None:
    if name == "plain":
        return None
    return served(name, parts) if name in SERVED and name != "lookup" else drafter_of(name, whole, parts)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("name", ["plain", *STUBS, "lookup", "block", "block, tree"])
def test_answers_end_there(name: str, fixed: bool, sessions: list[Session], whole: list[Decoded], cut: list[Decoded], parts: Parts) -> None:
    how: dict[str, Any] = {"max_tokens": LENGTH, "runner": GraphRunner(parts.model) if fixed else None}
    told, done = [list[int]() for _ in sessions], dict[int, list[int]]()
    outs = decode(
        sessions,
        drafter=drafter(name, whole, parts),
        until=counting(range(ROWS)),
        on_token=lambda row, id_: told[row].append(id_),
        on_done=lambda row, out: done.setdefault(row, list(out.ids)) and None,
        **how,
    )
    same(cut, outs)
    assert told == [out.ids for out in outs] and done == {row: out.ids for row, out in enumerate(outs)}
    for row in (0, 4, 8):
        same([cut[row]], decode([sessions[row]], drafter=drafter(name, [whole[row]], parts), until=counting([row]), **how))
    same(whole, decode(sessions, drafter=drafter(name, whole, parts), **how))  # the sessions stay as they were


def test_it_ends_within_an_accepted_draft(sessions: list[Session], whole: list[Decoded], cut: list[Decoded], parts: Parts) -> None:
    """Six tokens of the longest answer come at once; what was accepted behind its end is neither said nor counted."""
    row = max(range(ROWS), key=lambda i: len(whole[i].ids))
    [out] = decode([sessions[row]], max_tokens=LENGTH, drafter=drafter("echo", [whole[row]], parts), until=counting([row]))
    assert out.ids == cut[row].ids and out.stats.tokens == len(out.ids) > out.stats.rounds  # type: ignore[attr-defined]


def test_the_last_token_that_fits_may_end_it(sessions: list[Session], whole: list[Decoded], parts: Parts) -> None:
    row = max(range(ROWS), key=lambda i: len(whole[i].ids))
    for name in ("plain", "echo", "wrong"):
        [out] = decode([sessions[row]], max_tokens=ends(row), drafter=drafter(name, [whole[row]], parts), until=counting([row]))
        assert out.finish_reason == "stop" and len(out.ids) == ends(row)


def test_logits_end_with_it(sessions: list[Session], whole: list[Decoded], parts: Parts) -> None:
    row = max(range(ROWS), key=lambda i: len(whole[i].ids))
    for name in ("plain", "echo", "wrong"):
        how: dict[str, Any] = {"max_tokens": LENGTH, "keep_logits": True, "drafter": drafter(name, [whole[row]], parts)}
        [out] = decode([sessions[row]], until=counting([row]), **how)
        assert len(out.logits) == len(out.ids) == ends(row)


@torch.inference_mode()
def test_who_joined_ends_there_too(sessions: list[Session], cut: list[Decoded]) -> None:
    given = [session.fork() for session in sessions]
    for session in given:
        session.open_answer()
    order = [8, 4, *(row for row in range(ROWS) if row not in (4, 8))]
    left = order[2:]

    class Coming:
        def gone(self, row: int) -> bool:
            return False

        def join(self, rows: int) -> list[tuple[Session, torch.Generator]]:
            return [(given[left.pop(0)], torch.Generator())] if left else []

        def back(self, error: Exception) -> None:
            raise error

    until = counting(order)
    outs = decode([given[row] for row in order[:2]], max_tokens=LENGTH, drafter=Nobody(), traffic=Coming(), until=until)
    assert len(outs) > 6
    same([cut[row] for row in order[: len(outs)]], outs)
