"""Answers to several questions, written together, each handed over as soon as it is whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from hyperbagel.core.hardware import clock
from hyperbagel.data.prompts import split_thinking
from hyperbagel.generate.decode import Decoded, Runner
from hyperbagel.generate.session import Session
from hyperbagel.generate.types import AskRequest, OnToken, TextResult
from hyperbagel.speculative.adaptive import Adaptive
from hyperbagel.speculative.decode import decode

OnAnswer = Callable[[int, TextResult], None]


def write_answers(
    requests: Sequence[AskRequest],
    sessions: Sequence[Session],
    timings: Mapping[str, float],
    *,
    drafter: Adaptive | None = None,
    runner: Runner | None = None,
    on_token: OnToken | None = None,
    on_answer: OnAnswer | None = None,
) -> list[TextResult]:
    """Decodes an answer to each request, behind its session, which is not needed afterwards.

    Args:
        requests: with equal max_tokens and temperature.
        timings: seconds so far; each answer adds its own `decode`, up to its last token.
        drafter, runner: as in `speculative.decode.decode`.
        on_token, on_answer: called with (index of the request, token id), and with (index, answer) as soon as it is whole.
    """
    where, tokenizer = sessions[0].parts.model.device, sessions[0].parts.tokenizer
    contexts, results = [session.tokens for session in sessions], dict[int, TextResult]()  # now: a lone session is decoded in place
    start = clock(where)

    def done(row: int, out: Decoded) -> None:
        spent = {**timings, "decode": clock(where) - start}
        thinking, answer = split_thinking(tokenizer.decode(out.ids), requests[row].think)
        drafted = {} if drafter is None else drafter.told(out)
        results[row] = TextResult(answer, len(out.ids), contexts[row], spent, thinking, out.finish_reason, **drafted)
        if on_answer is not None:
            on_answer(row, results[row])

    decode(
        sessions,
        max_tokens=requests[0].max_tokens,
        temperature=requests[0].temperature,
        generators=[torch.Generator().manual_seed(request.seed) for request in requests],
        on_token=on_token,
        on_done=done,
        drafter=drafter,
        runner=runner,
        spent=True,
    )
    return [results[row] for row in range(len(requests))]
