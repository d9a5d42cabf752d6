"""Answers that begin with the forward that reads the question: the same tokens, one step less."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from parity_world import STUBS, drafter_of, make_parts, mixed_sessions, photo, text_sessions

from hyperbagel.core.errors import InputError
from hyperbagel.generate.decode import Decoded
from hyperbagel.generate.decode import decode as plain_decode
from hyperbagel.generate.graphs import GraphRunner
from hyperbagel.generate.session import Parts, Session
from hyperbagel.model.bagel import Bagel
from hyperbagel.speculative.decode import decode
from hyperbagel.speculative.drafters.lookup import Lookup
from hyperbagel.speculative.types import Drafter, Speculated


def said(outs: Sequence[Decoded]) -> list[tuple[list[int], str]]:
    return [(out.ids, out.finish_reason) for out in outs]


@torch.inference_mode()
def opened(sessions: Sequence[Session]) -> list[Session]:
    """Copies that have read im_start."""
    copies = [session.fork() for session in sessions]
    for session in copies:
        session.open_answer()
    return copies


def state(session: Session) -> tuple[Any, ...]:
    n = session.cache.lengths[0]
    return n, session.position, session.opened is not None, [k[:, :, :n].clone() for k in session.cache.k]


@pytest.mark.parametrize("name", [*STUBS, "lookup"])
def test_the_same_tokens_after_any_context(name: str, parts: Parts) -> None:
    """Together and alone; sessions stay as they were, with im_start."""
    sessions = [*mixed_sessions(parts), *text_sessions(parts, 100)]
    told, ready = plain_decode(sessions, max_tokens=12), opened(sessions)
    before = [state(session) for session in ready[:6]]
    assert said(plain_decode(ready, max_tokens=12)) == said(told)
    assert said(decode(ready, max_tokens=12, drafter=drafter_of(name, told, parts))) == said(told)
    for session, one in zip(ready[:30], told, strict=False):
        assert said(decode([session], max_tokens=12, drafter=drafter_of(name, [one], parts))) == said([one])
    for session, (*numbers, keys) in zip(ready, before, strict=False):
        *now, held = state(session)
        assert now == numbers and all(map(torch.equal, held, keys))


def test_an_answer_that_ends_with_its_first_token(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = text_sessions(parts, 2, seed=1)
    told = plain_decode(sessions, max_tokens=6)
    assert len(told[1].ids) > 1 and told[0].ids[0] not in told[1].ids
    monkeypatch.setattr(parts.tokenizer, "im_end", told[0].ids[0])
    heard: list[int] = []
    for drafter in (None, Lookup()):
        out = decode(opened(sessions), max_tokens=6, drafter=drafter, on_token=lambda b, t: heard.append(b))
        assert said(out)[0] == ([], "stop") and out[1].ids[0] == told[1].ids[0]
        assert said(decode(opened(sessions[:1]), max_tokens=6, drafter=drafter)) == [([], "stop")]
    assert set(heard) == {1}


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("name", [None, "echo"])
def test_length_limit_logits_and_stream(name: str | None, length: int, parts: Parts) -> None:
    sessions = text_sessions(parts, 12, seed=1)
    told, seen = plain_decode(sessions, max_tokens=length, keep_logits=True), dict[int, list[int]]()
    drafter = None if name is None else drafter_of(name, told, parts)
    how: dict[str, Any] = {"max_tokens": length, "keep_logits": True, "on_token": lambda b, t: seen.setdefault(b, []).append(t)}
    out = decode(opened(sessions), **how, drafter=drafter)
    assert said(out) == said(told) and [seen.get(b, []) for b in range(12)] == [row.ids for row in told]
    for mine, theirs in zip(out, told, strict=True):
        torch.testing.assert_close(torch.stack(mine.logits), torch.stack(theirs.logits), atol=1e-4, rtol=1e-4)


def test_a_step_less_and_none_of_it_counted(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """The question's own forward gives the first token; rounds and tokens of statistics are those after it."""
    calls: list[int] = []
    own = Bagel.backbone
    monkeypatch.setattr(Bagel, "backbone", lambda self, *given, **more: calls.append(1) or own(self, *given, **more))

    def forwards(session: Session, later: bool, drafter: Drafter | None = None) -> tuple[int, Decoded]:
        calls.clear()
        with torch.inference_mode():
            session.add_text("what is this", later=later)
            if later:
                session.open_answer()
        [out] = decode([session], max_tokens=6, drafter=drafter)
        return len(calls), out

    contexts = text_sessions(parts, 8, seed=2)
    for context in contexts:
        before, told = forwards(context.fork(), False)
        after, out = forwards(context.fork(), True)
        assert after == before - 1 and said([out]) == said([told])
        many, drafted = forwards(context.fork(), True, drafter_of("wrong", [told], parts))
        assert many == after and said([drafted]) == said([told]) and isinstance(drafted, Speculated)
        ended = told.finish_reason == "stop"
        assert drafted.stats.rounds == drafted.stats.tokens == len(told.ids) + ended - 1


@torch.inference_mode()
def test_what_is_appended_takes_im_start_back(parts: Parts) -> None:
    """The conversation goes on as if no answer had been opened; opening twice is opening once."""
    for session in mixed_sessions(parts):
        never = session.fork()
        ready, length, position = opened([session])[0], session.tokens, session.position
        assert (ready.tokens, ready.cache.lengths[0], ready.position) == (length, length + 1, position + 1)
        ready.open_answer()
        assert ready.cache.lengths[0] == length + 1 and ready.room() == never.room()
        for one in (ready, never):
            one.add_text("it is a car")
        assert ready.opened is None and state(ready)[:3] == state(never)[:3]
        assert all(map(torch.equal, state(ready)[3], state(never)[3]))


@torch.inference_mode()
def test_a_failure_leaves_the_question_waiting(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory for the logits, the last thing that is made."""
    [session] = text_sessions(parts, 1)
    other = session.fork()
    other.add_text("what is this")

    def none_left(*given: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    session.add_text("what is this", later=True)
    with monkeypatch.context() as patch:
        patch.setattr(Bagel, "logits", none_left)
        with pytest.raises(torch.OutOfMemoryError):
            session.open_answer()
    assert session.waiting and session.opened is None and session.tokens == other.tokens
    session.settle()
    assert state(session)[:3] == state(other)[:3] and all(map(torch.equal, state(session)[3], state(other)[3]))


def looked(parts: Parts, later: bool, kind: str, open_it: bool = True) -> Session:
    """A question behind pictures, read as each is appended or, if `later`, all at once."""
    session = Session.new(parts, (0, 2, 5))
    if "text" in kind:
        session.add_text("and now", later=later)
    session.add_image(photo(30, 20), latents="latents" in kind, later=later)
    if "two" in kind:
        session.add_image(photo(20, 20, 1), latents=False, later=later)
    session.add_text("what is this", later=True)
    if open_it:
        session.open_answer()
    return session


@pytest.mark.parametrize(("kind", "saved"), [("one", 1), ("two", 2), ("text, two", 2), ("latents, two", 1)])
@torch.inference_mode()
def test_pictures_share_the_question_s_forward(kind: str, saved: int, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same context, taps and logits as with a forward for each; and the same again once the start of the answer is taken back."""
    calls: list[int] = []
    own = Bagel.backbone
    monkeypatch.setattr(Bagel, "backbone", lambda self, *given, **more: calls.append(1) or own(self, *given, **more))
    at_once = looked(parts, False, kind)
    most, calls[:] = len(calls), []
    together = looked(parts, True, kind)
    assert len(calls) == most - saved and not together.waiting_pictures
    for _ in range(2):
        (n, *numbers, keys), (m, *others, held) = state(together), state(at_once)
        assert (n, *numbers) == (m, *others) and (together.dropped, together.last_size) == (at_once.dropped, at_once.last_size)
        for one, other in zip([*keys, *together.cache.tapped], [*held, *at_once.cache.tapped], strict=True):
            torch.testing.assert_close(one[:, :, :n], other[:, :, :n], atol=1e-5, rtol=1e-4)
        if together.opened is not None and at_once.opened is not None:
            torch.testing.assert_close(together.opened, at_once.opened, atol=1e-4, rtol=1e-4)
        assert together.full().position == at_once.full().position
        for session in (together, at_once):
            session.add_text("yes")
    assert said(plain_decode([together], max_tokens=8)) == said(plain_decode([at_once], max_tokens=8))


@torch.inference_mode()
def test_whatever_needs_a_waiting_picture_reads_it(parts: Parts) -> None:
    want = looked(parts, False, "two")
    for take in (Session.full, Session.so_far, Session.text_dropped, Session.fork):
        session = looked(parts, True, "two", open_it=False)
        assert len(session.waiting_pictures) == 2 and session.cache.lengths == [0] and session.tokens == want.tokens
        behind = take(session)
        if isinstance(behind, Session):
            behind.waiting = []
            behind.add_image(photo(20, 20, 2), latents=False, later=True)  # a copy's picture comes behind those that wait, and is its own
            assert len(behind.waiting_pictures) == 3 and len(session.waiting_pictures) == 2
        else:
            kept = want.tokens, want.position - 1  # with the question
            if take is not Session.full:
                kept = kept[0] - len(session.waiting), kept[1] - len(session.waiting)
            assert (behind.length, behind.position) == kept and behind.view().lengths == [kept[0]]
            assert not session.waiting_pictures and bool(session.waiting) is (take is not Session.full)
        session.open_answer()
        assert state(session)[:3] == state(want)[:3]
        torch.testing.assert_close(session.opened, want.opened, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_guidance_leaves_out_what_waits(parts: Parts) -> None:
    """The contexts without pictures and without the last text, whichever of them has been read."""
    found = []
    for later in (False, True):
        session = Session.new(parts)
        session.add_text("and now", later=later)
        session.add_image(photo(30, 20), latents=False, later=later)
        assert session.dropped == (session.tokens, session.position + len(session.waiting_pictures))
        session.add_text("a plan", guided=False, later=later)
        image = session.image_dropped()
        assert image.cache is not session.cache
        text = session.text_dropped()
        found.append((text.view().lengths, text.position, image.length, image.position, session.full().position))
        alone = Session.new(parts)
        alone.add_text("and now", later=later)
        assert alone.image_dropped().cache is alone.cache  # nothing but given texts
    assert found[0] == found[1] and found[0][0][0] > found[0][2] > 0


@torch.inference_mode()
def test_no_room_for_a_waiting_picture(parts: Parts) -> None:
    session = Session.new(parts)
    session.add_image(photo(30, 20), latents=False, later=True)
    session.add_text("a " * (session.room() - 5), later=True)
    before = session.tokens
    with pytest.raises(InputError, match="expected at most 600"):
        session.add_image(photo(20, 20), latents=False, later=True)
    assert session.tokens == before and session.room() < 6


@torch.inference_mode()
def test_what_is_large_or_in_bf16_has_forwards_of_its_own(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit holds for pictures and question together."""
    fits = looked(parts, True, "two", open_it=False).tokens
    for limit, waiting in ((fits, 2), (fits - 1, 0), (5, 0)):
        monkeypatch.setattr("hyperbagel.generate.session._SHARED_FORWARD", limit)
        assert len(looked(parts, True, "two", open_it=False).waiting_pictures) == waiting
    assert state(looked(parts, True, "two"))[:3] == state(looked(parts, False, "two"))[:3]
    monkeypatch.undo()
    assert not looked(make_parts(torch.bfloat16), True, "two", open_it=False).waiting_pictures


@torch.inference_mode()
def test_a_failure_leaves_pictures_waiting(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    want, session = looked(parts, False, "two"), looked(parts, True, "two", open_it=False)
    before = session.tokens, session.position

    def none_left(*given: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Bagel, "logits", none_left)
        with pytest.raises(torch.OutOfMemoryError):
            session.open_answer()
    assert (session.tokens, session.position) == before and len(session.waiting_pictures) == 2 and session.cache.lengths == [0]
    session.open_answer()
    assert state(session)[:3] == state(want)[:3]


@torch.inference_mode()
def test_a_picture_does_not_see_an_opened_answer(parts: Parts) -> None:
    [session] = text_sessions(parts, 1)
    for branch in (opened([session])[0].so_far(), opened([session])[0].full()):
        assert (branch.length, branch.position) == (session.cache.lengths[0], session.position)


def test_one_that_is_not_open_closes_the_others(parts: Parts) -> None:
    sessions = text_sessions(parts, 3, seed=3)
    told = plain_decode(sessions, max_tokens=8)
    mixed = [*opened(sessions[:2]), sessions[2]]
    assert said(plain_decode(mixed, max_tokens=8)) == said(told) and not any(session.opened is not None for session in mixed)
    with torch.inference_mode():
        late = sessions[0].fork()
        late.add_text("and why", later=True)
        at_once = sessions[0].fork()
        at_once.add_text("and why")
    assert said(plain_decode([late], max_tokens=8)) == said(plain_decode([at_once], max_tokens=8))


@pytest.mark.parametrize("drafted", [False, True])
def test_fixed_shapes_begin_there_too(drafted: bool, parts: Parts) -> None:
    sessions = mixed_sessions(parts)
    told = plain_decode(sessions, max_tokens=12)
    drafter = drafter_of("random tree", told, parts) if drafted else None
    assert said(decode(opened(sessions), max_tokens=12, drafter=drafter, runner=GraphRunner(parts.model))) == said(told)


def test_sampled_answers_draw_the_same(parts: Parts) -> None:
    sessions = text_sessions(parts, 10, seed=6)

    def draws() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(i) for i in range(10)]

    told = plain_decode(sessions, max_tokens=8, temperature=1.0, generators=draws())
    assert said(plain_decode(opened(sessions), max_tokens=8, temperature=1.0, generators=draws())) == said(told)


def test_no_room_for_an_answer(parts: Parts) -> None:
    session = Session.new(parts)
    with torch.inference_mode():
        while session.room() > 20:
            session.add_text("a red car")
        session.add_text("a " * (session.room() - 3), later=True)
        with pytest.raises(InputError, match=r"expected at most 600; shorten the text"):
            session.open_answer()
        session.settle()
    assert session.room() < 2
