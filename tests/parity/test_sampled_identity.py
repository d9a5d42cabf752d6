"""Where drafts are a choice, sampled answers are plain decoding's too: a seed's answer is the same with drafts and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity_world import STUBS, drafter_of, mixed_sessions, same, served, text_sessions

from hyperbagel.generate.decode import decode as plain_decode
from hyperbagel.generate.graphs import GraphRunner
from hyperbagel.generate.session import Parts
from hyperbagel.speculative.decode import decode

PROMPTS, BATCH, LENGTH = 1000, 125, 12
NAMES = [*STUBS, "lookup"]


def drawn(seed: int, rows: int, length: int = LENGTH) -> dict[str, Any]:
    """Settings of a sampled request: fresh generators, so that two calls may draw the same."""
    return {"max_tokens": length, "temperature": 1.0, "generators": [torch.Generator().manual_seed(seed + i) for i in range(rows)]}


@pytest.mark.parametrize("name", NAMES)
def test_a_thousand_prompts(name: str, parts: Parts) -> None:
    sessions, reasons, lengths = text_sessions(parts, PROMPTS), set(), set()
    for at in range(0, PROMPTS, BATCH):
        group = sessions[at : at + BATCH]
        plain = plain_decode(group, **drawn(at, BATCH))
        same(plain, decode(group, drafter=drafter_of(name, plain, parts), **drawn(at, BATCH)))
        reasons |= {out.finish_reason for out in plain}
        lengths |= {len(out.ids) for out in plain}
    assert reasons == {"stop", "length"} and len(lengths) > 5


@pytest.mark.parametrize("name", NAMES)
def test_after_any_context_alone_together_and_in_fixed_shapes(name: str, parts: Parts) -> None:
    sessions = mixed_sessions(parts)
    plain = plain_decode(sessions, **drawn(7, len(sessions), 20))
    for runner in (None, GraphRunner(parts.model)):
        same(plain, decode(sessions, drafter=drafter_of(name, plain, parts), runner=runner, **drawn(7, len(sessions), 20)))
    for i, (session, told) in enumerate(zip(sessions, plain, strict=True)):
        same([told], decode([session], drafter=drafter_of(name, [told], parts), **drawn(7 + i, 1, 20)))


@pytest.mark.parametrize("name", [*NAMES, "block, tree"])
def test_within_a_nucleus_too(name: str, parts: Parts) -> None:
    """Alone, together, in fixed shapes. Few tokens are left, so answers differ from those drawn from all; with none left, greedy ones."""
    sessions = text_sessions(parts, 30, seed=2, taps=(0, 1, 2, 3, 4, 5))
    how = {**drawn(3, 30), "top_p": 0.5}
    plain = plain_decode(sessions, **how)
    assert sum(a.ids != b.ids for a, b in zip(plain, plain_decode(sessions, **drawn(3, 30)), strict=True)) > 10
    for runner in (None, GraphRunner(parts.model)):
        drafter = served(name, parts) if "," in name else drafter_of(name, plain, parts)
        same(plain, decode(sessions, drafter=drafter, runner=runner, **how | drawn(3, 30)))
    same(plain[:1], decode(sessions[:1], drafter=drafter_of("echo", plain[:1], parts), **how | drawn(3, 1)))
    greedy = plain_decode(sessions, max_tokens=LENGTH)
    for top_p in (0.0, 1e-9):
        same(greedy, decode(sessions, drafter=drafter_of("echo", greedy, parts), **how | drawn(3, 30) | {"top_p": top_p}))


def test_rows_that_share_a_generator_are_refused(parts: Parts) -> None:
    sessions, shared = text_sessions(parts, 2, seed=3), [torch.Generator()] * 2
    plain = plain_decode(sessions, max_tokens=4)
    with pytest.raises(ValueError, match="one of its own for each"):
        decode(sessions, max_tokens=4, temperature=1.0, generators=shared, drafter=drafter_of("echo", plain, parts))
