"""POST /v1/responses: a question in the form of OpenAI's Responses API. It is answered as a chat is; nothing is stored."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from hyperbagel.data.tokenizer import Tokenizer
from hyperbagel.pipeline import TextResult
from hyperbagel.serve.jobs import Cancelled, Done, Event, Failed, Quiet, Text
from hyperbagel.serve.outgoing import PING, ThinkSplitter, chat_message, choice_facts, sse
from hyperbagel.serve.schemas import (
    PARTS,
    PROMPT_CHARACTERS,
    ApiError,
    ChatBody,
    Ignored,
    Knobs,
    Loose,
    Neutral,
    StreamOptions,
)
from hyperbagel.serve.streams import Events, as_api_error

# What a response states of things that this server does not do.
NOTHING: dict[str, Any] = {
    "error": None, "metadata": {}, "previous_response_id": None, "tools": [], "tool_choice": "auto", "parallel_tool_calls": False,
    "store": False,
}  # fmt: skip
Words = Annotated[str, Field(max_length=PROMPT_CHARACTERS)]


class InputPart(Loose):
    """A piece of an item's content; output_text and refusal are those of earlier answers."""

    type: Literal["input_text", "output_text", "text", "refusal", "input_image"]
    text: Words | None = None
    refusal: Words | None = None
    image_url: str | None = Field(None, description="A data: URL.")


class InputItem(Loose):
    """One turn. An answer's output may be sent back as it came; its thoughts (type reasoning) are not read again."""

    type: Literal["message", "reasoning"] | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Words | Annotated[list[InputPart], Field(max_length=PARTS)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_thoughts(cls, item: Any) -> Any:
        return {"type": "reasoning"} if isinstance(item, dict) and item.get("type") == "reasoning" else item


class ResponsesBody(Knobs, Ignored):
    """POST /v1/responses"""

    model: str | None = Field(None, description="A name from /v1/models.")
    input: Words | Annotated[list[InputItem], Field(min_length=1, max_length=999)]  # with the instructions a chat's 1000
    instructions: Words | None = Field(None, description="Put before the first question, as a system message is.")
    max_output_tokens: int | None = Field(None, ge=1, description="Longest answer, in tokens, thinking included; else up to 1024.")
    temperature: float | None = Field(None, ge=0, le=100, description="0, the default, always takes the likeliest token.")
    top_p: float | None = Field(None, strict=True, ge=0, le=1, description="As in a chat.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    previous_response_id: Annotated[Any, Neutral(instead="send the whole conversation as input, this server stores none")] = None
    conversation: Annotated[Any, Neutral(instead="send the whole conversation as input, this server stores none")] = None
    background: Annotated[Any, Neutral(False)] = None
    prompt: Annotated[Any, Neutral(instead="send its text as instructions")] = None
    reasoning: Annotated[Any, Neutral({}, {"effort": "none"}, instead="leave it out, and set think")] = None
    text: Annotated[Any, Neutral({}, {"format": {"type": "text"}}, instead="leave it out, and ask for the form in the input")] = None
    tools: Annotated[Any, Neutral([], instead="leave it out, this model calls none")] = None
    tool_choice: Annotated[Any, Neutral("none", "auto", instead="leave it out, this model calls no tools")] = None
    include: Annotated[Any, Neutral([])] = None
    truncation: Annotated[Any, Neutral("disabled")] = None
    top_logprobs: Annotated[Any, Neutral(0)] = None
    parallel_tool_calls: Any = Field(None, description="Ignored: this model calls no tools.")
    max_tool_calls: Any = Field(None, description="Ignored: this model calls no tools.")
    store: Any = Field(None, description="Ignored: nothing is stored.")
    service_tier: Any = Field(None, description="Ignored.")
    prompt_cache_key: Any = Field(None, description="Ignored.")
    prompt_cache_retention: Any = Field(None, description="Ignored.")
    safety_identifier: Any = Field(None, description="Ignored.")

    def as_chat(self) -> ChatBody:
        """The chat that asks the same. Raises ApiError for an item that has no place in one."""
        items = [InputItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        messages = [_message(item) for item in items if item.type != "reasoning"]
        if not messages:
            raise ApiError(400, "got an input without messages, expected at least one", param="input")
        if self.instructions is not None:
            messages.insert(0, {"role": "system", "content": self.instructions})
        own = {name: getattr(self, name) for name in (*Knobs.model_fields, "model", "temperature", "top_p", "stream")}
        return ChatBody.model_validate(own | {"messages": messages, "max_tokens": self.max_output_tokens})


def _message(item: InputItem) -> dict[str, Any]:
    if item.role is None:
        raise ApiError(400, "got a message without a role, expected user, assistant, system or developer", param="input")
    if isinstance(item.content, str):
        return {"role": item.role, "content": item.content}
    parts: list[dict[str, Any]] = []
    for part in item.content or ():
        if part.type != "input_image":
            parts.append({"type": "text", "text": part.refusal if part.type == "refusal" else part.text})
        elif part.image_url is None:
            raise ApiError(400, "got an input_image without image_url, expected 'data:...'; this server stores no files", param="input")
        else:
            parts.append({"type": "image_url", "image_url": {"url": part.image_url}})
    return {"role": item.role, "content": parts}


class Answer:
    """One answer under way. called: the model's name in it."""

    def __init__(self, body: ResponsesBody, called: str, tokenizer: Tokenizer) -> None:
        self.body, self.called, self.tokenizer, self.created = body, called, tokenizer, int(time.time())
        self.id = new_id("resp")
        self.ids = {"reasoning": new_id("rs"), "message": new_id("msg")}

    def whole(self, result: TextResult) -> dict[str, Any]:
        """The finished response."""
        message = chat_message(result, bool(self.body.think))
        cut, thought = result.finish_reason == "length", message.get("reasoning_content")
        output = [self._item("reasoning", thought)] if thought else []
        output.append(self._item("message", message["content"], "incomplete" if cut else "completed"))
        usage = {
            "input_tokens": result.prompt_tokens,
            "input_tokens_details": {"cached_tokens": result.reused, "cache_write_tokens": result.prompt_tokens - result.reused},
            "output_tokens": result.tokens,
            "output_tokens_details": {"reasoning_tokens": len(self.tokenizer.encode(thought)) if thought else 0},
            "total_tokens": result.prompt_tokens + result.tokens,
        }
        why = {"reason": "max_output_tokens"} if cut else None
        return self._response("incomplete" if cut else "completed", output, usage, why) | choice_facts(result)

    def _response(self, status: str, output: list[Any], usage: Any = None, incomplete: Any = None) -> dict[str, Any]:
        head = {"id": self.id, "object": "response", "created_at": self.created, "model": self.called, "status": status, "output": output}
        asked = {name: getattr(self.body, name) for name in ("instructions", "max_output_tokens", "top_p")}
        asked["temperature"] = self.body.temperature or 0.0
        return head | asked | NOTHING | {"usage": usage, "incomplete_details": incomplete}

    def _item(self, kind: str, text: str | None, status: str = "completed") -> dict[str, Any]:
        """An item of the output; text None: it has only begun."""
        if kind == "reasoning":
            content = [] if text is None else [{"type": "reasoning_text", "text": text}]
            return {"type": kind, "id": self.ids[kind], "summary": [], "content": content, "status": status}
        content = [] if text is None else [_text_part(text)]
        return {"type": kind, "id": self.ids[kind], "role": "assistant", "status": status, "content": content}

    def events(self) -> Events:
        """The response as server-sent events, each with its number."""
        splitter, numbers = ThinkSplitter(bool(self.body.think)), iter(range(2**62))
        at, kind, said = -1, "", ""  # the item that is being written

        def event(name: str, **data: Any) -> str:
            name = f"response.{name}"
            return sse({"type": name, "sequence_number": next(numbers), **data}, name)

        def place() -> dict[str, Any]:
            return {"item_id": self.ids[kind], "output_index": at, "content_index": 0}

        def begin(of: str) -> Iterator[str]:
            nonlocal at, kind, said
            at, kind, said = at + 1, of, ""
            yield event("output_item.added", output_index=at, item=self._item(kind, None, "in_progress"))
            if kind == "message":
                yield event("content_part.added", **place(), part=_text_part(""))

        def end(status: str = "completed") -> Iterator[str]:
            if kind == "message":
                yield event("output_text.done", **place(), text=said, logprobs=[])
                yield event("content_part.done", **place(), part=_text_part(said))
            else:
                yield event("reasoning_text.done", **place(), text=said)
            yield event("output_item.done", output_index=at, item=self._item(kind, said, status))

        def tell(pieces: list[tuple[str, str]]) -> Iterator[str]:
            nonlocal said
            for field, text in pieces:
                of = "reasoning" if field == "reasoning_content" else "message"
                if of != kind:
                    if kind:
                        yield from end()
                    yield from begin(of)
                said += text
                more: dict[str, Any] = {"logprobs": []} if of == "message" else {}
                yield event("output_text.delta" if of == "message" else "reasoning_text.delta", **place(), delta=text, **more)

        async def events(told: AsyncIterator[Event]) -> AsyncIterator[str]:
            yield event("created", response=self._response("in_progress", []))
            yield event("in_progress", response=self._response("in_progress", []))
            async for one in told:
                if isinstance(one, Failed):
                    error = as_api_error(one.error).body()  # under `error` the official client looks for it
                    yield sse(error["error"] | error | {"type": "error", "sequence_number": next(numbers)}, "error")
                    return
                if isinstance(one, Cancelled):
                    return
                if isinstance(one, Quiet):
                    yield PING
                elif isinstance(one, Text):
                    for text in tell(splitter.push(one.text)):
                        yield text
                elif isinstance(one, Done) and isinstance(one.result, TextResult):
                    whole = self.whole(one.result)
                    for text in tell(splitter.finish()):
                        yield text
                    if kind != "message":  # nothing was said, or thought alone
                        for text in [*(end() if kind else ()), *begin("message")]:
                            yield text
                    for text in end(whole["output"][-1]["status"]):
                        yield text
                    yield event(whole["status"], response=whole)

        return events


def in_words_of_responses(error: ApiError) -> ApiError:
    """A refusal of the chat that asks the same, by the names of the fields that the client sent."""
    names = {"max_tokens": "max_output_tokens", "messages": "input"}
    if error.param not in names:
        return error
    told = str(error).replace(f"got {error.param} ", f"got {names[error.param]} ")
    return ApiError(error.status, told, type=error.type, param=names[error.param], code=error.code, headers=error.headers)


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
