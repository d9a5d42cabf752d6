"""Answers on a model of another shape than the golden one: decoded alone, in batches, with drafters, in fixed shapes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_world import small_parts

from hyperbagel.core.errors import InputError
from hyperbagel.data.prompts import split_thinking
from hyperbagel.generate.decode import Decoded, decode
from hyperbagel.generate.session import Session
from hyperbagel.generate.types import AskRequest, ImageRequest
from hyperbagel.nn.kv_cache import KVCache
from hyperbagel.pipeline import HyperBagel


@pytest.fixture(scope="module")
def model() -> HyperBagel:
    return HyperBagel(small_parts(), "test")


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@torch.inference_mode()
def test_decoding_equals_a_fresh_prefill_of_what_was_decoded(model: HyperBagel) -> None:
    session = Session.new(model.parts)
    session.add_image(photo(20, 10), latents=False)
    session.add_text("what is this")
    length = session.cache.lengths[0]
    out = decode([session], max_tokens=8, keep_logits=True)[0]
    assert session.cache.lengths[0] == length
    bag = model.parts.model
    from hyperbagel.model.qwen2_mot import Streams

    ids = torch.tensor([[model.parts.tokenizer.im_start, *out.ids]])
    where = torch.arange(session.position, session.position + ids.shape[1])[None]
    plan = session.cache.plan([ids.shape[1]], causal=True)
    hidden = bag.backbone(Streams(bag.embed_text(ids), None), where, cache=session.cache, plan=plan).u
    logits = bag.logits(hidden[0])
    torch.testing.assert_close(torch.stack(out.logits)[: len(logits)], logits[: len(out.logits)], atol=1e-4, rtol=1e-4)
    assert logits.argmax(-1)[: len(out.ids)].tolist() == out.ids


def test_answers_of_a_batch_equal_each_alone(model: HyperBagel) -> None:
    asked = [
        AskRequest("what", (photo(20, 10),), max_tokens=6),
        AskRequest("how many cars are there in the picture", max_tokens=6),
        AskRequest("why", (photo(20, 10), photo(10, 10, 3)), max_tokens=6, turns=(("is it red", "yes"),)),
        AskRequest("random", max_tokens=6, temperature=1.0, seed=3),
    ]
    together = model.ask_batch(asked)
    assert [r.text for r in together] == [model.ask_batch([a])[0].text for a in asked]
    assert all(r.tokens <= 6 for r in together)


@pytest.mark.parametrize("drafter", ["none", "lookup"])
def test_an_answer_is_told_when_it_is_whole(model: HyperBagel, drafter: str) -> None:
    """Of two groups that are decoded one after the other, by the index of the request; the seconds of each are its own."""
    asked = [AskRequest("what is it", max_tokens=n, drafter=drafter, temperature=t) for n, t in ((3, 0.0), (9, 0.0), (3, 1.0), (9, 0.0))]
    told: list[tuple[int, str, int]] = []
    said = [0] * len(asked)

    def on_token(i: int, token: int) -> None:
        said[i] += 1

    results = model.ask_batch(asked, on_token=on_token, on_answer=lambda i, answer: told.append((i, answer.text, said[i])))
    assert sorted(told) == [(i, result.text, result.tokens) for i, result in enumerate(results)]
    assert [i for i, *_ in told][:2] in ([0, 1], [0, 3], [0, 2])


@pytest.mark.parametrize("drafter", ["none", "lookup"])
def test_an_answer_ends_before_a_stop_text(model: HyperBagel, drafter: str) -> None:
    """In a batch with one that has none and, later, one that joins; each as alone. Tokens count up to the one that completed the text."""
    how: dict[str, Any] = {"max_tokens": 12, "drafter": drafter}
    whole = model.ask("what is it", **how)
    at = len(whole.text) // 2
    stop = whole.text[at : at + 2]
    assert len(whole.text) > 8 and stop.strip() == stop, "what the test needs"
    asked = AskRequest("what is it", stop=("never said", stop), **how)
    joins = Coming([replace(asked, stop=whole.text[:1])], (1,))
    told = list[int]()
    results = model.ask_batch([asked, replace(asked, stop=())], visitors=joins, on_answer=lambda i, answer: told.append(i))
    cut, other, none = results
    assert cut.text == whole.text[: whole.text.index(stop)].rstrip() and other.text == whole.text and none.text == ""
    assert (cut.stopped_at, other.stopped_at, none.stopped_at) == (stop, None, whole.text[:1])
    assert cut.finish_reason == none.finish_reason == "stop" and none.tokens < cut.tokens < whole.tokens
    assert cut.tok_per_second == pytest.approx((cut.tokens - 1) / cut.timings["decode"])
    assert told[-1] == 1 and [r.tokens for r in model.ask_batch([asked])] == [cut.tokens]


class Coming:
    """Requests that join one by one, at the calls of these numbers."""

    def __init__(self, asked: list[AskRequest], calls: tuple[int, ...]) -> None:
        self.asked, self.calls, self.call, self.rows, self.refused = list(asked), calls, -1, list[int](), list[str]()

    def next(self, rows: int) -> AskRequest | None:
        self.call += 1
        self.rows.append(rows)
        return self.asked.pop(0) if self.asked and self.call in self.calls else None

    def refuse(self, error: Exception) -> None:
        self.refused.append(str(error))

    def gone(self, index: int) -> bool:
        return False


@pytest.mark.parametrize("drafter", ["none", "lookup"])
def test_questions_that_join_are_answered_as_alone(model: HyperBagel, drafter: str) -> None:
    """Those that cannot be met, an empty one and one that is too long, are refused and take no index."""
    how = {"max_tokens": 9, "drafter": drafter}
    first = [AskRequest("what is it", **how), AskRequest("where", **how)]
    joining = [
        AskRequest("and what is this", (photo(20, 10),), **how),
        AskRequest(" ", **how),
        AskRequest("how many cars are there in the picture", **how),
        AskRequest("word " * 2000, **how),
        AskRequest("random", turns=(("is it red", "yes"),), **how),
    ]
    coming, said, order = Coming(joining, (0, 1, 2, 4, 6)), [0] * 5, list[int]()

    def on_token(i: int, token: int) -> None:
        said[i] += 1

    results = model.ask_batch(first, on_token=on_token, on_answer=lambda i, answer: order.append(i), visitors=coming)
    met = [*first, joining[0], joining[2], joining[4]]
    assert [(r.text, r.prompt_tokens) for r in results] == [(r.text, r.prompt_tokens) for r in (model.ask_batch([a])[0] for a in met)]
    assert said == [result.tokens for result in results] and sorted(order) == list(range(5))
    assert ["empty question" in told or "context" in told for told in coming.refused] == [True, True] and not coming.asked
    assert coming.rows[:3] == [2, 3, 3]  # refused ones do not count
    assert all(set(result.timings) >= {"prefill", "decode"} for result in results)


def test_seconds_are_those_of_each_answer(model: HyperBagel, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that goes on by 100 with each question that is read and by 1 with each token, whoever says it."""
    now, own, said, ended = [0.0], model._context, list[int](), dict[int, float]()

    def context(request: AskRequest, **how: Any) -> Session:
        now[0] += 100
        return own(request, **how)

    def on_token(row: int, token: int) -> None:
        said.append(row)
        began.setdefault(row, now[0])
        now[0] += 1

    began: dict[int, float] = {}
    monkeypatch.setattr("hyperbagel.speculative.answers.clock", lambda where: now[0])
    monkeypatch.setattr(model, "_context", context)
    asked = [AskRequest(text, max_tokens=9, drafter="none") for text in ("what is it", "where", "how many cars")]
    coming = Coming(asked[1:], (2, 4))
    results = model.ask_batch(asked[:1], on_token=on_token, on_answer=lambda i, _: ended.setdefault(i, now[0]) and None, visitors=coming)
    assert len(results) == 3 and len(set(said)) == 3
    assert [result.timings["prefill"] for result in results[1:]] == [100, 100]
    assert [result.timings["decode"] for result in results] == [ended[i] - began[i] for i in range(3)]


def test_a_thought_may_hold_the_stop_text(model: HyperBagel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers are given: the random model writes no tags."""
    ids = model.parts.tokenizer.encode("<think> red. blue. </think> a car. a key.")

    def said(sessions: Any, *, until: Any, on_done: Any, **how: Any) -> None:
        for row in range(len(sessions)):
            n = next((n for n, token in enumerate(ids, 1) if until(row, token)), len(ids))
            on_done(row, Decoded(ids[:n], "stop"))

    monkeypatch.setattr("hyperbagel.speculative.answers.decode", said)
    for think, expected in ((True, ("red. blue.", "a car", ".")), (False, (None, "<think> red", "."))):
        result = model.ask("what is it", think=think, stop=".")
        assert (result.thinking, result.text, result.stopped_at) == expected
    assert model.ask("what is it", think=True, stop="no such").text == "a car. a key."


@pytest.mark.parametrize(
    ("ids", "think", "stop", "expected"),
    [
        ("<", True, "<", ("", "<")),  # the end tells that no thought began
        ("<th", True, "t", ("<", "t")),
        ("你", False, "\ufffd", ("", "\ufffd")),  # cut inside the character
        ("a car", False, "car!", ("a car", None)),
    ],
)
def test_what_only_the_end_decides(
    model: HyperBagel, ids: str, think: bool, stop: str, expected: tuple[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a stream. Cut by max_tokens, an answer that then ends at a stop text was stopped."""
    tokens = model.parts.tokenizer.encode(ids)[: 2 if ids == "你" else None]

    def said(sessions: Any, *, until: Any, on_done: Any, **how: Any) -> None:
        assert not any([until(0, token) for token in tokens])
        on_done(0, Decoded(tokens, "length"))

    monkeypatch.setattr("hyperbagel.speculative.answers.decode", said)
    result = model.ask("what is it", think=think, stop=stop)
    assert (result.text, result.stopped_at) == expected
    assert result.finish_reason == ("length" if expected[1] is None else "stop")


def test_one_whose_answer_would_not_fit_does_not_join(model: HyperBagel) -> None:
    """Its question fits the context, by itself."""
    long = " ".join(["red"] * (model.parts.model.config.llm.max_position_embeddings - 8))
    first, how = AskRequest("what is it", max_tokens=9), {"max_tokens": 9}
    coming = Coming([AskRequest(long, **how), AskRequest("where", **how)], (0, 1))  # type: ignore[arg-type]
    assert len(model.ask_batch([first], visitors=coming)) == 2
    assert len(coming.refused) == 1 and "got max_tokens 9 behind a context of" in coming.refused[0]
    assert model.ask(long, max_tokens=2).tokens


@pytest.mark.parametrize("broken", ["prefill", "stack", "add"])
def test_a_question_for_which_there_is_no_memory_leaves_the_others_alone(
    model: HyperBagel, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused, and so is who came with it if keys and values cannot be held together; who comes later takes the free index."""
    how: dict[str, Any] = {"max_tokens": 9, "drafter": "none"}
    first = [AskRequest("what is it", **how), AskRequest("where", **how)][: 1 if broken == "stack" else 2]
    joining = [AskRequest("big", **how), AskRequest("how many cars", **how)]
    alone = [model.ask_batch([a])[0].text for a in (*first, joining[1])]
    joining[0] = replace(joining[0], stop=alone[-1][0])  # is forgotten with it
    coming, own, taken, calls = Coming(joining, (0, 2)), model._context, getattr(KVCache, broken, None), list[int]()

    def context(request: AskRequest, **how: Any) -> Session:
        if broken == "prefill" and request.question == "big":
            raise torch.OutOfMemoryError("no memory")
        return own(request, **how)

    def copied(*given: Any, **more: Any) -> Any:
        calls.append(0)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("no memory")
        assert taken is not None
        return taken(*given, **more)

    monkeypatch.setattr(model, "_context", context)
    if broken != "prefill":
        monkeypatch.setattr(KVCache, broken, staticmethod(copied) if broken == "stack" else copied)
    told: list[tuple[int, str]] = []
    results = model.ask_batch(first, on_answer=lambda i, answer: told.append((i, answer.text)), visitors=coming)
    assert coming.refused == ["no memory"] and [result.text for result in results] == alone
    assert sorted(told) == list(enumerate(alone))


def test_a_drafter_changes_nothing_but_the_count_of_forwards(model: HyperBagel) -> None:
    images = (photo(20, 10),)
    plain = model.ask("what is this", images, max_tokens=24)
    quick = model.ask("what is this", images, max_tokens=24, drafter="lookup")
    assert quick.text == plain.text and quick.tokens == plain.tokens
    assert plain.tau is None and quick.tau is not None and quick.tau >= 1


def test_an_answer_that_the_prefill_gave_whole_has_no_rate(model: HyperBagel) -> None:
    """And no tau: nothing was decoded."""
    one = model.ask("what is this", max_tokens=1, drafter="lookup")
    assert (one.tokens, one.finish_reason, one.tau, one.drafter, one.tok_per_second) == (1, "length", None, "none", 0.0)
    many = model.ask("what is this", max_tokens=6)
    assert many.tokens > 1 and many.finish_reason in ("length", "stop")
    yielded = many.tokens - 1 + (many.finish_reason == "stop")
    assert many.tok_per_second == pytest.approx(yielded / many.timings["decode"])


def test_a_drafter_that_does_not_fit_is_a_warning_and_an_unknown_one_an_error(model: HyperBagel, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="going on without a drafter"):
        assert model.ask("what", max_tokens=4, drafter=str(tmp_path)).tau is None
    with pytest.raises(InputError, match="got drafter 'nobody'"):
        model.ask("what", max_tokens=4, drafter="nobody")


@pytest.mark.parametrize("drafter", ["none", "lookup"])
def test_contexts_of_a_batch_are_held_once(model: HyperBagel, drafter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While answers are written their rows lie in one cache alone."""
    made: list[Session] = []
    monkeypatch.setattr(model, "_context", lambda *given, own=model._context, **how: made.append(own(*given, **how)) or made[-1])
    held: list[bool] = []
    asked = [AskRequest(text, max_tokens=3, drafter=drafter) for text in ("what is it", "and what is that over there")]
    together = model.ask_batch(asked, on_token=lambda row, token: held.append(any(s.cache.k for s in made)))
    assert held and not any(held)
    assert [(r.text, r.prompt_tokens) for r in together] == [
        (r.text, r.prompt_tokens) for r in map(lambda one: model.ask_batch([one])[0], asked)
    ]


def test_streamed_tokens_are_the_answer(model: HyperBagel) -> None:
    seen: list[int] = []
    result = model.ask("what", max_tokens=5, on_token=lambda row, token: seen.append(token))
    assert len(seen) == result.tokens and model.parts.tokenizer.decode(seen).strip() == result.text


def test_thinking_is_split_off() -> None:
    assert split_thinking("<think> two cars </think> 2", True) == ("two cars", "2")
    assert split_thinking("<think> two cars", True) == ("two cars", "")  # cut off: a thought, and no answer yet
    assert split_thinking("two cars", True) == (None, "two cars")
    assert split_thinking("2", False) == (None, "2")


@pytest.mark.parametrize("temperature", [1e-300, 1e-38, 1e-7])
@pytest.mark.parametrize("drafter", ["none", "lookup"])
def test_a_temperature_of_nearly_zero_takes_the_likeliest_token(model: HyperBagel, temperature: float, drafter: str) -> None:
    greedy = model.ask("what is this", max_tokens=12)
    assert model.ask("what is this", max_tokens=12, temperature=temperature, drafter=drafter).text == greedy.text


@pytest.mark.parametrize("drafter", ["none", "lookup"])
def test_an_answer_longer_than_the_context_is_told_how_long_it_may_be(model: HyperBagel, drafter: str) -> None:
    with pytest.raises(InputError, match=r"got max_tokens 99999 behind .* expected at most (\d+) .* lower max_tokens"):
        model.ask("what is this", max_tokens=99999, drafter=drafter)


def test_fixed_shapes_change_no_answer() -> None:
    """`graphs=True` on a CPU: the steps that a GPU replays, run as they are; unlike lengths together, and a plan before a picture."""
    parts = small_parts()
    plain, fixed = HyperBagel(parts, "small"), HyperBagel(parts, "small", graphs=True)
    asked = [AskRequest("what is it", max_tokens=9), AskRequest("a longer question than the other one", max_tokens=9)]
    assert [r.text for r in fixed.ask_batch(asked)] == [r.text for r in plain.ask_batch(asked)]
    assert fixed.runner is not None and fixed.runner.steps and plain.runner is None
    assert not fixed.runner.reads  # unasked nobody drafts: graphs are of plain steps first of all
    drafted = [replace(request, drafter="lookup") for request in asked]
    assert [r.text for r in fixed.ask_batch(drafted)] == [r.text for r in plain.ask_batch(asked)]
    assert fixed.runner.reads and fixed.drafters.budgeted("lookup").graphs is fixed.runner
    planned = ImageRequest("a fish", steps=2, think=True, max_think_tokens=5)
    [a], [b] = fixed.generate_batch([planned]), plain.generate_batch([planned])
    assert a.thinking == b.thinking and a.image.tobytes() == b.image.tobytes()


def test_the_longest_answer_that_is_told_can_be_given(model: HyperBagel) -> None:
    with pytest.raises(InputError) as caught:
        model.ask("what is this", max_tokens=99999)
    told = re.search(r"behind a context of (\d+), expected at most (\d+) ", str(caught.value))
    assert told is not None and int(told[1]) + 1 + int(told[2]) == model.parts.model.config.llm.max_position_embeddings
    assert model.ask("what is this", max_tokens=int(told[2])).tokens <= int(told[2])
    with pytest.raises(InputError, match="lower max_tokens"):
        model.ask("what is this", max_tokens=int(told[2]) + 1)
