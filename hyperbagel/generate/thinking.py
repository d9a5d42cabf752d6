"""A picture's plan: text that the model writes before it draws, and then reads like any other text."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence

from hyperbagel.core.errors import Notice
from hyperbagel.generate.decode import Decoded
from hyperbagel.generate.session import Session
from hyperbagel.generate.types import ImageRequest

# Called with (indices of the sessions whose plans are written together, most tokens of each); returns what was decoded for each.
Decode = Callable[[Sequence[int], int], Sequence[Decoded]]


def write_plans(sessions: Sequence[Session], most: Sequence[int | None], decode: Decode, together: bool) -> list[str]:
    """Writes a plan after what each session holds, reads it back in, and returns it.

    Args:
        most: tokens of each plan; None: ImageRequest.LONGEST_PLAN, or what the context has left. Warns (Notice) if one was cut there.
        decode: decodes greedily from im_start behind sessions.
        together: whether plans that may be equally long are decoded in one batch.
    Raises:
        InputError: the tokens that a plan may have might not fit. Nothing was decoded then.
    """
    limits = [_limit(session, asked) for session, asked in zip(sessions, most, strict=True)]
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, limit in enumerate(limits):
        groups[limit, 0 if together else i].append(i)
    written = dict[int, str]()
    for (limit, _), members in groups.items():
        for i in members:
            sessions[i].open_answer()
        for i, out in zip(members, decode(members, limit), strict=True):
            written[i] = _read_back(sessions[i], out, limit)
    return [written[i] for i in range(len(sessions))]


def _limit(session: Session, most: int | None) -> int:
    """The most tokens of a plan. Raises InputError if they might not fit."""
    spare = session.room() - 2  # it is read back between two markers
    limit = max(1, min(ImageRequest.LONGEST_PLAN, spare)) if most is None else most
    session.check_room(limit + 2)
    return limit


def _read_back(session: Session, out: Decoded, limit: int) -> str:
    """Reads a plan in, as the reference does: its string, as a new text."""
    if out.finish_reason == "length":
        warnings.warn(f"the plan was cut at {limit} tokens; raise max_think_tokens (--max-think-tokens)", Notice, stacklevel=3)
    session.cache.untap()  # nothing drafts behind it
    tokenizer = session.parts.tokenizer
    plan = tokenizer.decode(out.ids)
    while len(tokenizer.encode(plan)) + 2 > session.room():  # a character cut in half reads back as several tokens
        plan = plan[:-1]
    session.add_text(plan, guided=False)  # guidance never drops it
    return plan
