"""What answers, streams and the model's card state, field by field."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

import httpx2
import openai
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from server_world import png

from hyperbagel.data.images import SETTINGS_KEY
from hyperbagel.pipeline import AskRequest, HyperBagel, ImageRequest, TextResult
from hyperbagel.serve import streams
from hyperbagel.serve.app import create_app
from hyperbagel.serve.incoming import Incoming
from hyperbagel.serve.jobs import Done, Job, Text
from hyperbagel.serve.schemas import ApiError, ChatBody, Limits
from hyperbagel.serve.streams import chat_events

ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}


@pytest.fixture
def http(model: HyperBagel) -> Any:
    with TestClient(create_app(model)) as client:
        yield client


def events_of(text: str) -> list[dict[str, Any]]:
    """The JSON of a stream's events."""
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


def test_the_card_states_sizes_limits_and_usual_settings(model: HyperBagel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HyperBagel, "default_size", (32, 48))  # (height, width)
    limits = {"n": 2, "steps": 3, "images": 4, "max_tokens": 5, "body_bytes": 6000}
    card = TestClient(create_app(model, limits=Limits(**limits))).get("/v1/models/tiny").json()  # type: ignore[arg-type]
    assert card["size"] == {"usual": [48, 32], "stride": 16, "largest": model.parts.model.config.options.max_latent_size * 16}
    assert card["limits"] == limits
    for kind, request in {"draw": ImageRequest("x"), "edit": ImageRequest("x", (Image.new("RGB", (1, 1)),))}.items():
        usual = asdict(model.settings(request))
        usual |= {"steps": usual.pop("num_steps"), "interval": list(usual["interval"])}
        del usual["student"]
        assert card["usual"][kind] == usual
    assert card["usual"]["draw"] != card["usual"]["edit"]


def test_the_counters_say_what_form_they_have(http: TestClient) -> None:
    assert http.get("/metrics").headers["content-type"].startswith("text/plain; version=0.0.4")


def test_what_the_browser_is_told_of_the_page_s_files(http: TestClient) -> None:
    headers = http.get("/ui/app.js").headers
    assert headers["cache-control"] == "no-cache" and headers["x-content-type-options"] == "nosniff"
    assert "default-src 'self'" in headers["content-security-policy"]


def test_a_wrong_method_is_told_which_one_is_right(http: TestClient) -> None:
    assert http.get("/v1/chat/completions").headers["allow"] == "POST"


def test_a_model_that_is_not_here_has_openai_s_code(http: TestClient) -> None:
    error = http.get("/v1/models/gpt").json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    for modalities in (["text"], ["image"]):
        answer = http.post("/v1/chat/completions", json=ASKED | {"model": "gpt", "modalities": modalities})
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(("path", "body"), [("/v1/images/generations", {"prompt": "x"}), ("/v1/chat/completions", ASKED)])
def test_who_left_is_counted_as_such(path: str, body: dict[str, Any], model: HyperBagel) -> None:
    app, sent = create_app(model), list[Any]()
    left = iter([{"type": "http.request", "body": json.dumps(body).encode()}, {"type": "http.disconnect"}])

    async def receive() -> Any:
        return next(left)

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
    asyncio.run(app(scope, receive, send))
    app.state.engine.close()
    assert app.state.metrics.get("hyperbagel_requests_total", path=path, status="499") == 1


@pytest.mark.parametrize(("stream", "told"), [(False, (0, False)), (True, (3, True))])
def test_only_a_stream_is_told_of_what_comes_before_its_end(stream: bool, told: tuple[int, bool], model: HyperBagel) -> None:
    app, jobs = create_app(model), list[Job]()

    def submit(job: Job) -> None:
        jobs.append(job)
        raise ApiError(418, "seen")

    app.state.engine.submit = submit
    body = {"prompt": "x", "stream": stream, "partial_images": 3, "progress": True}
    assert TestClient(app).post("/v1/images/generations", json=body).status_code == 418
    assert [(job.previews, job.progress) for job in jobs] == [told]


def test_a_tag_that_was_not_asked_for_is_text(http: TestClient, model: HyperBagel, monkeypatch: pytest.MonkeyPatch) -> None:
    said = TextResult("<think> a", 3, 1, {"decode": 0.1})
    monkeypatch.setattr(model, "ask_batch", lambda requests, *, on_answer, **_: [on_answer(0, said) or said])
    answer = http.post("/v1/chat/completions", json=ASKED).json()
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "<think> a"}
    assert answer["choices"][0]["tokens"] == 3 and answer["model"] == "tiny", "also where the request names no model"


def test_an_answer_ends_before_a_stop_text(client: openai.OpenAI, model: HyperBagel) -> None:
    messages: list[Any] = [{"role": "user", "content": "what is it?"}]
    whole = model.ask("what is it?", max_tokens=12).text
    at = len(whole) // 2
    stop = whole[at : at + 2]
    expected = model.ask("what is it?", max_tokens=12, stop=stop)
    assert stop.strip() == stop and 0 < len(expected.text) < len(whole) and stop not in expected.text, "what the test needs"
    for given in (stop, ["never said", stop]):
        answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, stop=given).choices[0]
        assert (answer.message.content, answer.finish_reason) == (expected.text, "stop")
        assert answer.stop_reason == stop and answer.tokens == expected.tokens  # type: ignore[attr-defined]
        chunks = list(client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, stop=given, stream=True))
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected.text
        assert chunks[-1].choices[0].finish_reason == "stop" and chunks[-1].choices[0].stop_reason == stop  # type: ignore[attr-defined]


def test_a_conversation_says_what_was_read_before(http: TestClient, model: HyperBagel) -> None:
    """The last answer and the question are read; streamed or not, the usage says how much was there."""
    url = "data:image/png;base64," + base64.b64encode(png("red")).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is it?"}]
    how = {"max_tokens": 6, "drafter": "none"}
    first = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": parts}]} | how).json()
    said = first["choices"][0]["message"]
    messages = [{"role": "user", "content": parts}, said, {"role": "user", "content": "and why?"}]
    second = http.post("/v1/chat/completions", json={"messages": messages} | how).json()
    turns = (("what is it?", said["content"]),)
    expected = model.ask("and why?", Image.new("RGB", (32, 32), "red"), turns=turns, **how)
    assert second["choices"][0]["message"]["content"] == expected.text
    assert [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in (first, second)] == [0, first["usage"]["prompt_tokens"]]
    body = {"messages": messages, "stream": True, "stream_options": {"include_usage": True}} | how
    usage = events_of(http.post("/v1/chat/completions", json=body).text)[-1]["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] == second["usage"]["prompt_tokens"]


def test_top_p_is_the_library_s(http: TestClient, model: HyperBagel) -> None:
    how = {"max_tokens": 12, "temperature": 2.0, "seed": 5}
    said = [
        http.post("/v1/chat/completions", json=ASKED | how | {"top_p": p}).json()["choices"][0]["message"]["content"] for p in (0, 0.3, 1)
    ]
    assert said == [model.ask(ASKED["messages"][0]["content"], top_p=p, **how).text for p in (0, 0.3, 1)] and len(set(said)) == 3


@pytest.mark.filterwarnings("ignore:the plan was cut")
def test_a_drawn_answer_tells_its_plan_and_holds_its_settings(http: TestClient, model: HyperBagel) -> None:
    messages = [{"role": "system", "content": "in crayon"}, {"role": "user", "content": "a red car"}]
    knobs = {"modalities": ["image"], "seed": 3, "steps": 1, "think": True, "max_think_tokens": 6}
    [drawn] = model.generate_batch(
        [ImageRequest("a red car", (), 3, think=True, max_think_tokens=6, steps=1, inputs=("in crayon", "a red car"))]
    )
    whole = http.post("/v1/chat/completions", json={"messages": messages} | knobs).json()["choices"][0]["message"]
    streamed: dict[str, Any] = {}
    for event in events_of(http.post("/v1/chat/completions", json={"messages": messages, "stream": True} | knobs).text):
        streamed |= event["choices"][0]["delta"]
    for message in (whole, streamed):
        assert message["reasoning_content"] == drawn.thinking
        [part] = message["images"]
        picture = Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2])))
        settings = json.loads(picture.info[SETTINGS_KEY])
        assert (settings["prompt"], settings["seed"], part["seed"]) == ("a red car", 3, 3), "the prompt is the user's alone"


@pytest.mark.parametrize("stream", [False, True])
def test_every_picture_has_the_form_that_was_asked_for(stream: bool, http: TestClient) -> None:
    sizes = []
    for quality in (0, 100):
        form = {"output_format": "jpeg", "output_compression": quality, "stream": stream, "partial_images": 1}
        answer = http.post("/v1/images/generations", json={"prompt": "x", "seed": 0, "steps": 2} | form)
        pictures = [item["b64_json"] for item in (events_of(answer.text) if stream else answer.json()["data"])]
        assert len(pictures) == 1 + stream and all(picture.startswith("/9j/") for picture in pictures)
        sizes.append([len(picture) for picture in pictures])
    assert all(small < large for small, large in zip(*sizes, strict=True))


def test_events_say_which_of_several_pictures_they_are_of(http: TestClient) -> None:
    body = {"prompt": "x", "seed": 5, "steps": 2, "n": 2, "stream": True, "partial_images": 1, "progress": True}
    answer = http.post("/v1/images/generations", json=body)
    assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-cache", "no"), "no proxy holds it back"
    found = defaultdict(list)
    for event in events_of(answer.text):
        found[event["type"].partition(".")[2]].append(
            (event["index"], event.get("seed", event.get("step", event.get("partial_image_index"))))
        )
    assert {kind: sorted(told) for kind, told in found.items()} == {
        "progress": [(0, 1), (0, 2), (1, 1), (1, 2)],
        "partial_image": [(0, 0), (1, 0)],
        "completed": [(0, 5), (1, 6)],
    }


async def chunks(body: dict[str, Any], *events: Any) -> list[dict[str, Any]]:
    """What a streamed chat of two answers sends for these events of its job."""

    async def told() -> AsyncIterator[Any]:
        for event in events:
            yield event

    job = Job([AskRequest("x"), AskRequest("x")], stream=True)
    stream = chat_events(job, None, ChatBody.model_validate(ASKED | body), "tiny")  # type: ignore[arg-type]
    return events_of("".join([text async for text in stream(told())]))


ENDS = Done(1, TextResult("b", 2, 7, {})), Done(0, TextResult("c", 3, 7, {}))


def test_answers_of_one_stream_are_split_apart() -> None:
    said: dict[tuple[int, str], str] = defaultdict(str)
    pieces = Text(0, "<think> a"), Text(1, "b"), Text(0, " </think> c")
    for chunk in asyncio.run(chunks({"think": True}, *pieces, *ENDS)):
        for name, text in chunk["choices"][0]["delta"].items():
            said[chunk["choices"][0]["index"], name] += text
    assert {key: text for key, text in said.items() if key[1] != "role"} == {
        (0, "reasoning_content"): "a",
        (0, "content"): "c",
        (1, "content"): "b",
    }


@pytest.mark.parametrize(("path", "body"), [("/v1/images/generations", {"prompt": "x", "steps": 1}), ("/v1/chat/completions", ASKED)])
def test_a_stream_that_waits_says_so(
    path: str,
    body: dict[str, Any],
    model: HyperBagel,
    serving: Callable[[Any], AbstractContextManager[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    let_go = threading.Event()
    for name in ("generate_batch", "ask_batch"):
        work = getattr(model, name)
        monkeypatch.setattr(model, name, lambda *args, work=work, **more: let_go.wait(10) and work(*args, **more))
    for name in ("EARLY", "PING_SECONDS"):
        monkeypatch.setattr(streams, name, 0.1)
    with (
        serving(create_app(model, limits=Limits(max_tokens=3))) as address,
        httpx2.stream("POST", address + path, json=body | {"stream": True}, timeout=5) as answer,
    ):
        assert answer.status_code == 200
        lines = answer.iter_lines()
        assert [line for line in (next(lines) for _ in range(6)) if line.startswith(":")][:2] == [": ping"] * 2
        let_go.set()
        *_, last = events_of("\n".join(lines))
    assert last.get("type") == "image_generation.completed" or last["choices"][0]["finish_reason"]


def test_usage_is_null_until_the_last_chunk_where_it_is_asked_for() -> None:
    *before, last = asyncio.run(chunks({"stream_options": {"include_usage": True}}, *ENDS))
    assert last["usage"]["completion_tokens"] == 5 and all(chunk["usage"] is None for chunk in before)
    assert not any("usage" in chunk for chunk in asyncio.run(chunks({}, *ENDS)))


def test_a_part_without_text_is_none(model: HyperBagel) -> None:
    parts = [{"type": "text"}, {"type": "text", "text": ""}, {"type": "text", "text": "a car"}]
    body = ChatBody.model_validate({"messages": [{"role": "user", "content": parts}]})
    assert Incoming(model, ("tiny",), Limits()).chat_pictures(body)[0].items() == ("a car",)
