"""Under a budget answers stay the target's own, whoever drafts and however often nobody does; drafters that paused know all they missed."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from parity_world import STUBS, mixed_sessions, text_sessions

from hyperbagel.core.errors import Notice
from hyperbagel.generate.decode import Decoded
from hyperbagel.generate.decode import decode as plain_decode
from hyperbagel.generate.session import Parts, Session
from hyperbagel.nn.kv_cache import KVCache
from hyperbagel.speculative import decode as speculative_decode
from hyperbagel.speculative.adaptive import FIRSTS, Adaptive, _Phase
from hyperbagel.speculative.budget import Costs, DraftCost, Record
from hyperbagel.speculative.costs import measure_costs
from hyperbagel.speculative.decode import Rounds, decode
from hyperbagel.speculative.drafters.config import DrafterConfig, Kind
from hyperbagel.speculative.drafters.folder import make_drafter, make_module
from hyperbagel.speculative.drafters.lookup import Lookup
from hyperbagel.speculative.tree import Tree
from hyperbagel.speculative.types import Draft, Drafter, Seen, Speculated

TAPS = (0, 1, 2, 3, 4, 5)


def costs(*names: str) -> Costs:
    return Costs(((1, 1.0), (4, 1.15), (8, 1.35)), dict.fromkeys(names, DraftCost(0.2, 0.05)))


def random_drafter(kind: Kind, parts: Parts, nodes: int = 0) -> Drafter:
    config = DrafterConfig.for_target(kind, parts.model.config.llm, **({"block": 4, "rank": 8} if kind == "block" else {}))
    module = make_module(config)
    module.init_from(parts.model, torch.Generator().manual_seed(0))
    return make_drafter(module.eval().requires_grad_(False), parts.model, depth=4, nodes=nodes)


def same(plain: Sequence[Decoded], other: Sequence[Decoded]) -> None:
    assert [(o.ids, o.finish_reason) for o in other] == [(p.ids, p.finish_reason) for p in plain]


def test_a_thousand_prompts_of_changing_drafters(parts: Parts) -> None:
    """Stubs that echo, lie, repeat and draw trees, lookup and a trained kind in one budget, which must have used several, and nobody."""
    sessions = text_sessions(parts, 1000, taps=TAPS)
    block, names = random_drafter("block", parts, nodes=9), [*STUBS, "lookup", "block"]
    adaptive, used = None, dict.fromkeys(names, 0)
    for at in range(0, 1000, 125):
        group = sessions[at : at + 125]
        plain = plain_decode(group, max_tokens=24)
        stubs = {name: stub(plain, parts.tokenizer.im_end, 1024) for name, stub in STUBS.items()}
        fresh = Adaptive({**stubs, "lookup": Lookup(), "block": block}, costs=costs(*names))
        fresh.phases = adaptive.phases if adaptive else {}  # what was learnt stays
        adaptive = fresh
        assert len(adaptive.expected_rates("block")) == block.depth == 4 < block.width  # a tree is no deeper than its block
        out = decode(group, max_tokens=24, drafter=adaptive)
        same(plain, out)
        used = {name: used[name] + adaptive.rounds_drafted[name] for name in names}
    assert sum(n > 0 for n in used.values()) >= 4 and used["echo"] == max(used.values()), used


@pytest.mark.parametrize("rows", [1, 3])
def test_hopeless_drafters_are_left_alone(rows: int, parts: Parts) -> None:
    """A drafter that is always wrong drafts ever more seldom; the answers do not notice."""
    parts.tokenizer.im_end, im_end = -1, parts.tokenizer.im_end
    try:
        sessions = text_sessions_without_end(parts, rows, im_end)
        plain = plain_decode(sessions, max_tokens=150)
        adaptive = Adaptive({"wrong": STUBS["wrong"](plain, -1, 1024)}, costs=costs("wrong"))
        out = decode(sessions, max_tokens=150, drafter=adaptive)
    finally:
        parts.tokenizer.im_end = im_end
    same(plain, out)
    assert isinstance(out[0], Speculated) and out[0].stats.rounds == 150
    assert 3 <= adaptive.rounds_drafted["wrong"] <= 12


@pytest.mark.parametrize("start", [0.0, 1.0])
def test_answers_of_one_round_teach_too(start: float, parts: Parts) -> None:
    """Where reading the context costs more than one short answer can win back, requests that end in their first round show it."""
    table = Costs(((1, 1.0), (4, 1.15), (8, 1.35)), {"echo": DraftCost(0.2, 0.05, start)})
    drafted, asked, phases, firsts = 0, 0, {}, set()
    for session in text_sessions(parts, 40, seed=5):
        session.open_answer()
        plain = plain_decode([session], max_tokens=3)
        if len(plain[0].ids) < 2:  # nothing was left to draft
            continue
        firsts.add(plain[0].ids[0])
        asked += 1
        adaptive = Adaptive({"echo": STUBS["echo"](plain, parts.tokenizer.im_end, 1024)}, costs=table)
        adaptive.phases = phases  # what was learnt stays
        same(plain, decode([session], max_tokens=3, drafter=adaptive))
        drafted += adaptive.rounds_drafted["echo"]
    assert len(firsts) > 15, "mostly behind tokens not met before"
    assert drafted == asked if start == 0 else 2 <= drafted <= 12, drafted


def test_the_first_token_says_what_is_worth_drafting(parts: Parts) -> None:
    """A drafter that is right behind one first token and wrong behind another, level on the whole, soon drafts behind the one alone."""
    sessions = text_sessions(parts, 20, seed=6)
    for session in sessions:
        session.open_answer()
    told = {out.ids[0]: (session, out) for session, out in zip(sessions, plain_decode(sessions, max_tokens=3), strict=True) if out.ids[2:]}
    (right, well), (wrong, badly) = list(told.items())[:2]
    phases, drafted = {}, {right: 0, wrong: 0}
    for _ in range(30):
        for first, stub, (session, out) in ((right, "echo", well), (wrong, "wrong", badly)):
            adaptive = Adaptive({"it": STUBS[stub]([out], parts.tokenizer.im_end, 1024)}, costs=costs("it"))
            adaptive.phases = phases  # what was learnt stays
            same([out], decode([session], max_tokens=3, drafter=adaptive))
            drafted[first] += adaptive.rounds_drafted["it"]
    assert drafted[right] == 30 and 1 <= drafted[wrong] <= 8, drafted


def test_so_many_first_tokens_are_remembered_and_no_more() -> None:
    phase = _Phase({"it": Record(3.0, 2.0), "other": Record(1.0, 1.0, wait=5)}, {})
    assert phase.behind(0) is phase.behind(None) is phase.records and not phase.firsts
    phase.note("it", 0, 1.0, 2.0, plain=1.0)
    known, all_ = phase.behind(0), phase.records
    assert known["it"].tokens == 1.0 and known["it"].wait > 0, "its first round alone"
    assert all_["it"].tokens == 2.0 and known["other"].wait == all_["other"].wait == 4, "what was believed and this round"
    for token in range(1, FIRSTS):
        phase.note("it", token, 1.0, 2.0, plain=1.0)
    phase.note("it", 0, 1.0, 2.0, plain=1.0)
    phase.note("it", FIRSTS, 1.0, 2.0, plain=1.0)
    assert len(phase.firsts) == FIRSTS and phase.behind(0) is known and phase.behind(1) is phase.records, "the longest unused is gone"


def text_sessions_without_end(parts: Parts, rows: int, im_end: int) -> list[Session]:
    parts.tokenizer.im_end = im_end
    sessions = text_sessions(parts, rows, seed=4)
    parts.tokenizer.im_end = -1
    return sessions


@pytest.mark.parametrize("kind", ["eagle3", "hyper-bagel", "block"])
def test_a_pause_is_caught_up(kind: Kind, parts: Parts) -> None:
    """A drafter asked every third round drafts what one asked every round does, in rows of unlike lengths."""
    sessions = mixed_sessions(parts, TAPS)
    plain = plain_decode(sessions, max_tokens=20)
    often, seldom = random_drafter(kind, parts), random_drafter(kind, parts)
    echo = STUBS["echo"](plain, parts.tokenizer.im_end, 1024)
    adaptive = Adaptive({"seldom": seldom}, costs=costs("seldom"))

    class Both:
        taps, width, depth, draws, threshold, turn, compared = TAPS, 6, 6, False, 0.0, 0, 0

        def begin(self, *given: object) -> None:
            for drafter in (often, adaptive, echo):
                drafter.begin(*given)  # type: ignore[arg-type, attr-defined]

        def propose(self, seen: Seen, limit: int) -> Draft:
            self.turn += 1
            for phase in adaptive.phases.values():  # no trials of its own
                phase.records["seldom"].wait, phase.records["seldom"].tokens = (0 if self.turn % 3 == 0 else 9), 0.1
            theirs = adaptive.propose(seen, limit)
            mine = often.propose(seen, limit)
            if theirs.tokens.shape[1]:
                n = min(mine.tokens.shape[1], theirs.tokens.shape[1])
                alive = torch.tensor([count > 0 for count in seen.counts])
                assert torch.equal(mine.tokens[alive, :n], theirs.tokens[alive, :n])
                self.compared += 1
            return Draft(echo.propose(seen, limit).tokens[:, :1])  # one accepted token a round: news of two slots

        def narrow(self, rows: list[int], counts: list[int]) -> None:
            for drafter in (often, adaptive, echo):
                drafter.narrow(rows, counts)  # type: ignore[attr-defined]

        def end(self, counts: list[int]) -> None: ...

    both = Both()
    same(plain, decode(sessions, max_tokens=20, drafter=both))
    assert both.compared >= 3


@pytest.mark.parametrize("stops", [False, True])
def test_a_request_that_is_over_holds_no_cache(stops: bool, parts: Parts) -> None:
    """Its news of the target name its cache, gigabytes at 7B: neither budget nor drafter keeps it, also where nobody waits any more."""
    sessions = text_sessions(parts, 3, taps=TAPS)
    block = random_drafter("block", parts)
    adaptive = Adaptive({"lookup": Lookup(), "block": block}, costs=costs("lookup", "block"))
    made: list[weakref.ref[KVCache]] = []

    class Watched(Rounds):
        def __init__(self, *given: Any, **more: Any) -> None:
            super().__init__(*given, **more)
            made.append(weakref.ref(self.cache))

    def on_token(row: int, token: int) -> None:
        if stops and len(seen) > 5:
            raise KeyboardInterrupt
        seen.append(token)

    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculative_decode, "Rounds", Watched)
        with pytest.raises(KeyboardInterrupt) if stops else nullcontext():
            decode(sessions, max_tokens=12, drafter=adaptive, on_token=on_token)
    gc.collect()
    assert len(made) == 1 and made[0]() is None
    assert "cache" not in vars(block)
    same(plain_decode(sessions, max_tokens=12), decode(sessions, max_tokens=12, drafter=adaptive))


def test_a_request_that_fails_as_it_begins_holds_no_cache(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the drafter's start and the first round lies what takes most memory."""
    sessions = text_sessions(parts, 3, taps=TAPS)
    block = random_drafter("block", parts)
    adaptive = Adaptive({"block": block}, costs=costs("block"))

    def none_left(*given: Any, **more: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "stack", none_left)
        with pytest.raises(torch.OutOfMemoryError):
            decode(sessions, max_tokens=5, drafter=adaptive)
    assert "cache" not in vars(block) and not any(adaptive.news.values())
    monkeypatch.setattr(block, "begin", none_left)
    with pytest.raises(torch.OutOfMemoryError):
        decode(sessions, max_tokens=5, drafter=Adaptive({"block": block}, costs=costs("block")))


def test_measured_costs_are_sane(parts: Parts) -> None:
    """More tokens never cost less; a drafter costs something; the context stays as it was."""
    context = Session.new(parts, TAPS)
    with torch.inference_mode():
        context.add_text("what is this")
    before = (context.cache.lengths[0], context.position)
    drafters = {"lookup": Lookup(), "eagle3": random_drafter("eagle3", parts)}
    for rows, sampled in ((1, False), (2, True)):
        found = measure_costs(context, drafters, rows, sampled)
        seconds = [s for _, s in found.verify]
        assert seconds == sorted(seconds) and found.plain > 0
        assert found.draft["eagle3"].first > found.draft["lookup"].first > 0 and found.draft["eagle3"].more > 0
    assert (context.cache.lengths[0], context.position) == before


class Watcher:
    """Drafts nothing and keeps what it was shown: (slots before, new slots) by row and round, and the depth it was asked for."""

    taps: tuple[int, ...] = ()
    width, depth, draws, threshold, im_end = 6, 6, False, 0.5, 7

    def begin(self, sessions: Sequence[Session], temperature: float, generators: Sequence[torch.Generator]) -> None:
        self.shown: list[tuple[list[int], list[int], int]] = []
        self.ended: list[list[int]] = []
        self.threshold, self.im_end = 0.5, 7

    def propose(self, seen: Seen, limit: int) -> Draft:
        assert [len(ids) for ids in seen.ids] == [n if start else 0 for start, n in zip(seen.start, seen.counts, strict=True)]
        self.shown.append((list(seen.start), list(seen.counts), limit))
        return Draft(torch.zeros(len(seen.root), 0, dtype=torch.long))

    def narrow(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        self.ended.append(list(counts))

    def end(self, counts: Sequence[int]) -> None:
        self.ended.append(list(counts))


class Wide(Watcher):
    """Trees of 9 nodes, two in line."""

    width, depth = 9, 2

    def propose(self, seen: Seen, limit: int) -> Draft:
        self.shown.append((list(seen.start), list(seen.counts), limit))
        rows = len(seen.root)
        return Draft(torch.zeros(rows, 9, dtype=torch.long), Tree(torch.tensor([[0, 0, 1, *[0] * 7]] * rows)))


def test_a_tree_is_asked_for_and_costs_as_deep_as_it_can_be(parts: Parts) -> None:
    """Not as deep as it is wide, though it is believed to be always right."""
    table = costs("wide")
    wide, [session] = Wide(), text_sessions(parts, 1)
    adaptive = Adaptive({"wide": wide}, {"wide": (0.99,)}, costs=table)
    adaptive.begin([session], 0.0, ())
    draft = adaptive.propose(Seen(session.cache, [0], session.cache.lengths, [[]], torch.zeros(1), torch.zeros(1)), 20)
    assert draft.tokens.shape == (1, 9) and [limit for _, _, limit in wide.shown] == [2]
    assert adaptive.last is not None and adaptive.last.seconds == table.round_seconds("wide", 2, 10, fresh=True)


def test_costs_are_of_rows_and_news_as_requests_have_them(parts: Parts) -> None:
    """Rows of unlike lengths; three new slots a draft, none of which comes twice or is left out; whole drafts."""
    [context] = text_sessions(parts, 1, seed=1, taps=(0,))
    asked: list[Watcher] = []

    class Keeping(Watcher):
        taps = (0,)

        def begin(self, *given: object) -> None:
            super().begin(*given)  # type: ignore[arg-type]
            asked.append(copy.copy(self))

        def propose(self, seen: Seen, limit: int) -> Draft:
            assert self.threshold == 0.0 and self.im_end == -1
            asked[-1].shown.append((list(seen.start), list(seen.counts), limit))
            return Draft(torch.zeros(len(seen.root), 0, dtype=torch.long))

    measure_costs(context, {"keeping": Keeping()}, 2)
    first, *starts = [request.shown for request in asked]
    (start, counts, _), *rest = first
    assert start == [0, 0] and counts[0] == counts[1] + 1  # the first has read its own context, and two rounds more
    at = list(counts)
    for start, counts, limit in rest:
        assert start == at and counts == [3, 3] and limit in (1, 6)
        at = [a + 3 for a in at]
    assert len(starts) == 4 and all(len(shown) == 1 and shown[0][0] == [0, 0] for shown in starts)
    asked.clear()
    Keeping.taps = ()  # no hidden states, so no news to wait for
    measure_costs(context, {"keeping": Keeping()}, 2)
    assert [request.shown[1][1] for request in asked] == [[1, 1]] and len(asked[0].shown) == 10


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_a_drafter_hears_of_the_last_draft_before_the_last_token(tokens: int, parts: Parts) -> None:
    """The last token of all is never drafted: nothing is proposed for it, and what is said at the end is not said of an earlier draft."""
    watcher, im_end = Watcher(), parts.tokenizer.im_end
    try:
        sessions = text_sessions_without_end(parts, 1, im_end)
        decode(sessions, max_tokens=tokens, drafter=watcher)
    finally:
        parts.tokenizer.im_end = im_end
    assert len(watcher.shown) == tokens - 1
    assert watcher.ended == [[sessions[0].cache.lengths[0]] if tokens == 1 else [1], [1]]


def test_no_room_for_drafts_is_a_warning(parts: Parts) -> None:
    """The answer comes all the same, and is the plain one."""
    limit = parts.model.config.llm.max_position_embeddings
    [session] = text_sessions(parts, 1)
    longest = limit - session.cache.lengths[0] - 1
    plain = plain_decode([session], max_tokens=longest)
    with pytest.warns(Notice, match="expected room for them"):
        out = decode([session], max_tokens=longest, drafter=Lookup())
    same(plain, out)
    assert not isinstance(out[0], Speculated)
    assert isinstance(decode([session], max_tokens=longest - 8, drafter=Lookup())[0], Speculated)
