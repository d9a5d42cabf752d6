"""The drafters that ship: the embedded model's answers stay its own, token for token, and come in fewer forwards."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from PIL import Image

from hyperbagel.generate.decode import decode as plain_decode
from hyperbagel.generate.graphs import GraphRunner
from hyperbagel.generate.session import Session
from hyperbagel.pipeline import HyperBagel
from hyperbagel.speculative.compare import first_divergence
from hyperbagel.speculative.decode import decode
from hyperbagel.speculative.types import Speculated
from hyperbagel.toybox.language import sample_question
from hyperbagel.toybox.render import render

PROMPTS, BATCH, LENGTH = 1000, 100, 24
TIE = 1e-4  # reading several tokens at once rounds differently: two best logits closer than this may change places
NAMES = HyperBagel.from_pretrained("toybox", device="cpu").drafters.shipped()


@pytest.fixture(scope="module")
def model() -> HyperBagel:
    return HyperBagel.from_pretrained("toybox", device="cpu", dtype="float32")


def drawn() -> dict[str, Any]:
    """Settings of a sampled batch, with fresh generators."""
    return {"temperature": 1.0, "generators": [torch.Generator().manual_seed(i) for i in range(BATCH)]}


def test_there_are_some() -> None:
    assert NAMES


@pytest.mark.parametrize(("prompts", "way"), [(PROMPTS, "served"), (BATCH, "fixed shapes"), (2 * BATCH, "chain"), (3 * BATCH, "sampled")])
@pytest.mark.parametrize("name", NAMES)
def test_a_thousand_questions(name: str, prompts: int, way: str, model: HyperBagel) -> None:
    """As requests have it, without and with graphs, and a chain; drawn at a temperature, with the draws of plain decoding."""
    drafter = model.drafters.get(name) if way == "chain" else model.drafters.served(name)
    runner = GraphRunner(model.parts.model) if way == "fixed shapes" else None
    rng = random.Random(5)
    rounds = tokens = ties = 0
    for _ in range(prompts // BATCH):
        sessions = []
        for _ in range(BATCH):
            asked = sample_question(rng)
            session = Session.new(model.parts, drafter.taps)
            session.add_image(Image.fromarray(render(asked.scene)), latents=False)
            session.add_text(asked.question)
            sessions.append(session)
        if way == "sampled":
            plain = plain_decode(sessions, max_tokens=LENGTH, **drawn())
            outs = decode(sessions, max_tokens=LENGTH, drafter=drafter, **drawn())
            assert [(out.ids, out.finish_reason) for out in outs] == [(told.ids, told.finish_reason) for told in plain]
        else:
            plain = plain_decode(sessions, max_tokens=LENGTH, keep_logits=True)
            outs = decode(sessions, max_tokens=LENGTH, drafter=drafter, runner=runner)
        for told, out in zip(plain, outs, strict=True):
            parted = None if way == "sampled" else first_divergence(told, out)
            ties += parted is not None
            assert parted is None or parted.gap < TIE
            assert isinstance(out, Speculated)
            rounds, tokens = rounds + out.stats.rounds, tokens + out.stats.tokens
    assert ties <= 2
    assert tokens > 1.5 * rounds
