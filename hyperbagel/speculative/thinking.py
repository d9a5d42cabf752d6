"""A picture's plan: text that the model writes before it draws, drafted as answers are, and then reads like any other text."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from hyperbagel.core.errors import InputError, Notice
from hyperbagel.data.prompts import THINK_DRAW, untagged
from hyperbagel.data.tokenizer import Tokenizer
from hyperbagel.generate.decode import Decoded, Runner
from hyperbagel.generate.session import Session
from hyperbagel.generate.types import ImageRequest, OnToken, of_rows
from hyperbagel.model.bagel import Bagel
from hyperbagel.speculative.adaptive import Adaptive
from hyperbagel.speculative.decode import decode

_OTHER_STREAM = 2**64 - 1  # a seed with all its bits flipped: the picture's noise has the seed itself


@dataclass
class Plan:
    """A plan without its tags, and how it was drafted (`Adaptive.told`)."""

    text: str
    drafted: dict[str, Any] = field(default_factory=dict)


@dataclass
class Ready:
    """The context of a picture, its random stream (the posterior's noise was drawn from it, the initial noise comes next), how many tokens
    of the context came from an earlier request, who drafts its plan, the plan, and how it was drafted."""

    session: Session
    generator: torch.Generator
    reused: int
    drafter: Adaptive | None
    thinking: str | None = None
    drafted: dict[str, Any] = field(default_factory=dict)  # Adaptive.told


def written_together(
    sessions: Sequence[Session], most: Sequence[int | None], drafter: Adaptive | None = None
) -> list[tuple[int, list[int]]]:
    """(the most tokens of a plan, the sessions whose plans share forward passes with it): those with equal limits, and in fp32 alone, where
    each is what it would be alone. In a coarser type, rows of a batch round otherwise than one alone, and where two tokens nearly tie, a
    seed would give another picture. Arguments and errors as of `write_plans`."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, (session, asked) in enumerate(zip(sessions, most, strict=True)):
        exact = session.parts.model.dtype == torch.float32
        groups[_limit(session, asked, 0 if drafter is None else drafter.width), 0 if exact else i].append(i)
    return [(limit, members) for (limit, _), members in groups.items()]


def write_plans(
    sessions: Sequence[Session],
    most: Sequence[int | None],
    *,
    writer: Bagel | None = None,
    drafter: Adaptive | None = None,
    runner: Runner | None = None,
    later: bool = False,
    temperature: float = 0.0,
    seeds: Sequence[int] = (),
    on_token: OnToken | None = None,
) -> list[Plan]:
    """Writes a plan after what each session holds, reads it back in, and returns it.

    Args:
        most: tokens of each plan; None: ImageRequest.LONGEST_PLAN, or what the context and a last draft leave. Warns (Notice) if one was
            cut there.
        writer: the network that writes (generate.planner); None: the sessions' own. It reads im_start and its plan behind their contexts.
        drafter, runner: as in `speculative.decode.decode`; the runner is the writer's.
        later: what was written is read back only when something needs it (`Session.add_text`).
        temperature, seeds: 0 is greedy; above it each plan is drawn by its own seed.
        on_token: called with (index of the session, token id).
    Raises:
        InputError: the tokens that a plan may have might not fit. Nothing was written then.
    """
    plans = dict[int, Plan]()
    for limit, members in written_together(sessions, most, drafter):
        group = [sessions[i] for i in members]
        writing = [written_by(session, writer) for session in group]
        for session in writing:
            session.open_answer()
        drawn: dict[str, Any] = {"temperature": temperature}
        if temperature > 0:
            drawn["generators"] = [torch.Generator().manual_seed(_OTHER_STREAM ^ seeds[i]) for i in members]
        outs = decode(writing, max_tokens=limit, on_token=of_rows(on_token, members), drafter=drafter, runner=runner, **drawn)
        for i, session, own, out in zip(members, group, writing, outs, strict=True):
            own.settle()  # takes im_start back
            plans[i] = Plan(untagged(_read_back(session, out, limit, later)), {} if drafter is None else drafter.told(out))
    return [plans[i] for i in range(len(sessions))]


def written_by(session: Session, writer: Bagel | None) -> Session:
    """The session, or a view of it in which another network goes on behind what its own has read. They share a cache."""
    if writer is None or writer is session.parts.model:
        return session
    session.settle()
    return replace(session, parts=replace(session.parts, model=writer))


def _limit(session: Session, most: int | None, width: int) -> int:
    """The most tokens of a plan. width: of the drafts behind it. Raises InputError if they might not fit."""
    spare = session.room() - 2 - width  # it is read back between two markers
    limit = max(1, min(ImageRequest.LONGEST_PLAN, spare)) if most is None else most
    _check_most(most, session.tokens, session.tokens + session.room())
    session.check_room(limit + 2)
    return limit


def check_length(request: ImageRequest, tokenizer: Tokenizer, limit: int) -> None:
    """Raises InputError if a picture's texts, with the plan it may have, do not fit into a context of `limit` tokens."""
    texts = [item for item in request.items() if isinstance(item, str)] + ([THINK_DRAW] if request.think else [])
    tokens = sum(len(tokenizer.encode(text)) + 2 for text in texts)
    if tokens > limit:
        raise InputError(f"got a prompt of {tokens} tokens, expected at most {limit} for this model; shorten it")
    if request.think:
        _check_most(request.max_think_tokens, tokens, limit)


def _check_most(most: int | None, tokens: int, limit: int) -> None:
    """Raises InputError if a plan of `most` tokens and its two markers do not fit behind `tokens`, but a shorter one would."""
    if most is not None and most > (room := limit - tokens - 2) >= 1:
        raise InputError(
            f"got max_think_tokens {most} behind a context of {tokens}, expected at most {room} ({limit} in all); "
            "lower max_think_tokens (--max-think-tokens)"
        )


def _read_back(session: Session, out: Decoded, limit: int, later: bool) -> str:
    """Reads a plan in, as the reference does: its string, as a new text. Returns the string."""
    if out.finish_reason == "length":
        warnings.warn(f"the plan was cut at {limit} tokens; raise max_think_tokens (--max-think-tokens)", Notice, stacklevel=3)
    session.cache.untap()  # nothing drafts behind it
    tokenizer = session.parts.tokenizer
    plan = tokenizer.decode(out.ids)
    while len(tokenizer.encode(plan)) + 2 > session.room():  # a character cut in half reads back as several tokens
        plan = plan[:-1]
    session.add_text(plan, guided=False, later=later)  # guidance never drops it
    return plan
