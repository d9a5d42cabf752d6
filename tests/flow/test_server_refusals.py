"""What the server refuses, and how: OpenAI's form of an error, before anything is done; and what it forgives."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Callable
from typing import Any

import openai
import pytest
from fastapi.testclient import TestClient
from server_world import KEY, png

from hyperbagel.core.errors import Notice
from hyperbagel.pipeline import HyperBagel
from hyperbagel.serve import incoming
from hyperbagel.serve.app import create_app
from hyperbagel.serve.schemas import ChatBody, GenerationBody, Limits


@pytest.fixture
def http(app: Any) -> TestClient:
    return TestClient(app, headers={"authorization": f"Bearer {KEY}"})


def draw(prompt: str = "x", **more: Any) -> Callable[[openai.OpenAI], Any]:
    return lambda client: client.images.generate(prompt=prompt, **more)


def edit(image: bytes, **more: Any) -> Callable[[openai.OpenAI], Any]:
    return lambda client: client.images.edit(prompt="x", image=image, **more)


def chat(content: Any = "x", role: str = "user", **more: Any) -> Callable[[openai.OpenAI], Any]:
    return lambda client: client.chat.completions.create(model="tiny", messages=[{"role": role, "content": content}], **more)  # type: ignore


URL_PART = [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/x"}}]
BAD = openai.BadRequestError
WRONG: dict[str, tuple[Callable[[openai.OpenAI], Any], type[openai.APIStatusError], str]] = {
    "model": (draw(model="dall-e"), openai.NotFoundError, "tiny"),
    "typo": (draw(extra_body={"text_scle": 2}), BAD, "text_scle"),
    "size": (draw(size="50x50"), BAD, "48x48"),
    "no size": (draw(size="big"), BAD, "WIDTHxHEIGHT"),
    "empty": (draw(" "), BAD, "empty prompt"),
    "n": (draw(n=99), BAD, "at most 10"),
    "steps": (draw(extra_body={"steps": 10**6}), BAD, "at most 1000"),
    "student": (draw(extra_body={"student": "/etc"}), BAD, "none"),
    "drafter": (chat(extra_body={"drafter": "/etc"}), BAD, "lookup, auto, none"),
    "interval": (draw(extra_body={"interval": [1, 0]}), BAD, "LO <= HI"),
    "long prompt": (draw("a red car " * 9000), BAD, "shorten it"),
    "long stream": (draw("a red car " * 9000, stream=True), BAD, "shorten it"),
    "no picture": (edit(b"hello"), BAD, "no picture"),
    "cut picture": (edit(png("red")[:60]), BAD, "damaged"),
    "mask": (edit(png("red"), mask=png("white", 16)), BAD, "equal sizes"),
    "empty mask": (edit(png("red"), mask=png("black")), BAD, "nothing change"),
    "address": (chat(URL_PART), BAD, "data:"),
    "no user": (chat(role="system"), BAD, "user"),
    "system picture": (chat([{"type": "image_url", "image_url": {"url": "x"}}], role="system"), BAD, "user"),
    "tokens": (chat(max_tokens=10**6), BAD, "4096"),
    "stop": (chat(stop=["x", ""]), BAD, "stop.1: got '', string should have at least 1 character"),
    "stops": (chat(stop=list("abcde")), BAD, "stop: got ['a', 'b', 'c', 'd', 'e'], list should have at most 4 items"),
    "form": (chat(response_format={"type": "json_object"}), BAD, 'expected {"type": "text"} or null; leave it out'),
    "logit_bias": (chat(logit_bias={"1": 2}), BAD, "logit_bias: got {'1': 2}, expected {} or null; leave it out"),
    "tools": (chat(extra_body={"tools": [{"type": "function"}]}), BAD, "expected [] or null; leave it out"),
    "tool_choice": (chat(extra_body={"tool_choice": "required"}), BAD, 'got \'required\', expected "none" or "auto" or null; '),
    "student of text": (chat(extra_body={"student": "nobody"}), BAD, "none"),
    "size of text": (chat(extra_body={"size": "big"}), BAD, "WIDTHxHEIGHT"),
    "drafter of a picture": (chat(extra_body={"drafter": "nobody", "modalities": ["image"]}), BAD, "lookup, auto, none"),
    "drafter of a plan": (lambda client: client.images.generate(prompt="x", extra_body={"drafter": "/etc"}), BAD, "lookup, auto, none"),
    "reasoning_effort": (chat(reasoning_effort="low"), BAD, 'expected "none" or null; leave it out, and set think'),
    "top_p": (chat(top_p=1.5), BAD, "top_p: got 1.5, input should be less than or equal to 1"),
    "logprobs": (chat(logprobs=True), BAD, "logprobs: got True, expected false or null; leave it out"),
    "key": (lambda client: client.with_options(api_key="wrong").models.list(), openai.AuthenticationError, "API key"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name: str, client: openai.OpenAI) -> None:
    call, kind, told = WRONG[name]
    with pytest.raises(kind) as caught:
        call(client)
    assert told in str(caught.value) and isinstance(caught.value.body, dict)
    assert set(caught.value.body) == {"message", "type", "param", "code"}, "OpenAI's form"
    assert "Traceback" not in caught.value.response.text


def test_pictures_are_counted_before_they_are_unpacked(http: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incoming, "open_image", lambda *_: pytest.fail("was unpacked"))
    url = "data:image/png;base64," + base64.b64encode(png("red")).decode()
    pictures = [{"type": "image_url", "image_url": {"url": url}}]
    asked = {"role": "user", "content": "x"}
    for modalities, more in ((["text"], asked), (["text", "image"], {"role": "user", "content": pictures * 17})):
        for told, messages in (
            ("at most 16", [{"role": "user", "content": pictures * 17}, more]),
            ("system message", [{"role": "system", "content": pictures}, asked]),
        ):
            answer = http.post("/v1/chat/completions", json={"messages": messages, "modalities": modalities})
            assert answer.status_code == 400 and told in answer.json()["error"]["message"]


NOTHING: dict[str, list[Any]] = {
    "stop": [[]],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "parallel_tool_calls": [True, False],
    "response_format": [{"type": "text"}],
    "logit_bias": [{}],
    "logprobs": [False],
    "top_logprobs": [0],
    "top_p": [1, 1.0],
    "presence_penalty": [0, 0.0],
    "frequency_penalty": [0, 0.0],
    "functions": [[]],
    "function_call": ["none", "auto"],
    "reasoning_effort": ["none"],
    "verbosity": ["medium"],
    "prompt_cache_key": ["x"],
    "prompt_cache_retention": ["24h"],
}


def test_what_client_libraries_write_for_nothing_is_nothing(http: TestClient) -> None:
    said = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    bodies: list[dict[str, Any]] = [{name: value} for name, values in NOTHING.items() for value in values]
    bodies += [dict.fromkeys([*NOTHING, "audio", "prediction", "web_search_options"])]
    bodies += [{"tools": [], "tool_choice": "auto", "parallel_tool_calls": True}]
    for body in bodies:
        answer = http.post("/v1/chat/completions", json=said | body)
        assert answer.status_code == 200, (body, answer.text)
    assert http.post("/v1/images/generations", json={"prompt": "x", "steps": 1, "audio": None, "n": None}).status_code == 200
    missing = http.post("/v1/images/generations", json={"prompt": None}).json()["error"]
    assert (missing["param"], missing["message"]) == ("prompt", "prompt: got nothing, expected a value")


def test_what_clients_write_beside_the_words_changes_nothing(http: TestClient, model: HyperBagel) -> None:
    url = {"url": "data:image/png;base64," + base64.b64encode(png("red")).decode()}
    bare: list[Any] = [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": url}]
    more = [part | {"cache_control": {"type": "ephemeral"}, "id": 1} for part in bare]
    more[1]["image_url"] = url | {"format": "image/png"}
    reader = incoming.Incoming(model, ("tiny",), Limits())
    plain, same = ({"messages": [{"role": "user", "content": parts}], "seed": 1} for parts in (bare, more))
    assert reader.questions(ChatBody.model_validate(same)) == reader.questions(ChatBody.model_validate(plain))


def test_two_masks_are_one_too_many(http: TestClient) -> None:
    files = [("image", png("red")), ("mask", png("white")), ("mask", png("white"))]
    answer = http.post("/v1/images/edits", data={"prompt": "x", "steps": "1"}, files=files)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "mask"
    assert answer.json()["error"]["message"].startswith("got 'mask' twice, expected it once; ")


def test_a_damaged_student_does_not_take_the_others_away(http: TestClient, model: HyperBagel) -> None:
    assert model.students.folder is not None
    bad = model.students.folder / "bad"
    bad.mkdir()
    try:
        (bad / "sampler.json").write_text('{"nfe":')
        with pytest.warns(Notice, match="going on without student bad"):
            card = http.get("/v1/models").json()["data"][0]
    finally:
        shutil.rmtree(bad)
    assert card["students"] == ["6"] and card["samplers"]["6"]["nfe"] == 6 and card["plans"] == {"draw": True, "edit": True}


def test_a_name_with_a_slash(model: HyperBagel) -> None:
    http = TestClient(create_app(model, name="org/toy"))
    for path in ("org/toy", "org%2Ftoy"):
        assert http.get(f"/v1/models/{path}").json()["id"] == "org/toy"


def test_a_body_and_a_picture_that_are_too_large(model: HyperBagel) -> None:
    http = TestClient(create_app(model, limits=Limits(body_bytes=2000, image_pixels=100)))
    long = http.post("/v1/images/generations", json={"prompt": "x" * 3000})
    piecemeal = http.post("/v1/images/generations", content=iter([b"x" * 1500] * 2), headers={"content-type": "application/json"})
    assert (long.status_code, piecemeal.status_code) == (413, 413) and long.json()["error"]["code"] == "body_too_large"
    for image, more in ((png("red"), {}), (png("red"), {"mask": png("white")}), (png("red", 8), {"mask": png("white")})):
        large = http.post("/v1/images/edits", data={"prompt": "x"}, files={"image": image, **more})
        assert large.status_code == 400 and large.json()["error"]["code"] == "image_too_large"


def test_what_is_not_here_is_named(http: TestClient) -> None:
    for status, method, path in ((404, "POST", "/v1/embeddings"), (405, "GET", "/v1/chat/completions"), (404, "GET", "/ui/nothing")):
        answer = http.request(method, path)
        told = f"got {method} {path}, expected an endpoint of this server; GET /openapi.json lists them"
        assert (answer.status_code, answer.json()["error"]["message"]) == (status, told)


@pytest.mark.parametrize("content", [b"[" * 5000, b'{"prompt":"\xff"}', b'{"prompt":"x","seed":' + b"9" * 5000 + b"}"])
def test_what_no_json_decoder_reads(http: TestClient, content: bytes) -> None:
    answer = http.post("/v1/images/generations", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["message"].startswith("got a body that cannot be read (")


def test_bodies_of_very_many_small_values(http: TestClient, model: HyperBagel) -> None:
    """Each takes far more memory, and time of the one thread that reads them, than its few bytes."""
    part = {"type": "text", "text": "x"}
    for message, where in (
        ({"role": "user", "content": [part] * 1001}, "messages.0.content"),
        ({"role": "user", "images": [{"image_url": {"url": "x"}}] * 1001}, "messages.0.images"),
    ):
        answer = http.post("/v1/chat/completions", json={"messages": [message]})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == where
        assert "at most 1000 items" in answer.json()["error"]["message"] and len(answer.text) < 400
    assert http.post("/v1/chat/completions", json={"messages": [], "modalities": ["text"] * 11}).status_code == 400
    few = TestClient(create_app(model, limits=Limits(json_values=100)))
    answer = few.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": [part] * 60}]})
    assert answer.status_code == 413 and "more than 100 values" in answer.json()["error"]["message"]
    picture = {"image": b"," * 200}
    told = few.post("/v1/images/edits", data={"prompt": "x"}, files=picture).json()["error"]["message"]
    assert "no picture" in told, "a form's files are no values"


def test_a_limit_is_the_most_that_is_taken(model: HyperBagel) -> None:
    limits = Limits(n=2, steps=3, images=1, max_tokens=4, image_pixels=32 * 32)
    reader = incoming.Incoming(model, ("tiny",), limits)
    body = GenerationBody(prompt="x", n=2, steps=3, max_think_tokens=4)
    assert len(reader.pictures(body, [png("red")])) == 2
    url = "data:image/png;base64," + base64.b64encode(png("red")).decode()
    shown: Any = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "b"}]
    [asked] = reader.questions(ChatBody.model_validate({"messages": [{"role": "user", "content": shown}], "max_tokens": 4}))
    assert (asked.question, len(asked.images), asked.max_tokens) == ("a\nb", 1, 4)


MESSAGES: dict[str, tuple[list[dict[str, Any]], str]] = {
    "an answer last": ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "expected the user's last"),
    "a part without its picture": ([{"role": "user", "content": [{"type": "image_url"}, {"type": "text", "text": "x"}]}], "image_url part"),
    "a text that is no base64": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png,AAAA"}}]}],
        "expected a URL of the form",
    ),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_a_conversation_that_cannot_be_answered(name: str, http: TestClient) -> None:
    messages, told = MESSAGES[name]
    answer = http.post("/v1/chat/completions", json={"messages": messages})
    assert answer.status_code == 400 and told in answer.json()["error"]["message"], answer.text


@pytest.mark.parametrize(("field", "value"), [("top_p", True), ("presence_penalty", False), ("logprobs", 0), ("n", 0)])
def test_true_is_no_number_and_none_is_no_answer(field: str, value: Any, http: TestClient) -> None:
    answer = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}], field: value})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == field


def test_a_mask_alone_edits_nothing(http: TestClient) -> None:
    answer = http.post("/v1/images/edits", data={"prompt": "x"}, files={"mask": png("white")})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "image"


def test_what_is_ignored_may_be_sent_twice(http: TestClient) -> None:
    form = {"prompt": "x", "steps": "1", "quality": ["high", "low"]}
    assert http.post("/v1/images/edits", data=form, files={"image": png("red")}).status_code == 200
