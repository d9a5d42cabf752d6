"""A picture's plan: text that the model writes before it draws, and then reads like any other text."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from hyperbagel.core.errors import Notice
from hyperbagel.generate.decode import decode
from hyperbagel.generate.graphs import GraphRunner
from hyperbagel.generate.session import Session
from hyperbagel.generate.types import ImageRequest


def write_plan(
    session: Session,
    most: int | None = None,
    on_token: Callable[[int, int], None] | None = None,
    runner: GraphRunner | None = None,
) -> str:
    """Writes a plan after what the session holds, reads it back in, and returns it.

    most: tokens of the plan; None: ImageRequest.LONGEST_PLAN, or what the context has left. Warns (Notice) if the plan was cut there.
    Raises InputError if `most` tokens might not fit.
    """
    spare = session.room() - 2  # it is read back between two markers
    asked = max(1, min(ImageRequest.LONGEST_PLAN, spare)) if most is None else most
    session.check_room(asked + 2)
    session.open_answer()
    out = decode([session], max_tokens=asked, on_token=on_token, runner=runner)[0]
    if out.finish_reason == "length":
        warnings.warn(f"the plan was cut at {asked} tokens; raise max_think_tokens (--max-think-tokens)", Notice, stacklevel=2)
    tokenizer = session.parts.tokenizer
    plan = tokenizer.decode(out.ids)
    while len(tokenizer.encode(plan)) + 2 > session.room():  # a character cut in half reads back as several tokens
        plan = plan[:-1]
    session.add_text(plan, guided=False)  # the reference reads the string back in as a new text; guidance never drops it
    return plan
