"""What callers give as numbers, sizes and pictures: taken if it means one thing, else one line."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from small_world import small_parts

from hyperbagel.core.errors import InputError
from hyperbagel.core.values import number, size_of, whole
from hyperbagel.generate.sampling import nucleus, pick, told
from hyperbagel.generate.types import AskRequest, ImageRequest
from hyperbagel.pipeline import HyperBagel


@pytest.fixture(scope="module")
def model() -> HyperBagel:
    return HyperBagel(small_parts(), "small")


def test_what_means_one_thing_is_taken() -> None:
    given: dict[str, Any] = {
        "seed": np.int64(7),
        "size": "96x48",
        "interval": [np.float32(0.5), 1],
        "steps": np.int32(3),
        "shift": Fraction(3),
    }
    request = ImageRequest("a car", **given)
    assert (request.seed, request.size, request.interval, request.steps, request.shift) == (7, (48, 96), (0.5, 1), 3, 3.0)
    assert type(request.seed) is int and type(request.shift) is float
    assert size_of((48, np.int64(96))) == size_of(" 96 x48 ".replace(" ", "")) == size_of("96×48") == (48, 96)
    assert number("x", torch.tensor(2.5)) == 2.5 and whole("x", True) == 1
    assert AskRequest("what?", temperature=np.float64(0.5), max_tokens=np.int64(4)).max_tokens == 4  # type: ignore[arg-type]


def test_the_nucleus_holds_the_likeliest_tokens_that_are_enough() -> None:
    draws = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 12, generator=draws) * 2
    for temperature in (0.5, 1.0, 3.0):
        p = (logits.double() / temperature).softmax(-1)
        for top_p in (0.0, 0.1, 0.5, 0.9, 0.999):
            found = nucleus(logits, temperature, top_p)
            for row, of, mine in zip(logits.flatten(0, 1), p.flatten(0, 1), found.flatten(0, 1), strict=True):
                order, expected = of.argsort(descending=True).tolist(), set[int]()
                for token in order:
                    if not expected or sum(float(of[i]) for i in expected) < top_p:
                        expected.add(token)
                assert {i for i, value in enumerate(mine.tolist()) if value > -float("inf")} == expected
                assert all(mine[i] == row[i] for i in expected)
        assert nucleus(logits, temperature, 1.0) is logits
    assert nucleus(logits, 0.0, 0.5) is logits
    equal = nucleus(torch.zeros(1, 4), 1.0, 0.5)
    assert equal.isfinite().sum() == 2
    with pytest.raises(RuntimeError, match="not finite"):
        told(pick(nucleus(torch.tensor([[1.0, float("nan"), 0.0]]), 1.0, 0.5), 1.0, [torch.Generator()]))


def test_answers_share_steps_only_with_those_drawn_alike() -> None:
    assert AskRequest("what?", top_p=0.5).sampling == {"temperature": 0.0, "top_p": 1.0}, "greedy: it changes nothing"
    assert AskRequest("what?", temperature=1, top_p=0.5).sampling == {"temperature": 1.0, "top_p": 0.5}
    for wrong in (-0.1, 1.1, float("nan"), "1"):
        with pytest.raises(InputError, match="got top_p"):
            AskRequest("what?", top_p=wrong)  # type: ignore[arg-type]


def test_a_nucleus_is_each_request_s_own(model: HyperBagel) -> None:
    asked = [AskRequest("what is it", temperature=2.0, seed=3, top_p=p, max_tokens=12) for p in (1.0, 0.0, 0.3)]
    results = model.ask_batch(asked)
    assert [r.text for r in results] == [model.ask_batch([one])[0].text for one in asked]
    assert results[1].text == model.ask("what is it", max_tokens=12).text != results[0].text != results[2].text


def test_stop_is_a_text_or_several() -> None:
    assert AskRequest("what?").stop == () == AskRequest("what?", stop=[]).stop  # type: ignore[arg-type]
    assert AskRequest("what?", stop="end").stop == ("end",) and AskRequest("what?", stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]
    for wrong in ("", ["a", ""], [1], None, 3, b"end", {"a": 1}):
        with pytest.raises(InputError, match=r"got stop .*expected a text or several, none of them empty"):
            AskRequest("what?", stop=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"seed": "7"}, "got seed '7', expected a whole number"),
        ({"seed": 1.5}, "got seed 1.5, expected a whole number"),
        ({"seed": -1}, "got seed -1, expected 0 to"),
        ({"seed": 2**63}, "expected 0 to"),
        ({"size": 64}, r"got size 64, expected \(height, width\)"),
        ({"size": (64, 64, 3)}, "expected .height, width."),
        ({"size": (64, 32.5)}, "got width 32.5"),
        ({"size": "64"}, "expected WIDTHxHEIGHT"),
        ({"interval": [0.4]}, "expected two times"),
        ({"interval": (0.4, "1")}, "got interval '1', expected a number"),
        ({"text_scale": "4"}, "got text_scale '4', expected a number"),
        ({"text_scale": np.zeros(3)}, "expected a number"),
        ({"steps": 2.0}, "got steps 2.0, expected a whole number"),
        ({"prompt": ["a car", "a key"]}, "got a list as prompt, expected a text; several at once are for generate_batch"),
        ({"prompt": None}, "got a NoneType as prompt"),
    ],
)
def test_what_is_none_is_one_line(given: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        ImageRequest(**{"prompt": "a car", **given})


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"max_tokens": 1.5}, "whole number"),
        ({"max_tokens": 0}, "at least 1"),
        ({"temperature": "hot"}, "expected a number"),
        ({"temperature": 101}, "0 .greedy. to 100"),
        ({"temperature": float("nan")}, "0 .greedy. to 100"),
        ({"question": 5}, "got a int as question"),
        ({"seed": None}, "whole number"),
    ],
)
def test_questions_likewise(given: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        AskRequest(**{"question": "what?", **given})


def test_of_the_model_too(model: HyperBagel) -> None:
    for call, said in (
        (lambda: model.generate("a car", n="2"), "got n '2', expected a whole number"),  # type: ignore[arg-type]
        (lambda: model.generate("a car", seed="2"), "got seed '2'"),  # type: ignore[arg-type]
        (lambda: model.edit(None, "make it red"), "got a NoneType as a picture"),  # type: ignore[arg-type]
        (lambda: model.edit([], "make it red"), "no image to edit"),
        (lambda: model.ask("what?", 5), "got a int as a picture"),  # type: ignore[arg-type]
        (lambda: model.generate("a car", student=""), "got student ''"),
        (lambda: HyperBagel.from_pretrained(""), "empty name of a model"),
        (lambda: HyperBagel.from_pretrained(dtype=torch.float16), "got dtype 'float16', expected one of"),
    ):
        with pytest.raises(InputError, match=said):
            call()
