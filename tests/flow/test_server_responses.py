"""OpenAI's Responses API, with the official client, on the tiny random model: it answers as a chat does."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from pydantic import TypeAdapter
from server_world import png

from hyperbagel.core.errors import InputError
from hyperbagel.pipeline import HyperBagel, TextResult
from hyperbagel.serve.jobs import Cancelled, Done, Failed, Quiet, Text
from hyperbagel.serve.outgoing import PING
from hyperbagel.serve.responses import Answer, ResponsesBody

HOW: dict[str, Any] = {"model": "tiny", "max_output_tokens": 12}
RED = "data:image/png;base64," + base64.b64encode(png("red")).decode()


def test_an_answer_is_the_chat_s(client: openai.OpenAI) -> None:
    parts = [{"type": "input_image", "image_url": RED, "detail": "auto"}, {"type": "input_text", "text": "what is it?"}]
    asked = [
        {"role": "user", "content": "hello"},
        {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed", "content": [{"type": "output_text", "text": "hi"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": []},
        {"role": "user", "content": parts},
    ]
    got = client.responses.create(input=asked, instructions="be brief", temperature=0.7, top_p=0.9, extra_body={"seed": 5}, **HOW)  # type: ignore[call-overload]
    messages = [
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": RED}}, {"type": "text", "text": "what is it?"}]},
    ]  # fmt: skip
    chat = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=12, temperature=0.7, top_p=0.9, extra_body={"seed": 5}  # type: ignore[arg-type]
    )  # fmt: skip
    assert got.output_text == chat.choices[0].message.content and got.output_text
    assert got.usage.input_tokens == chat.usage.prompt_tokens and got.usage.output_tokens == chat.usage.completion_tokens  # type: ignore[union-attr]
    assert (got.object, got.model, got.error, got.instructions) == ("response", "tiny", None, "be brief")
    cut = chat.choices[0].finish_reason == "length"
    assert got.status == ("incomplete" if cut else "completed") and (got.incomplete_details is not None) == cut
    again = client.responses.create(input=[{"role": "user", "content": "hello"}, *got.output, {"role": "user", "content": "why?"}], **HOW)
    assert again.output_text and again.id != got.id
    assert client.responses.create(input="hello", **HOW).output_text


def test_a_stream_tells_the_same_in_pieces(client: openai.OpenAI) -> None:
    how = HOW | {"input": "what is there?"}
    whole = client.responses.create(**how)
    events = list(client.responses.create(stream=True, **how))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    final: Any = events[-1]
    assert final.type == f"response.{whole.status}" and final.response.output_text == whole.output_text
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == whole.output_text
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.to_dict() for item in done] == [item.to_dict() for item in final.response.output]


def told(body: dict[str, Any], events: list[Any], model: HyperBagel) -> list[dict[str, Any]]:
    """The data of the stream that a job's events make."""

    async def given() -> AsyncIterator[Any]:
        for event in events:
            yield event

    async def gather() -> list[str]:
        answer = Answer(ResponsesBody(input="?", **body), "tiny", model.parts.tokenizer)
        return [text async for text in answer.events()(given())]

    texts = asyncio.run(gather())
    return [json.loads(text.partition("data: ")[2]) for text in texts if text != PING]


THOUGHT = ["output_item.added", "reasoning_text.delta", "reasoning_text.done", "output_item.done"]
SAID = ["output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done", "output_item.done"]
NOTHING_SAID = [name for name in SAID if name != "output_text.delta"]


@pytest.mark.parametrize(
    ("text", "reason", "kinds"),
    [
        ("<think>a</think>b", "stop", [*THOUGHT, *SAID, "completed"]),
        ("b", "length", [*SAID, "incomplete"]),
        ("<think>a", "length", [*THOUGHT, *NOTHING_SAID, "incomplete"]),
        ("", "stop", [*NOTHING_SAID, "completed"]),
    ],
)
def test_events_are_openai_s(text: str, reason: str, kinds: list[str], model: HyperBagel) -> None:
    result = TextResult(text, 3, 5, {}, finish_reason=reason)  # type: ignore[arg-type]
    events = told({"think": True}, [Quiet(), Text(0, text), Done(0, result)], model)
    assert [event["type"] for event in events] == ["response.created", "response.in_progress", *(f"response.{kind}" for kind in kinds)]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == events[-1]["response"]["output"]
    assert [event["output_index"] for event in events if event["type"] == "response.output_item.done"] == list(range(len(done)))
    for event in events:
        TypeAdapter(openai.types.responses.ResponseStreamEvent).validate_python(event)


def test_a_stream_that_breaks_off(model: HyperBagel) -> None:
    assert len(told({}, [Cancelled()], model)) == 2
    last = told({}, [Text(0, "b"), Failed(InputError("got no room"))], model)[-1]
    assert last["type"] == "error" and last["message"] == last["error"]["message"] == "got no room" and last["sequence_number"] == 5


def test_an_answer_with_its_thought_may_be_sent_back(client: openai.OpenAI, model: HyperBagel) -> None:
    answer = Answer(ResponsesBody(input="?", think=True), "tiny", model.parts.tokenizer)
    output = answer.whole(TextResult("two cars", 9, 30, {}, thinking="let me count"))["output"]
    turns = [{"role": "user", "content": "how many?"}, *output, {"role": "user", "content": "why?"}]
    body = ResponsesBody.model_validate({"input": turns}).as_chat()
    assert [message.role for message in body.messages] == ["user", "assistant", "user"]
    assert client.responses.create(input=turns, **HOW).output_text  # type: ignore[call-overload]
    refused = [{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, {"role": "user", "content": "why?"}]
    first = ResponsesBody.model_validate({"input": refused}).as_chat().messages[0].content
    assert isinstance(first, list) and first[0].text == "no"


def test_a_thought_is_an_item_of_its_own(model: HyperBagel) -> None:
    answer = Answer(ResponsesBody(input="?", think=True), "tiny", model.parts.tokenizer)
    result = TextResult("two cars", 9, 30, {}, thinking="let me count", reused=10)
    told = answer.whole(result)
    assert [item["type"] for item in told["output"]] == ["reasoning", "message"] and told["status"] == "completed"
    assert told["output"][0]["content"] == [{"type": "reasoning_text", "text": "let me count"}]
    assert told["usage"]["output_tokens_details"]["reasoning_tokens"] == len(model.parts.tokenizer.encode("let me count"))
    assert told["usage"]["input_tokens_details"] == {"cached_tokens": 10, "cache_write_tokens": 20}


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"previous_response_id": "resp_1"}, "send the whole conversation as input"),
        ({"tools": [{"type": "image_generation"}]}, "this model calls none"),
        ({"reasoning": {"effort": "high"}}, "set think"),
        ({"input": []}, "input"),
        ({"input": [{"type": "reasoning", "id": "rs_1", "summary": []}]}, "without messages"),
        ({"input": [{"content": "x"}]}, "without a role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]}, "without image_url"),
        ({"input": [{"role": "assistant", "content": "x"}]}, "ends with another message"),
        ({"input": " "}, "empty question"),
        ({"max_output_tokens": 10**6}, "got max_output_tokens 1000000, expected at most"),
        ({"model": "gpt"}, "expected tiny"),
        ({"frequency": 1}, "frequency"),
    ],
)
def test_what_has_no_place_is_refused(client: openai.OpenAI, wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(openai.APIStatusError, match=told) as caught:
        client.post("/responses", body={"model": "tiny", "input": "x", **wrong}, cast_to=object)
    assert caught.value.status_code in (400, 404) and isinstance(caught.value.body, dict)
