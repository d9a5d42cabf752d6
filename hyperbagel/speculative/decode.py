"""Speculative decoding: `generate.decode` with a drafter. Same arguments, same answers, fewer forwards of the target.

A round: the drafter proposes nodes below the root; the target reads root and nodes in one forward; the accepted path stays in the cache and
the target's own next token is the new root. The first root is an answer's first token where reading the question has given it
(`Session.open_answer`), else im_start.

Shape legend: B sessions, n nodes (root included), V vocabulary.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from hyperbagel.core.errors import InputError, Notice
from hyperbagel.generate.decode import Decoded, OnDone, Runner, first_logits, leaving, taken
from hyperbagel.generate.decode import decode as plain
from hyperbagel.generate.graphs import GraphRunner
from hyperbagel.generate.sampling import pick, told
from hyperbagel.generate.session import Session
from hyperbagel.generate.types import OnToken, Until
from hyperbagel.model.bagel import Bagel
from hyperbagel.model.qwen2_mot import Streams
from hyperbagel.nn.kv_cache import KVCache
from hyperbagel.speculative.accept import accept
from hyperbagel.speculative.tree import Tree, commit, tree_plan
from hyperbagel.speculative.types import Draft, Drafter, Seen, Speculated, Stats


class Traffic(Protocol):
    """Rows that come and go between two rounds. Nobody does where shapes are fixed, nor in plain decoding: see `drafters.nobody`."""

    def gone(self, row: int) -> bool:
        """Whether nobody waits for this row's answer any more."""

    def join(self, rows: int) -> Sequence[tuple[Session, torch.Generator]]:
        """Sessions that join a batch with so many rows at work, as the next rows. They have read im_start; each brings its generator."""

    def back(self, error: Exception) -> None:
        """There is no memory for those who joined last; the others go on."""


@torch.inference_mode()
def decode(
    sessions: Sequence[Session],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generators: Sequence[torch.Generator] = (),
    on_token: OnToken | None = None,
    on_done: OnDone | None = None,
    until: Until | None = None,
    keep_logits: bool = False,
    runner: Runner | None = None,
    drafter: Drafter | None = None,
    traffic: Traffic | None = None,
    spent: bool = False,
) -> list[Decoded]:
    """As `generate.decode.decode`; with a drafter the results are `Speculated`. `runner` makes the steps of plain decoding; a GraphRunner
    also verifies drafts in fixed shapes.

    Answers are those of plain decoding, token for token as far as arithmetic allows (in fp32 they always were), sampled ones too where
    drafts are a choice (Drafter.draws); with a drafter that draws, sampled answers have plain decoding's distribution, but not its draws.
    The sessions stay as they were, unless `spent`.

    Where a draft might not fit behind the answer, it warns (Notice) and decodes plainly.

    traffic: who joins, and whose answer nobody waits for any more; the answers of both are returned too, as far as they got. Not with
        `keep_logits`.
    Raises:
        InputError: no room in the context, or contexts without the hidden states that the drafter reads.
    """
    if drafter is None or _too_wide(sessions, max_tokens, drafter):
        return plain(
            sessions,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            generators=generators,
            on_token=on_token,
            on_done=on_done,
            until=until,
            keep_logits=keep_logits,
            runner=runner,
            spent=spent,
        )
    for session in sessions:
        session.check_answer(max_tokens)
        check_taps(session, drafter)
    if len({id(generator) for generator in generators}) < len(generators):
        raise ValueError("got a generator of several rows, expected one of its own for each: what is drafted decides how often a row draws")
    graphs = runner if isinstance(runner, GraphRunner) else None
    first, work = first_logits(sessions), None
    try:
        how: dict[str, Any] = {"top_p": top_p, "graphs": graphs, "spent": spent, "on_done": on_done, "until": until, "traffic": traffic}
        work = Rounds(sessions, max_tokens, temperature, generators, on_token, keep_logits, drafter, **how)
        if first is not None:
            work.open(first)
        while work.alive:
            work.round()
        drafter.end(work.counts)
    except BaseException:
        drafter.end([0] * len(sessions if work is None else work.of_row))  # nothing to learn, but it must let go of these caches
        raise
    finally:
        if work is not None:
            work.cache.truncate(work.before)
    return list(work.results)


def _too_wide(sessions: Sequence[Session], max_tokens: int, drafter: Drafter) -> bool:
    """Whether the answer fits the model's context, but not with a whole draft behind it; warns if so."""
    limit = sessions[0].parts.model.config.llm.max_position_embeddings
    longest = max(session.tokens for session in sessions) + max_tokens + 1
    if not longest <= limit < longest + drafter.width:
        return False
    most = limit - longest + max_tokens - drafter.width  # tokens of a text that leave room for drafts
    if max_tokens > 1:  # a single token is never drafted
        warnings.warn(
            f"got drafts of {drafter.width} tokens behind {longest} of a context of {limit}, expected room for them; going on without a "
            f"drafter{f', use max_tokens (of a plan max_think_tokens) of at most {most} to have one' if most > 1 else ''}",
            Notice,
            stacklevel=4,
        )
    return True


def check_taps(session: Session, drafter: Drafter) -> None:
    """Raises InputError if the session's cache lacks what the drafter reads."""
    missing = sorted(set(drafter.taps) - set(session.cache.taps))
    if missing:
        raise InputError(
            f"got a context without the hidden states of layers {missing}, expected them for this drafter, "
            "make the session's cache with the drafter's taps"
        )


class Rounds:
    """The state of one call of `decode`: the stacked cache, each row's root and result.

    Rows are those of the batch. Where nothing has a fixed shape, finished ones leave it (`leaving`); `of_row`: which session each one is.
    """

    def __init__(
        self,
        sessions: Sequence[Session],
        max_tokens: int,
        temperature: float,
        generators: Sequence[torch.Generator],
        on_token: OnToken | None,
        keep_logits: bool,
        drafter: Drafter,
        top_p: float = 1.0,
        im_end: int | None = None,
        graphs: GraphRunner | None = None,
        spent: bool = False,
        on_done: OnDone | None = None,
        until: Until | None = None,
        traffic: Traffic | None = None,
    ) -> None:
        """im_end: the token that ends an answer; None: the tokenizer's. graphs: verifies drafts in fixed shapes. The rest: see
        `generate.decode.decode`."""
        parts = sessions[0].parts
        self.model, self.im_end = parts.model, parts.tokenizer.im_end if im_end is None else im_end
        self.max_tokens, self.temperature, self.top_p, self.generators = max_tokens, temperature, top_p, generators
        self.on_token, self.on_done, self.until = on_token, on_done, until
        self.keep_logits, self.drafter = keep_logits, drafter
        self.results = [Speculated() for _ in sessions]
        self.times = self.results[0].times
        for result in self.results:
            result.times = self.times
        assert traffic is None or not keep_logits, "got rows that may join and logits to keep, expected one of the two"
        self.traffic, self.spent, self.room = traffic, spent, max_tokens + 1 + drafter.width
        room = self.room
        drafter.begin(sessions, temperature, generators)  # before `reader`: a budget may measure its costs with the same graphs
        caches = [s.cache for s in sessions]
        self.reader = None if graphs is None else graphs.reader(caches, room, spent)
        if self.reader is not None:
            self.cache = self.reader.cache
        else:
            self.cache = caches[0] if len(caches) == 1 else KVCache.stack(caches, room, caches[0].taps, spent)
        self.lent = self.cache is caches[0]  # a lone session is decoded in place
        self.before = list(self.cache.lengths)
        self.cache.reserve(max(self.before) + room)
        device = self.model.device
        self.im_start = parts.tokenizer.im_start
        self.root, self.said = torch.full((len(sessions),), self.im_start, device=device), [self.im_start] * len(sessions)
        self.position = torch.tensor([s.position for s in sessions], device=device)
        self.of_row = list(range(len(sessions)))
        self.alive = set(self.of_row)
        self.start, self.counts = [0] * len(sessions), list(self.before)  # as in Seen
        self.ids: list[list[int]] = [[] for _ in sessions]

    def open(self, first: Tensor) -> None:
        """Takes the answers' first tokens from logits [B, V] after im_start, which the caches end with. They cost no round and count in
        no statistics."""
        self._begin_answers(range(len(self.root)), first, self.generators)

    def _begin_answers(self, rows: range, first: Tensor, generators: Sequence[torch.Generator]) -> None:
        """Rows `rows`, the last ones, get their first tokens from logits [len(rows), V]."""
        said = pick(first, self.temperature, generators, self.top_p)
        self.root, self.said = torch.cat([self.root[: rows.start], said]), [*self.said[: rows.start], *told(said)]
        self.ids = [*self.ids[: rows.start], *([self.im_start] for _ in rows)]
        for b, id_ in zip(rows, self.said[rows.start :], strict=True):
            self._report(b, [0], [id_], first[:, None], 0)
            self.results[self.of_row[b]].stats = Stats()
        self._tell_done(rows)

    def round(self) -> None:
        """Draft, verify, accept, commit, report."""
        if self.reader is None:
            if self.traffic is not None:
                self.alive = {b for b in self.alive if not self.traffic.gone(self.of_row[b])}
                if not self.alive:
                    return
            self._leave(leaving(len(self.of_row), self.alive))
            self._welcome()
        clock = [time.perf_counter()]
        draft = self._propose()
        clock.append(time.perf_counter())
        n = 1 + draft.tokens.shape[1]
        tokens = torch.cat([self.root[:, None], draft.tokens], dim=1) if n > 1 else self.root[:, None]  # [B, n]
        if self.reader is not None:
            logits = self.reader(tokens, self.position, None if draft.tree is None else draft.tree.parents)
        else:
            logits = verify_forward(self.model, self.cache, tokens, draft.tree, self.position)
        clock.append(time.perf_counter())
        how = self.temperature, self.generators, self.top_p
        verdict = accept(logits, tokens, draft, *how)  # a round's only wait for the device, but where a tree was drawn
        draft.depths = verdict.deepest
        begun = [end - n for end in self.cache.lengths]
        paths = [path if b in self.alive else [] for b, path in enumerate(verdict.paths)]
        if n > 1 or len(self.alive) < len(paths):
            commit(self.cache, begun, paths)
        clock.append(time.perf_counter())
        self.start, self.counts, before = begun, [len(path) for path in paths], sorted(self.alive)
        self.ids = [[verdict.tokens[b][i] for i in path] for b, path in enumerate(paths)]
        for b in before:
            self._report(b, paths[b], [*self.ids[b][1:], verdict.own[b]], logits, verdict.deepest[b])
        self.root, self.said = verdict.root, verdict.own
        same = self.counts[0] if len(set(self.counts)) == 1 else None
        self.position = self.position + (torch.tensor(self.counts, device=self.position.device) if same is None else same)
        clock.append(time.perf_counter())
        spent = [b - a for a, b in pairwise(clock)]
        t = self.times
        t.draft, t.verify, t.commit, t.host = (x + y for x, y in zip((t.draft, t.verify, t.commit, t.host), spent))
        self._tell_done(before)

    def _tell_done(self, rows: Sequence[int]) -> None:
        """Hands over the answers of those of these rows that are whole by now."""
        if self.on_done is not None:
            for b in (b for b in rows if b not in self.alive):
                self.on_done(self.of_row[b], self.results[self.of_row[b]])

    def _leave(self, kept: list[int] | None) -> None:
        """Goes on with these rows alone; None: with all."""
        if kept is None:
            return
        self.drafter.narrow(kept, self.counts)
        self.cache.select(kept)
        at = torch.tensor(kept, device=self.root.device)
        self.root, self.position = self.root[at], self.position[at]
        self.of_row, self.before = taken(self.of_row, kept), taken(self.before, kept)
        self.ids, self.said = taken(self.ids, kept), taken(self.said, kept)
        self.start, self.counts = taken(self.start, kept), taken(self.counts, kept)
        self.generators = taken(self.generators, kept) if self.generators else ()
        self.alive = set(range(len(kept)))

    def _welcome(self) -> None:
        """Takes in the sessions that join, in the places of rows that left."""
        new = self.traffic.join(len(self.alive)) if self.traffic is not None else ()
        if not new:
            return
        assert self.traffic is not None
        sessions, generators = [session for session, _ in new], [generator for _, generator in new]
        first = first_logits(sessions)
        assert first is not None, "got a session that joins and has not read im_start"
        caches = [session.cache for session in sessions]
        try:
            if self.lent:
                alone, self.cache = self.cache, KVCache.stack([self.cache, *caches], self.room, self.cache.taps, self.spent)
                alone.truncate(self.before)
                self.lent = False
            else:
                self.cache.add(caches, self.room, self.spent)
        except torch.OutOfMemoryError as error:  # before anything was copied
            self.traffic.back(error)
            return
        self.drafter.widen(sessions, generators, self.counts)
        rows = range(len(self.root), len(self.root) + len(new))
        lengths = [session.cache.lengths[0] for session in sessions]
        self.of_row = [*self.of_row, *range(len(self.results), len(self.results) + len(new))]
        self.results += [Speculated(times=self.times) for _ in new]
        self.alive |= set(rows)
        self.before, self.start, self.counts = [*self.before, *lengths], [*self.start, *[0] * len(new)], [*self.counts, *lengths]
        self.position = torch.cat([self.position, torch.tensor([session.position for session in sessions], device=self.position.device)])
        self.generators = [*self.generators, *generators] if self.temperature > 0 else ()
        self._begin_answers(rows, first, generators)

    def _propose(self) -> Draft:
        """The drafter's proposal, without nodes where it has none or none is needed."""
        left = max(self.max_tokens - len(self.results[self.of_row[b]].ids) for b in self.alive)
        limit = left - 1 + self.keep_logits  # the target itself adds one token more
        if limit > 0:
            seen = Seen(self.cache, self.start, self.counts, self.ids, self.root, self.position, self.reader, self.said)
            draft = self.drafter.propose(seen, limit)
            if draft.tokens.shape[1]:
                return draft
        else:  # one token is left, which needs no draft: the drafter learns now how its last one fared
            self.drafter.end(self.counts)
        return Draft(self.root.new_empty(len(self.root), 0))

    def _report(self, b: int, path: list[int], new: list[int], logits: Tensor, deepest: int) -> None:
        """Adds row b's new tokens, the accepted ones and the target's own, to its result, as far as plain decoding would have gone."""
        result = self.results[self.of_row[b]]
        stats = result.stats
        stats.rounds += 1
        for i, (node, id_) in enumerate(zip(path, new, strict=True)):
            if self.keep_logits:
                result.logits.append(logits[b, node].float())
            if len(result.ids) == self.max_tokens:  # of this one only the logits were wanted
                self.alive.discard(b)
                return
            stats.tokens += 1
            if i < deepest:
                stats.tried[i + 1] += 1
                stats.accepted[i + 1] += i + 1 < len(path)
            ended = id_ == self.im_end
            if not ended:
                result.ids.append(id_)
                if self.on_token is not None:
                    self.on_token(self.of_row[b], id_)
                ended = self.until is not None and self.until(self.of_row[b], id_)
            if ended:
                result.finish_reason = "stop"
                self.alive.discard(b)
                return
            if len(result.ids) == self.max_tokens and not self.keep_logits:
                self.alive.discard(b)
                return


def verify_forward(model: Bagel, cache: KVCache, tokens: Tensor, tree: Tree | None, position: Tensor) -> Tensor:
    """The target reads root and nodes, tokens [B, n] (-1 read as 0), the root at `position` [B] -> logits [B, n, V]; the cache grows by n
    per row. `tree` None: a chain."""
    counts = [tokens.shape[1]] * tokens.shape[0]
    plan = cache.plan(counts, causal=True) if tree is None else tree_plan(cache, tree)
    depths = torch.arange(tokens.shape[1], device=position.device) if tree is None else tree.depths
    where = position[:, None] + depths
    hidden = model.backbone(Streams(model.embed_text(tokens.clamp(min=0)), None), where, cache=cache, plan=plan).u
    assert hidden is not None
    cache.advance(counts)
    return model.logits(hidden)
