"""Pictures and conversations that were prefilled before: the same result, without reading them again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_world import small_parts

from hyperbagel.core.errors import InputError
from hyperbagel.generate.contexts import Contexts, Item
from hyperbagel.generate.session import Session
from hyperbagel.pipeline import AskRequest, HyperBagel, ImageRequest


@pytest.fixture(scope="module")
def model() -> HyperBagel:
    return HyperBagel(small_parts(), "small")


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Pictures that were prefilled."""
    seen: list[Any] = []
    plain = Session.add_image

    def add(self: Session, image: Image.Image, **more: Any) -> None:
        seen.append(image)
        plain(self, image, **more)

    monkeypatch.setattr(Session, "add_image", add)
    return seen


def test_a_picture_is_read_once_and_results_stay_the_same(model: HyperBagel, read: list[Any]) -> None:
    contexts, source = Contexts(), picture()
    for text in ("a red car", "a red car and a dog", "a red car"):
        request = ImageRequest(text, (source.copy(),), seed=4, steps=2)
        [plain], [quick] = model.generate_batch([request]), model.generate_batch([request], contexts=contexts)
        assert np.array_equal(np.asarray(plain.image), np.asarray(quick.image))
    assert len(read) == 3 + 1 and quick.reused > 0 == plain.reused


def test_another_seed_order_or_picture_is_another_context(model: HyperBagel, read: list[Any]) -> None:
    contexts, a, b = Contexts(), picture(1), picture(2)
    requests = [
        ImageRequest("x", (a,), seed=1, steps=1),
        ImageRequest("x", (a,), seed=2, steps=1),
        ImageRequest("x", (a, b), seed=1, steps=1),
        ImageRequest("x", (b, a), seed=1, steps=1),
    ]
    for request in requests * 2:
        [quick], [plain] = model.generate_batch([request], contexts=contexts), model.generate_batch([request])
        assert np.array_equal(np.asarray(plain.image), np.asarray(quick.image))
    assert len(read) == 6 + 2 * 6, "read once for all four, and each time without a memory"


def test_the_oldest_are_forgotten_by_count_and_by_memory(model: HyperBagel) -> None:
    def fill(contexts: Contexts) -> list[bool]:
        reused = []
        for seed in (0, 1, 0, 2, 0, 1):
            request = ImageRequest("x", (picture(seed),), seed=0, steps=1)
            reused.append(model.generate_batch([request], contexts=contexts)[0].reused > 0)
        return reused

    assert fill(Contexts()) == [False, False, True, False, True, True]
    assert fill(Contexts(count=2)) == [False, False, True, False, True, False]
    assert fill(Contexts(memory=1)) == [False] * 6


# -- conversations -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("think", [False, True])
@pytest.mark.parametrize("drafter", ["none", "lookup"])
def test_a_conversation_is_read_on(model: HyperBagel, read: list[Any], drafter: str, think: bool) -> None:
    """Its pictures once, and of each turn what is new: the last answer and the question."""
    contexts, turns, known = Contexts(), list[tuple[str, str]](), 0
    for question in ("what is this", "and where", "and why", "how many"):
        request = AskRequest(question, (picture(), picture(1)), max_tokens=5, turns=tuple(turns), drafter=drafter, think=think)
        [plain], [quick] = model.ask_batch([request]), model.ask_batch([request], contexts=contexts)
        assert (quick.text, quick.tokens, quick.prompt_tokens) == (plain.text, plain.tokens, plain.prompt_tokens)
        assert (quick.reused, plain.reused) == (known, 0)
        known = quick.prompt_tokens
        turns.append((question, quick.text))
    assert len(read) == 4 * 2 + 2 and len(contexts._questions.kept) == 1


def test_the_same_question_is_found_whole(model: HyperBagel, read: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, and nothing runs before decoding."""
    contexts, items = Contexts(), [picture(), "what is this"]
    first = contexts.ask(model.parts, items, (0, 2))
    monkeypatch.setattr(model.parts.model, "backbone", lambda *given, **how: pytest.fail("was read again"))
    again = contexts.ask(model.parts, [picture(), "what is this"], (0, 2))
    assert again.reused == first.tokens == again.tokens and len(read) == 1
    assert first.opened is not None and again.opened is not None and torch.equal(first.opened, again.opened)
    for mine, theirs in zip(first.cache._stores(), again.cache._stores(), strict=True):
        n = first.cache.lengths[0]
        assert all(torch.equal(a[:, :, :n], b[:, :, :n]) for a, b in zip(mine, theirs, strict=True))


@torch.inference_mode()
def test_an_earlier_question_of_a_longer_conversation_is_found_whole_again(model: HyperBagel, monkeypatch: pytest.MonkeyPatch) -> None:
    contexts, items = Contexts(), [picture(), "what is this"]
    contexts.ask(model.parts, [*items, "a car", "why"], ())
    first = contexts.ask(model.parts, items, ())
    monkeypatch.setattr(model.parts.model, "backbone", lambda *given, **how: pytest.fail("was read again"))
    again = contexts.ask(model.parts, items, ())
    assert first.opened is not None and again.opened is not None and torch.equal(first.opened, again.opened)


@torch.inference_mode()
def test_what_two_conversations_begin_with_is_found(model: HyperBagel) -> None:
    """By pictures, order and words; the session is as one that read everything, with its taps and positions."""
    a, b = picture(1), picture(2)
    before: list[list[Item]] = [[a, "what is this", "a car", "why"], [b, a, "what is this"]]
    cases: list[tuple[list[Item], int]] = [
        ([a, "where is it"], 1),
        ([a, "what is this", "a car", "where"], 3),
        ([a, "what is this", "a tree", "why"], 2),
        ([a, "what is this"], 2),
        ([b, a, "why"], 2),
        ([b, "what is this"], 1),
        ([a, b, "what is this"], 1),
        (["what is this"], 0),
        ([picture(3), "what is this"], 0),
    ]
    for items, common in cases:
        contexts = Contexts()
        for earlier in before:
            contexts.ask(model.parts, earlier, (0, 1))
        found, fresh = contexts.ask(model.parts, items, (0, 1)), Contexts().ask(model.parts, items, (0, 1))
        assert (found.reused > 0) is (common > 0)
        assert (found.tokens, found.position, fresh.reused) == (fresh.tokens, fresh.position, 0)
        assert found.texts == fresh.texts, "lookup drafts from them"
        assert found.reused == Contexts().ask(model.parts, items[:common], (0, 1)).tokens if common else found.reused == 0
        assert found.opened is not None and fresh.opened is not None
        torch.testing.assert_close(found.opened, fresh.opened, atol=1e-4, rtol=1e-4)
        for mine, theirs in zip(found.cache._stores(), fresh.cache._stores(), strict=True):
            n = fresh.cache.lengths[0]
            assert found.cache.lengths == [n] and len(mine) == len(theirs)
            for x, y in zip(mine, theirs, strict=True):
                torch.testing.assert_close(x[:, :, :n], y[:, :, :n], atol=1e-4, rtol=1e-4)


def test_what_another_drafter_reads_is_another_context(model: HyperBagel) -> None:
    contexts, items = Contexts(), [picture(), "what is this"]
    assert [contexts.ask(model.parts, items, taps).reused > 0 for taps in ((), (0,), (0, 2), (0,), ())] == [False] * 3 + [True] * 2


def test_several_answers_to_one_question_read_it_once(model: HyperBagel, read: list[Any]) -> None:
    asked = [AskRequest("what is this", (picture(),), max_tokens=6, temperature=1.5, seed=seed) for seed in range(3)]
    together = model.ask_batch(asked, contexts=Contexts())
    assert len(read) == 1 and [result.reused > 0 for result in together] == [False, True, True]
    assert [result.text for result in together] == [result.text for result in model.ask_batch(asked)]


@pytest.mark.parametrize("drafter", ["none", "lookup"])
def test_what_is_kept_is_not_what_is_decoded(model: HyperBagel, drafter: str) -> None:
    """Alone it is decoded in place, in a batch it is freed once it is copied."""
    contexts, how = Contexts(), {"max_tokens": 8, "drafter": drafter}
    asked = [AskRequest(text, (picture(),), **how) for text in ("what is this", "and where")]  # type: ignore[arg-type]
    plain = [model.ask_batch([one])[0].text for one in asked]
    for group in (asked, asked[:1], asked, asked[1:], asked):
        found = model.ask_batch(group, contexts=contexts)
        assert [result.text for result in found] == [plain[asked.index(one)] for one in group]
    assert all(result.reused == result.prompt_tokens for result in found)


def test_who_goes_on_keeps_what_it_began_with(model: HyperBagel) -> None:
    """A first question whose conversation branches was used last, though it was asked first."""
    contexts, first = Contexts(conversations=3), [picture(), "what"]
    for items in (first, [picture(1), "what"], [picture(), "why"], [picture(2), "what"]):
        contexts.ask(model.parts, items, ())
    assert contexts.ask(model.parts, first, ()).reused == contexts.ask(model.parts, first, ()).tokens


def test_the_oldest_conversations_are_forgotten(model: HyperBagel) -> None:
    def fill(contexts: Contexts) -> list[bool]:
        return [contexts.ask(model.parts, [picture(seed), "what"], ()).reused > 0 for seed in (0, 1, 0, 2, 0, 1)]

    assert fill(Contexts()) == [False, False, True, False, True, True]
    assert fill(Contexts(conversations=2)) == [False, False, True, False, True, False]
    assert fill(Contexts(memory=1)) == [False] * 6
    contexts = Contexts()
    fill(contexts)
    assert contexts.forget() and not contexts.forget()
    assert fill(contexts) == [False, False, True, False, True, True]


def test_what_cannot_be_read_leaves_what_was(model: HyperBagel) -> None:
    contexts, items = Contexts(), [picture(), "what is this"]
    contexts.ask(model.parts, items, ())
    with pytest.raises(InputError, match="context"):
        contexts.ask(model.parts, [*items, "a car", "red " * 500], ())
    assert contexts.ask(model.parts, items, ()).reused > 0
