"""Plain autoregressive decoding of a batch of sessions.

Shape legend: B sessions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from hyperbagel.generate.sampling import pick, told
from hyperbagel.generate.session import Session
from hyperbagel.generate.types import OnToken, Until
from hyperbagel.model.bagel import Bagel
from hyperbagel.model.qwen2_mot import Streams
from hyperbagel.nn.kv_cache import KVCache

T = TypeVar("T")


@dataclass
class Decoded:
    """One session's answer. ids: without im_start and im_end. finish_reason: "length", or "stop" at im_end or where `until` says so."""

    ids: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    logits: list[Tensor] = field(default_factory=list)  # [V] per step, only if asked for


OnDone = Callable[[int, Decoded], None]


class Runner(Protocol):
    """Makes the steps of decoding: EagerRunner here, GraphRunner in generate.graphs."""

    def begin(self, caches: Sequence[KVCache], positions: Sequence[int], room: int, spent: bool = False) -> None:
        """Takes the contexts of B rows, each row's next position, and how many tokens may follow. `spent`: see KVCache.stack."""

    def __call__(self, token: Tensor) -> Tensor:
        """Appends token [B, 1] to the rows -> logits [B, V] of the next one."""

    def narrow(self, rows: Sequence[int]) -> bool:
        """Goes on with these rows alone, in this order. False: it cannot, and all go on."""

    def end(self) -> None:
        """Leaves the caches given to `begin` as they were, unless they were spent."""


class EagerRunner:
    """Plans every step anew, over exactly the keys that there are."""

    def __init__(self, model: Bagel) -> None:
        self.model = model

    def begin(self, caches: Sequence[KVCache], positions: Sequence[int], room: int, spent: bool = False) -> None:
        self.cache = caches[0] if len(caches) == 1 else KVCache.stack(caches, room, spent=spent)
        self.before = list(self.cache.lengths)
        self.cache.reserve(max(self.before) + room)
        self.position = torch.tensor(positions, device=self.model.device)[:, None]

    def __call__(self, token: Tensor) -> Tensor:
        model, ones = self.model, [1] * len(self.before)
        plan = self.cache.plan(ones, causal=True)
        hidden = model.backbone(Streams(model.embed_text(token), None), self.position, cache=self.cache, plan=plan).u
        assert hidden is not None
        self.cache.advance(ones)
        self.position = self.position + 1
        return model.logits(hidden[:, -1])

    def narrow(self, rows: Sequence[int]) -> bool:
        self.cache.select(rows)
        self.before, self.position = taken(self.before, rows), self.position[list(rows)]
        return True

    def end(self) -> None:
        self.cache.truncate(self.before)


def leaving(rows: int, alive: Iterable[int]) -> list[int] | None:
    """The rows of a batch that go on alone, if some are finished; else None. They are in an order in which few change places, since their
    keys and values are copied then: the last ones take those of the finished. {0, 2, 3, 5} of six: 0, 5, 2, 3."""
    kept = set(alive)
    behind = sorted(row for row in kept if row >= len(kept))
    return [row if row in kept else behind.pop() for row in range(len(kept))] if 0 < len(kept) < rows else None


def taken(values: Sequence[T], rows: Sequence[int]) -> list[T]:
    """What `values` holds of these rows."""
    return [values[row] for row in rows]


def first_logits(sessions: Sequence[Session]) -> Tensor | None:
    """[B, V] after im_start if all sessions have read it, ready to go on from there. Else None, and none of them ends with im_start."""
    found = [session.opened for session in sessions if session.opened is not None]
    if len(found) == len(sessions):
        return torch.stack(found)
    for session in sessions:
        session.settle()
    return None


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
    spent: bool = False,
) -> list[Decoded]:
    """Decodes from im_start after each session's context until im_end, `until` or `max_tokens` tokens. Sessions that have all read im_start
    (`Session.open_answer`) save a step.

    The sessions stay as they were: an answer joins a conversation as text (`Session.add_text`), as in the reference.

    Args:
        temperature: 0 is greedy; above it each row draws from its own one of `generators`, from the nucleus of `top_p` (sampling.nucleus).
        on_token: called with (row, token id); may raise to stop the work.
        on_done: called with (row, its answer) as soon as that is whole, whatever the others still say; may raise, too.
        until: asked after each token, with (row, token id), whether the row's answer ends with it.
        keep_logits: keep the logits of every step, and of one more behind the last token.
        runner: makes the steps; None: EagerRunner.
        spent: the sessions are not needed any more; where rows are copied into one cache, their own are freed (up to ten gigabytes for
            a batch at 7B).
    Raises:
        InputError: an answer of `max_tokens` does not fit behind a context.
    """
    parts = sessions[0].parts
    model, tokenizer = parts.model, parts.tokenizer
    for session in sessions:
        session.check_answer(max_tokens)
    first = first_logits(sessions)
    step_once = EagerRunner(model) if runner is None else runner
    step_once.begin([s.cache for s in sessions], [s.position for s in sessions], max_tokens + 1, spent)
    token = torch.full((len(sessions), 1), tokenizer.im_start, device=model.device)
    results = [Decoded() for _ in sessions]
    of_row = list(range(len(sessions)))  # the session of each row of the batch; finished ones leave it (`leaving`)
    alive = set(of_row)  # rows
    try:
        for step in range(max_tokens + 1):
            logits = step_once(token) if step or first is None else first
            if keep_logits:
                for row in alive:
                    results[of_row[row]].logits.append(logits[row].float())
            if step == max_tokens:
                break
            picked = pick(logits, temperature, generators, top_p)
            token = picked[:, None]
            for row, id_ in enumerate(told(picked)):
                if row not in alive:
                    continue
                i = of_row[row]
                ended = id_ == tokenizer.im_end
                if not ended:
                    results[i].ids.append(id_)
                    if on_token is not None:
                        on_token(i, id_)
                    ended = until is not None and until(i, id_)
                if ended:
                    results[i].finish_reason = "stop"
                    alive.discard(row)
                    if on_done is not None:
                        on_done(i, results[i])
            if not alive or (step == max_tokens - 1 and not keep_logits):
                break
            kept = leaving(len(of_row), alive)
            if kept is not None and step_once.narrow(kept):
                token, generators = token[kept], taken(generators, kept) if generators else ()
                of_row, alive = taken(of_row, kept), set(range(len(kept)))
        if on_done is not None:
            for row in sorted(alive):  # those that max_tokens cut
                on_done(of_row[row], results[of_row[row]])
    finally:
        step_once.end()
    return results
