"""Answers to several questions, written together. Each is handed over as soon as it is whole; others may join meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


class _Writing:
    """What is known of each answer, by row; of a request no more than is needed, since pictures take room. It is the batch's Traffic."""

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
        self.thinks: list[bool] = []
        self.stopped: list[AnswerText | None] = []  # of requests with stop strings
        self.contexts: list[int] = []  # tokens
        self.timings: list[Mapping[str, float]] = []  # seconds, up to the beginning
        self.began: list[float] = []
        self.joined = 0  # of the last call of `join`
        self.results: dict[int, TextResult] = {}

    def begin(self, request: AskRequest, session: Session, timings: Mapping[str, float]) -> torch.Generator:
        """The next row; returns its generator."""
        self.thinks.append(request.think)
        self.stopped.append(AnswerText(self.tokenizer, request.stop, request.think) if request.stop else None)
        self.contexts.append(session.tokens)  # now: a lone session is decoded in place
        self.timings.append(timings)
        self.began.append(clock(self.where))
        return torch.Generator().manual_seed(request.seed)

    def until(self, row: int, token: int) -> bool:
        if (text := self.stopped[row]) is None:
            return False
        text.push(token)
        return text.ended_at is not None

    def done(self, row: int, out: Decoded) -> None:
        seconds = {**self.timings[row], "decode": clock(self.where) - self.began[row]}
        stopped = self.stopped[row]
        at = None if stopped is None else stopped.ended_at
        said = self.tokenizer.decode(out.ids) if stopped is None or at is None else stopped.text
        thinking, answer = split_thinking(said, self.thinks[row])
        drafted = {} if self.drafter is None else self.drafter.told(out)
        result = TextResult(answer, len(out.ids), self.contexts[row], seconds, thinking, out.finish_reason, stopped_at=at, **drafted)
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
            for values in (self.thinks, self.stopped, self.contexts, self.timings, self.began):
                values.pop()
            self.visitors.refuse(error)
