"""Answers to several questions, written together. Each is handed over as soon as it is whole; others may join meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from hyperbagel.core.errors import InputError
from hyperbagel.core.hardware import clock
from hyperbagel.data.prompts import split_thinking
from hyperbagel.generate.decode import Decoded, Runner
from hyperbagel.generate.session import Session
from hyperbagel.generate.types import AskRequest, OnToken, TextResult
from hyperbagel.speculative.adaptive import Adaptive
from hyperbagel.speculative.decode import decode
from hyperbagel.speculative.drafters.nobody import Nobody

OnAnswer = Callable[[int, TextResult], None]


class Newcomers(Protocol):
    """Requests that come while answers are written. They join these, so their max_tokens, temperature and drafter must be the same."""

    def next(self, rows: int) -> AskRequest | None:
        """The next request, if there is one for a batch with so many answers at work. Unless it is refused, it gets the next index."""

    def refuse(self, error: InputError) -> None:
        """The last request cannot be met."""


def write_answers(
    requests: Sequence[AskRequest],
    sessions: Sequence[Session],
    timings: Mapping[str, float],
    *,
    drafter: Adaptive | None = None,
    runner: Runner | None = None,
    on_token: OnToken | None = None,
    on_answer: OnAnswer | None = None,
    newcomers: Newcomers | None = None,
    prepare: Callable[[AskRequest], Session] | None = None,
) -> list[TextResult]:
    """Decodes an answer to each request, behind its session, which is not needed afterwards.

    Args:
        requests: with equal max_tokens and temperature.
        timings: seconds so far; each answer adds its own `decode`, up to its last token.
        drafter, runner: as in `speculative.decode.decode`.
        on_token, on_answer: called with (index of the request, token id), and with (index, answer) as soon as it is whole.
        newcomers: asked between rounds; a runner's batch stays as it is. prepare: from a newcomer to its session, opened, with the
            drafter's taps; may raise InputError, which refuses it.
    """
    where, tokenizer = sessions[0].parts.model.device, sessions[0].parts.tokenizer
    asked, spent, results = list(requests), [timings for _ in requests], dict[int, TextResult]()
    contexts = [session.tokens for session in sessions]  # now: a lone session is decoded in place
    began = [clock(where)] * len(asked)

    def done(row: int, out: Decoded) -> None:
        seconds = {**spent[row], "decode": clock(where) - began[row]}
        thinking, answer = split_thinking(tokenizer.decode(out.ids), asked[row].think)
        drafted = {} if drafter is None else drafter.told(out)
        results[row] = TextResult(answer, len(out.ids), contexts[row], seconds, thinking, out.finish_reason, **drafted)
        if on_answer is not None:
            on_answer(row, results[row])

    def join(rows: int) -> list[tuple[Session, torch.Generator]]:
        assert newcomers is not None and prepare is not None
        found: list[tuple[Session, torch.Generator]] = []
        while (request := newcomers.next(rows + len(found))) is not None:
            start = clock(where)
            try:
                session = prepare(request)
                session.check_answer(request.max_tokens)
            except InputError as error:
                newcomers.refuse(error)
                continue
            found.append((session, _generator(request)))
            asked.append(request)
            contexts.append(session.tokens)
            began.append(clock(where))
            spent.append({"prefill": began[-1] - start})
        return found

    how: dict[str, Any] = {"drafter": drafter}
    if newcomers is not None and runner is None:
        how = {"drafter": drafter or Nobody(), "join": join}
    decode(
        sessions,
        max_tokens=requests[0].max_tokens,
        temperature=requests[0].temperature,
        generators=[_generator(request) for request in requests],
        on_token=on_token,
        on_done=done,
        runner=runner,
        spent=True,
        **how,
    )
    return [results[row] for row in range(len(asked))]


def _generator(request: AskRequest) -> torch.Generator:
    return torch.Generator().manual_seed(request.seed)
