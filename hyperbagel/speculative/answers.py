"""Answers to several questions, written together. Each is handed over as soon as it is whole; others may join meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hyperbagel.core.errors import InputError
from hyperbagel.core.hardware import clock
from hyperbagel.data.answer_text import AnswerText
from hyperbagel.data.prompts import split_thinking
from hyperbagel.generate.decode import Decoded, Runner
from hyperbagel.generate.session import Session
from hyperbagel.generate.types import AskRequest, OnToken, TextResult
from hyperbagel.speculative.adaptive import Adaptive
from hyperbagel.speculative.decode import decode
from hyperbagel.speculative.drafters.nobody import Nobody

OnAnswer = Callable[[int, TextResult], None]


class Visitors(Protocol):
    """Who asks while answers are written. Their max_tokens, `sampling` and drafter are those of the others, which they join."""

    def next(self, rows: int) -> AskRequest | None:
        """The next request, if there is one for a batch with so many answers at work. Unless it is refused, it gets the next index."""

    def refuse(self, error: Exception) -> None:
        """The last request, and the one before it with the next call, cannot join: it cannot be met (InputError), or not now."""

    def gone(self, index: int) -> bool:
        """Whether nobody waits for this answer any more."""


def write_answers(
    requests: Sequence[AskRequest],
    sessions: Sequence[Session],
    timings: Mapping[str, float],
    *,
    drafter: Adaptive | None = None,
    runner: Runner | None = None,
    on_token: OnToken | None = None,
    on_answer: OnAnswer | None = None,
    visitors: Visitors | None = None,
    prepare: Callable[[AskRequest], Session] | None = None,
) -> list[TextResult]:
    """Decodes an answer to each request, behind its session, which is not needed afterwards. Returns those that are whole.

    Args:
        requests: with equal max_tokens and `sampling`.
        timings: seconds so far; each answer adds its own `decode`, up to its last token.
        drafter, runner: as in `speculative.decode.decode`.
        on_token, on_answer: called with (index of the request, token id), and with (index, answer) as soon as it is whole.
        visitors: asked between rounds; a runner's batch stays as it is. prepare: from a request to its session, opened, with the drafter's
            taps; may raise InputError.
    """
    work = _Writing(sessions[0], drafter, on_answer, visitors, prepare)
    generators = [work.begin(request, session, timings) for request, session in zip(requests, sessions, strict=True)]
    how: dict[str, Any] = {"drafter": drafter}
    if visitors is not None and runner is None:
        how = {"drafter": drafter or Nobody(), "traffic": work}
    how |= requests[0].sampling
    told: dict[str, Any] = {"on_token": on_token, "on_done": work.done, "until": work.until}
    decode(sessions, max_tokens=requests[0].max_tokens, generators=generators, **told, runner=runner, spent=True, **how)
    return [work.results[row] for row in sorted(work.results)]


@dataclass
class _Row:
    """What is known of an answer; of its request no more than is needed, since pictures take room."""

    think: bool
    stopped: AnswerText | None  # if it has stop texts
    context: int  # tokens
    reused: int  # of them
    timings: Mapping[str, float]  # seconds, up to the beginning
    began: float


class _Writing:
    """The answers at work, and those that are whole. It is the batch's Traffic."""

    def __init__(
        self,
        one: Session,
        drafter: Adaptive | None,
        on_answer: OnAnswer | None,
        visitors: Visitors | None,
        prepare: Callable[[AskRequest], Session] | None,
    ) -> None:
        self.drafter, self.on_answer, self.visitors, self.prepare = drafter, on_answer, visitors, prepare
        self.tokenizer, self.where = one.parts.tokenizer, one.parts.model.device
        self.rows: list[_Row] = []
        self.joined = 0  # of the last call of `join`
        self.results: dict[int, TextResult] = {}

    def begin(self, request: AskRequest, session: Session, timings: Mapping[str, float]) -> torch.Generator:
        """The next row; returns its generator."""
        stopped = AnswerText(self.tokenizer, request.stop, request.think) if request.stop else None
        tokens = session.tokens  # now: a lone session is decoded in place
        self.rows.append(_Row(request.think, stopped, tokens, session.reused, timings, clock(self.where)))
        return torch.Generator().manual_seed(request.seed)

    def until(self, row: int, token: int) -> bool:
        if (text := self.rows[row].stopped) is None:
            return False
        text.push(token)
        return text.ended_at is not None

    def done(self, row: int, out: Decoded) -> None:
        of = self.rows[row]
        said, at, reason = self.tokenizer.decode(out.ids), None, out.finish_reason
        if of.stopped is not None:
            of.stopped.finish()  # what only the end decides, as a stream does
            said, at = of.stopped.text, of.stopped.ended_at
            reason = reason if at is None else "stop"
        thinking, answer = split_thinking(said, of.think)
        known: dict[str, Any] = {"timings": {**of.timings, "decode": clock(self.where) - of.began}, "reused": of.reused, "stopped_at": at}
        known |= {} if self.drafter is None else self.drafter.told(out)
        result = TextResult(answer, len(out.ids), of.context, thinking=thinking, finish_reason=reason, **known)
        self.results[row] = result
        if self.on_answer is not None:
            self.on_answer(row, result)

    def gone(self, row: int) -> bool:
        return self.visitors is not None and self.visitors.gone(row)

    def join(self, rows: int) -> list[tuple[Session, torch.Generator]]:
        assert self.visitors is not None and self.prepare is not None
        found: list[tuple[Session, torch.Generator]] = []
        while (request := self.visitors.next(rows + len(found))) is not None:
            start = clock(self.where)
            try:
                session = self.prepare(request)
                session.check_answer(request.max_tokens)
            except Exception as error:  # whatever it is, the others go on
                self.visitors.refuse(error)
                if isinstance(error, InputError):
                    continue
                break
            found.append((session, self.begin(request, session, {"prefill": clock(self.where) - start})))
        self.joined = len(found)
        return found

    def back(self, error: Exception) -> None:
        assert self.visitors is not None
        for _ in range(self.joined):
            self.rows.pop()
            self.visitors.refuse(error)
