"""Questions that join a batch which is being answered: each says, drafts and learns what it would alone, and changes nothing for others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from parity_world import SERVED, STUBS, Shadow, Twins, batches, drafter_of, no_memory_once, served, unlike_sessions

from hyperbagel.generate.decode import Decoded
from hyperbagel.generate.decode import decode as plain_decode
from hyperbagel.generate.graphs import GraphRunner
from hyperbagel.generate.session import Parts, Session
from hyperbagel.nn.kv_cache import KVCache
from hyperbagel.speculative.decode import decode, verify_forward
from hyperbagel.speculative.drafters import serve_blocks, serve_chains
from hyperbagel.speculative.drafters.nobody import Nobody
from hyperbagel.speculative.drafters.serve import News, gather_news
from hyperbagel.speculative.types import Drafter, Seen

TAPS = (0, 1, 2, 3, 4, 5)
ROWS, LENGTH = 9, 24
COMING = {0: 1, 2: 2, 3: 1, 5: 2, 6: 1, 40: 9}  # call -> how many join, behind the two that begin


@pytest.fixture(scope="module")
def sessions(parts: Parts) -> list[Session]:
    """They have read im_start. The two longest begin, so that there is somebody to join."""
    made = unlike_sessions(parts, ROWS, LENGTH, TAPS)
    made.sort(key=lambda session: -len(plain_decode([session], max_tokens=LENGTH)[0].ids))
    with torch.inference_mode():
        for session in made:
            session.open_answer()
    return made


@pytest.fixture(scope="module")
def alone(sessions: list[Session]) -> list[Decoded]:
    return [plain_decode([session], max_tokens=LENGTH)[0] for session in sessions]


def said(outs: Sequence[Decoded]) -> list[tuple[list[int], str]]:
    return [(out.ids, out.finish_reason) for out in outs]


class Coming:
    """Those behind the first two join as COMING says. rows: how many were at work at each call. leaving: (call, row) of who is gone."""

    def __init__(self, sessions: Sequence[Session], generators: Sequence[torch.Generator], leaving: Sequence[tuple[int, int]] = ()) -> None:
        self.left, self.leaving = list(zip(sessions, generators, strict=True))[2:], leaving
        self.rows: list[int] = []
        self.refused: list[Exception] = []

    def join(self, rows: int) -> list[tuple[Session, torch.Generator]]:
        n = COMING.get(len(self.rows), 0)
        self.rows.append(rows)
        new = self.left[:n]
        del self.left[:n]
        return new

    def gone(self, row: int) -> bool:
        return any(row == who and len(self.rows) > call for call, who in self.leaving)

    def back(self, error: Exception) -> None:
        self.refused.append(error)


class Called(Coming):
    """They join as a function of (call, rows at work) says."""

    def __init__(self, which: Callable[[int, int], Sequence[tuple[Session, torch.Generator]]]) -> None:
        super().__init__([], [])
        self.which = which

    def join(self, rows: int) -> list[tuple[Session, torch.Generator]]:
        self.rows.append(rows)
        return list(self.which(len(self.rows) - 1, rows))


def generators(n: int = ROWS) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(row) for row in range(n)]


def drafter(name: str, alone: Sequence[Decoded], parts: Parts) -> Drafter:
    if name == "nobody":
        return Nobody()
    return served(name, parts) if name in SERVED and name != "lookup" else drafter_of(name, alone, parts)


@pytest.mark.parametrize("name", ["nobody", *STUBS, *SERVED])
def test_answers_are_those_of_each_alone(name: str, sessions: list[Session], alone: list[Decoded], parts: Parts) -> None:
    coming = Coming(sessions, generators())
    told: list[list[int]] = [[] for _ in sessions]
    done: dict[int, tuple[list[int], str]] = {}
    outs = decode(
        sessions[:2],
        max_tokens=LENGTH,
        drafter=drafter(name, alone, parts),
        traffic=coming,
        on_token=lambda row, id_: told[row].append(id_),
        on_done=lambda row, out: done.setdefault(row, (list(out.ids), out.finish_reason)) and None,
    )
    met = len(outs)
    assert met > 4 and said(outs) == said(alone[:met])  # with drafts that are right, the first two are done before all have come
    assert len({id(out.times) for out in outs}) == 1, "rounds take the time of all"  # type: ignore[attr-defined]
    assert told[:met] == [out.ids for out in outs] and done == dict(enumerate(said(outs)))
    if name in ("nobody", "wrong"):
        assert met == ROWS and max(coming.rows) >= 4 and coming.rows[0] == 2


def test_finished_rows_leave_when_others_come(sessions: list[Session], alone: list[Decoded], monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of the forward behind a join are those at work and the new ones, however few are finished."""
    given = list(zip(sessions, generators(), strict=True))[6:]
    # one of six is finished, later one of five and one that came
    coming = Called(lambda call, rows: [given.pop()] if given and rows == 5 else [])
    with batches(monkeypatch) as found:
        outs = decode(sessions[:6], max_tokens=LENGTH, drafter=Nobody(), traffic=coming)
    assert said(outs) == said([*alone[:6], *reversed(alone[9 - len(outs) + 6 :])])
    assert coming.rows[0] == 6 and found[coming.rows.index(5)] == 6 and max(found) == 6


@pytest.mark.parametrize("name", SERVED)
def test_a_drafter_drafts_for_each_as_if_it_were_alone(name: str, sessions: list[Session], alone: list[Decoded], parts: Parts) -> None:
    inner = served(name, parts)
    shadow = Shadow(inner, alone, parts)
    outs = decode(sessions[:2], max_tokens=LENGTH, drafter=shadow, traffic=Coming(sessions, generators()))
    assert said(outs) == said(alone[: len(outs)]) and len(outs) > 4
    together = shadow.drafted
    for session, answer, drafted in zip(sessions, alone, together, strict=False):
        one = Shadow(inner, [answer], parts)
        decode([session], max_tokens=LENGTH, drafter=one)
        assert drafted[: len(one.drafted[0])] == one.drafted[0]
    assert len({str(draft) for drafted in together for draft in drafted}) > 4


@pytest.mark.parametrize("name", ["eagle3", "hyper-bagel", "block, tree"])
def test_contexts_of_those_who_join_are_read_alone(
    name: str, sessions: list[Session], alone: list[Decoded], parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would pad the few new slots of everybody else. Each slot is read once."""
    read: list[Seen] = []

    def gathered(seen: Seen, *given: Any) -> News:
        read.append(seen)
        return gather_news(seen, *given)

    for module in (serve_blocks, serve_chains):
        monkeypatch.setattr(module, "gather_news", gathered)
    shadow = Shadow(served(name, parts), alone, parts)
    outs = decode(sessions[:2], max_tokens=LENGTH, drafter=shadow, traffic=Coming(sessions, generators()))
    slots = [session.cache.lengths[0] for session in sessions[: len(outs)]]
    first, *later = read
    assert first.counts == slots[:3] and len(outs) > 4, "one joins before the first draft"
    assert all(max(seen.counts) < 5 for seen in later if any(seen.start)), "rounds"
    contexts = [n for seen in later if not any(seen.start) for n in seen.counts]
    assert contexts == [n - 1 for n in slots[3:]]


@pytest.mark.parametrize("name", ["eagle3", "hyper-bagel", "block", "block, tree"])
@torch.inference_mode()
def test_who_joined_may_stand_between_others(name: str, sessions: list[Session], parts: Parts) -> None:
    """A row that the drafter has not read yet took the place of a finished one before the drafter was asked again."""
    given, im_start = sessions[:4], parts.tokenizer.im_start
    lengths = [session.cache.lengths[0] for session in given]
    ids = [[im_start] * n for n in lengths]  # no drafter here looks at them

    def seen(cache: KVCache, start: list[int], counts: list[int], rows: Sequence[int], at: int) -> Seen:
        where = torch.tensor([given[row].position + at for row in rows])
        return Seen(cache, start, counts, [ids[row] for row in rows], torch.tensor([50 + row for row in rows]), where)

    cache = KVCache.stack([session.cache for session in given[:3]], 40, TAPS)
    drafter = served(name, parts)
    drafter.begin(given[:3], 0.0, [])
    drafter.propose(seen(cache, [0] * 3, lengths[:3], range(3), 0), 4)
    drafter.widen(given[3:], [], [0] * 3)
    cache.add([given[3].cache], 40)
    order = [0, 3, 2]
    drafter.narrow(order, [0] * 4)
    cache.select(order)
    said = torch.tensor([[50 + row] for row in order])
    verify_forward(parts.model, cache, said, None, torch.tensor([given[row].position for row in order]))
    news = seen(cache, [lengths[0], 0, lengths[2]], [1, lengths[3] + 1, 1], order, 1)
    together = drafter.propose(news, 4)
    for b, row in enumerate(order):
        alone = served(name, parts)
        alone.begin([given[row]], 0.0, [])
        of_row = cache.fork()
        of_row.select([b])
        one = alone.propose(seen(of_row, [0], [lengths[row] + 1], [row], 1), 4)
        n = one.tokens.shape[1]
        assert n > 1 and torch.equal(together.tokens[b, :n], one.tokens[0])


@pytest.mark.parametrize("name", ["eagle3", "block, tree"])
@torch.inference_mode()
def test_one_with_a_context_longer_than_the_others_room(name: str, sessions: list[Session], parts: Parts) -> None:
    long = Session.new(parts, TAPS)
    long.add_text("is the star left of the tree " * 40)
    long.open_answer()
    given, inner = [*sessions[:2], long], served(name, parts)
    answers = [plain_decode([session], max_tokens=LENGTH)[0] for session in given]
    shadow, one = Shadow(inner, answers, parts), Shadow(inner, answers[2:], parts)
    outs = decode(given[:2], max_tokens=LENGTH, drafter=shadow, traffic=Called(lambda call, _: [(long, torch.Generator())][call != 2 :]))
    assert said(outs) == said(answers) and long.tokens > 200
    decode([long], max_tokens=LENGTH, drafter=one)
    assert shadow.drafted[2][: len(one.drafted[0])] == one.drafted[0]


@pytest.mark.parametrize("name", ["nobody", "lookup"])
def test_each_draws_from_its_own_generator(name: str, sessions: list[Session], alone: list[Decoded], parts: Parts) -> None:
    how: dict[str, Any] = {"max_tokens": LENGTH, "temperature": 0.7}
    together = decode(
        sessions[:2], generators=generators(2), drafter=drafter(name, alone, parts), traffic=Coming(sessions, generators()), **how
    )
    assert len(together) > 4 and len({len(out.ids) for out in together}) > 2
    for row, out in enumerate(together):
        assert said(plain_decode([sessions[row]], generators=generators()[row : row + 1], **how)) == said([out])


def test_a_drafter_that_draws_goes_on_drawing(sessions: list[Session], parts: Parts) -> None:
    """Its distributions have as many rows as there are, and each answer is as long as one may be."""
    how: dict[str, Any] = {"max_tokens": LENGTH, "temperature": 0.7, "generators": generators(2)}
    outs = decode(sessions[:2], drafter=served("eagle3", parts), traffic=Coming(sessions, generators()), **how)
    assert len(outs) > 4 and all(out.finish_reason == "stop" or len(out.ids) == LENGTH for out in outs)


@pytest.mark.parametrize("spent", [False, True])
def test_who_was_joined_is_as_before(spent: bool, sessions: list[Session], alone: list[Decoded], parts: Parts) -> None:
    """A lone session, decoded in its own cache, which is left when others join."""
    given = [session.fork() for session in sessions]
    lengths = [session.tokens for session in given]
    before = [k.clone() for k in given[0].cache.k]
    second = Called(lambda call, rows: [(given[1], torch.Generator())] if call == 2 else [])  # behind two rounds of the first
    outs = decode(given[:1], max_tokens=LENGTH, drafter=Nobody(), traffic=second, spent=spent)
    assert said(outs) == said(alone)[:2]
    assert [session.tokens for session in given] == lengths
    if spent:
        assert not given[0].cache.k and not given[1].cache.k
    else:
        n = given[0].cache.lengths[0]
        assert all(torch.equal(a[:, :, :n], b[:, :, :n]) for a, b in zip(before, given[0].cache.k, strict=True))
        assert said(plain_decode(given, max_tokens=LENGTH)) == said(alone)


def test_a_budget_goes_on_with_the_news_of_all(sessions: list[Session], alone: list[Decoded], parts: Parts) -> None:
    """A drafter asked every third round drafts what a twin does that is asked every round, for rows that joined in between as well."""
    both = Twins(parts)
    outs = decode(sessions[:2], max_tokens=LENGTH, drafter=both, traffic=Coming(sessions, generators()))
    assert said(outs) == said(alone) and len(set(both.compared)) >= 3, both.compared


def test_nobody_is_asked_where_shapes_are_fixed(sessions: list[Session], alone: list[Decoded], parts: Parts) -> None:
    coming = Coming(sessions, generators())
    runner = GraphRunner(parts.model)
    for one in (None, served("block", parts)):
        assert said(decode(sessions[:2], max_tokens=LENGTH, runner=runner, drafter=one, traffic=coming)) == said(alone[:2])
    assert not coming.rows


def test_who_has_not_read_im_start_cannot_join(sessions: list[Session], parts: Parts) -> None:
    fresh = Session.new(parts, TAPS)
    fresh.add_text("a car")
    with pytest.raises(AssertionError, match="im_start"):
        decode(sessions[:1], max_tokens=LENGTH, drafter=Nobody(), traffic=Called(lambda call, rows: [(fresh, torch.Generator())]))


@pytest.mark.parametrize("name", ["nobody", "lookup", "block, tree"])
def test_answers_that_nobody_waits_for_leave(name: str, sessions: list[Session], alone: list[Decoded], parts: Parts) -> None:
    """One of the first two, and one that joined, at once, not with the batch; the others' answers stay what they are."""
    told: list[list[int]] = [[] for _ in sessions]
    done: list[int] = []
    how: dict[str, Any] = {"on_token": lambda row, id_: told[row].append(id_), "on_done": lambda row, out: done.append(row)}
    coming = Coming(sessions, generators(), leaving=[(4, 0), (6, 3)])
    outs = decode(sessions[:2], max_tokens=LENGTH, drafter=drafter(name, alone, parts), traffic=coming, **how)
    others = [row for row in range(len(outs)) if row not in (0, 3)]
    assert [said(outs)[row] for row in others] == [said(alone)[row] for row in others]
    assert 0 not in done and set(others) <= set(done) and len(told[0]) < len(alone[0].ids)
    assert told[0] == alone[0].ids[: len(told[0])]


def test_a_batch_that_nobody_waits_for_is_over(sessions: list[Session]) -> None:
    coming = Coming(sessions, generators(), leaving=[(3, row) for row in range(ROWS)])
    outs = decode(sessions[:2], max_tokens=LENGTH, drafter=Nobody(), traffic=coming)
    assert len(coming.rows) == 4 and max(len(out.ids) for out in outs) == 5 < LENGTH  # the first token came with the prefill


def test_who_takes_the_place_of_one_that_overflowed(sessions: list[Session], alone: list[Decoded], parts: Parts) -> None:
    bad = sessions[1].fork()
    for x in (*bad.cache.v, *bad.cache.tapped):
        x.fill_(torch.nan)

    class Leaving(Called):
        def gone(self, row: int) -> bool:
            return row == 1

    for name in ("nobody", "block, tree"):
        coming = Leaving(lambda call, rows: [(sessions[8], torch.Generator())] if call == 2 else [])
        outs = decode([sessions[0], bad], max_tokens=LENGTH, drafter=drafter(name, alone, parts), traffic=coming)
        assert said([outs[0], outs[2]]) == said([alone[0], alone[8]])


def test_without_memory_for_those_who_join_the_others_go_on(
    sessions: list[Session], alone: list[Decoded], parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first join finds no memory, the next one does."""
    no_memory_once(monkeypatch)
    coming = Coming(sessions, generators())
    outs = decode(sessions[:2], max_tokens=LENGTH, drafter=Nobody(), traffic=coming)
    assert [str(error) for error in coming.refused] == ["no memory"] and len(outs) == ROWS - 1
    assert said(outs) == said([*alone[:2], *alone[3:]])


@torch.inference_mode()
def test_a_long_context_that_joins_is_read_whole(sessions: list[Session], parts: Parts) -> None:
    short, long = sessions[0], Session.new(parts, TAPS)
    long.add_text("is the red car left of the blue tree " * 24)
    n, m, root, at = short.cache.lengths[0], long.cache.lengths[0], torch.tensor([5, 6]), torch.tensor([short.position, long.position])
    joined, alone = served("block", parts), served("block", parts)
    joined.begin([short], 0.0, ())
    joined.propose(Seen(short.cache, [0], [n], [[]], root[:1], at[:1]), 4)
    joined.widen([long], (), [n])
    both = KVCache.stack([short.cache, long.cache], 16, taps=TAPS)
    alone.begin([long], 0.0, ())
    told = alone.propose(Seen(long.cache, [0], [m], [[]], root[1:], at[1:]), 4).tokens[0]
    assert m > 3 * n + 150 and torch.equal(joined.propose(Seen(both, [n, 0], [0, m], [[]] * 2, root, at), 4).tokens[1], told)
