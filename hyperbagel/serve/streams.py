"""Follows a job to its end: as a stream of server-sent events, or until all results are there for one answer.

A job ends when all its results are done, when it fails, or when its client goes away. Errors become answers here (`as_api_error`).
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import aclosing
from itertools import chain, repeat
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError, StarletteHTTPException
from fastapi.responses import Response, StreamingResponse
from pydantic import ValidationError

from hyperbagel.core.errors import InputError
from hyperbagel.pipeline import HyperBagel, ImageRequest, ImageResult, TextResult
from hyperbagel.serve.guard import internal_error
from hyperbagel.serve.jobs import Cancelled, Done, Event, Failed, Job, Preview, Progress, Quiet, Text
from hyperbagel.serve.outgoing import (
    PING,
    ThinkSplitter,
    about,
    chat_usage,
    choice_facts,
    encode,
    error_event,
    image_item,
    image_part,
    image_usage,
    sse,
)
from hyperbagel.serve.schemas import ApiError, ChatBody, ImageFields

EARLY = 1.5  # seconds that a stream waits for its job to begin or to fail; then its headers go out
PING_SECONDS = 12.0  # the longest silence of a stream


def as_api_error(error: Exception) -> ApiError:
    """Any refusal or failure as an answer. One that is not the client's fault reveals nothing about the server's inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError | ValidationError):
        return _wrong_body(error)
    if isinstance(error, StarletteHTTPException):
        told = str(error.detail)
        if error.status_code == 400:  # JSON that fails without a position: nested too deep, not UTF-8, numbers of thousands of digits
            told = f"got a body that cannot be read ({told}), expected a JSON object in UTF-8"
        return ApiError(error.status_code, told, headers=dict(error.headers or {}))
    if isinstance(error, InputError):
        return ApiError(400, str(error))
    return internal_error()


def _wrong_body(error: RequestValidationError | ValidationError) -> ApiError:
    """pydantic's errors about a body as one answer. Of a field's alternatives, the deepest error is taken for what the client meant."""
    first: Any = max(error.errors(), key=lambda detail: (len(detail["loc"]), detail["type"] == "too_long"))
    kind, path = first["type"], list(first["loc"])
    if kind == "json_invalid":  # its location is a character, not a field
        place = f", character {path[-1]}" if path else ""  # none if the text was no HTTP body, as Live's messages
        told = f"got JSON that cannot be read ({first['ctx']['error']}{place}), expected a whole JSON object"
        return ApiError(400, told, code="invalid_value")
    if kind == "model_attributes_type" and path == ["body"]:
        what = "another content type" if isinstance(first["input"], bytes) else f"a JSON {type(first['input']).__name__}"
        return ApiError(400, f"got {what}, expected a JSON object with the header Content-Type: application/json", code="invalid_value")
    # pydantic puts names of alternatives, such as list[Part], into the path: they are no fields. An unknown field may have any name.
    last = len(path) - 1 if kind == "extra_forbidden" else -1
    fields = [
        str(piece) for i, piece in enumerate(path) if piece != "body" and (isinstance(piece, int) or piece.isidentifier() or i == last)
    ]
    where = ".".join(fields) or None
    if kind == "extra_forbidden":
        return ApiError(400, f"Unrecognized request argument supplied: {where}", param=where, code="unknown_parameter")
    if kind == "value_error":  # our own message, without pydantic's "Value error, "
        told = str(first["ctx"]["error"])
    elif kind == "missing":  # its input would be the whole object around the field
        told = "got nothing, expected a value"
    else:
        told = f"got {_short(first['input'])}, {first['msg'][:1].lower()}{first['msg'][1:]}"
    return ApiError(400, f"{where or 'body'}: {told}", param=where, code="invalid_value")


def _short(value: Any) -> str:
    """A value in at most 60 characters. A long sequence is cut before its repr is made, which could take millions of values."""
    text = repr(value[:60]) if isinstance(value, str | bytes | list | tuple) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


async def follow(job: Job, request: Request, waits: Iterable[float | None] = repeat(None)) -> AsyncGenerator[Event, None]:
    """The job's events up to its end. The job is cancelled if the client goes away, and if the caller stops reading early.

    waits: for each event, after how many seconds without one it is Quiet instead; None: never.
    """

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        job.cancel()

    watcher, left, patience = asyncio.create_task(watch()), len(job.units), iter(waits)
    try:
        while left:
            try:
                async with asyncio.timeout(next(patience)):
                    event = await job.events.get()
            except TimeoutError:
                event = Quiet()
            yield event
            left -= isinstance(event, Done)
            if isinstance(event, Failed | Cancelled):
                return
    finally:
        watcher.cancel()
        if left:
            job.cancel()


async def collect(job: Job, request: Request) -> list[Any] | None:
    """All results in the order of the units; None if the client went away. Raises what `_failure` says if the job failed."""
    results: dict[int, Any] = {}
    async with aclosing(follow(job, request)) as events:
        async for event in events:
            if isinstance(event, Failed):
                raise _failure(event)
            if isinstance(event, Cancelled):
                return None
            if isinstance(event, Done):
                results[event.index] = event.result
    return [results[i] for i in sorted(results)]


def _failure(failed: Failed) -> Exception:
    """What to raise for a job that failed: the client's mistake as it is, any other error without its details."""
    return failed.error if isinstance(failed.error, InputError) else internal_error()


Events = Callable[[AsyncIterator[Event]], AsyncIterator[str]]  # from a job's events to the text of server-sent events


async def event_stream(job: Job, request: Request, events: Events) -> Response:
    """A response of server-sent events. It waits a little for the job's first event, so that a job that fails at once gets an error status,
    and no longer, so that clients and proxies see an answer however long the queue is."""
    source = follow(job, request, chain((EARLY,), repeat(PING_SECONDS)))
    first = await anext(source)
    if isinstance(first, Failed):
        await source.aclose()
        raise _failure(first)

    async def all_events() -> AsyncGenerator[Event, None]:
        async with aclosing(source):
            yield first
            async for event in source:
                yield event

    async def text() -> AsyncGenerator[str, None]:
        async with aclosing(all_events()) as told:
            async for chunk in events(told):
                yield chunk

    return StreamingResponse(text(), media_type="text/event-stream", headers={"cache-control": "no-cache", "x-accel-buffering": "no"})


def image_events(job: Job, model: HyperBagel, body: ImageFields, requests: Sequence[ImageRequest], name: str) -> Events:
    """The events `NAME.progress` (if asked for), `NAME.partial_image` and `NAME.completed`. `index`, a field of ours: which of the n."""

    async def events(told: AsyncIterator[Event]) -> AsyncIterator[str]:
        async for event in told:
            if isinstance(event, Failed):
                yield error_event(as_api_error(event.error))
            elif isinstance(event, Quiet):
                yield PING
            elif isinstance(event, Progress):
                data = {"type": f"{name}.progress", "index": event.index, "step": event.done, "steps": event.total}
                yield sse(data, f"{name}.progress")
            elif isinstance(event, Preview):
                encoded = await asyncio.to_thread(encode, event.image, body.output_format or "png", body.output_compression)
                data = {"type": f"{name}.partial_image", "b64_json": encoded, "partial_image_index": event.number, "index": event.index}
                yield sse(data | {"created_at": int(time.time())} | about(body, event.image.size), f"{name}.partial_image")
            elif isinstance(event, Done) and isinstance(event.result, ImageResult):
                item = await asyncio.to_thread(image_item, body, event.result)
                usage = image_usage(model, [requests[event.index]], [event.result])
                data = {"type": f"{name}.completed", **item, "index": event.index, "created_at": int(time.time()), "usage": usage}
                yield sse(data | about(body, event.result.image.size), f"{name}.completed")

    return events


def chat_events(job: Job, model: HyperBagel, body: ChatBody, called: str) -> Events:
    """The chunks of a chat answer, usage if asked for, and [DONE]. called: the model's name in the answer."""
    head = {"id": new_id(), "object": "chat.completion.chunk", "created": int(time.time()), "model": called}
    with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    extra: dict[str, Any] = {"usage": None} if with_usage else {}
    splitters = [ThinkSplitter(bool(body.think)) for _ in job.units]

    def chunk(index: int, delta: dict[str, Any], reason: str | None = None, **facts: Any) -> str:
        choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": None, **facts}
        return sse(head | {"choices": [choice]} | extra)

    async def last(event: Done) -> list[str]:
        """The last chunks of one choice: text held back or the picture, then the finish reason."""
        i, result = event.index, event.result
        out = [chunk(i, {name: text}) for name, text in splitters[i].finish()]
        if isinstance(result, ImageResult):
            out += [] if result.thinking is None else [chunk(i, {"reasoning_content": result.thinking})]
            out.append(chunk(i, {"images": [await asyncio.to_thread(image_part, result)]}))
        return [*out, chunk(i, {}, getattr(result, "finish_reason", "stop"), **choice_facts(result))]

    async def events(told: AsyncIterator[Event]) -> AsyncIterator[str]:
        results: dict[int, Any] = {}
        for i in range(len(job.units)):
            yield chunk(i, {"role": "assistant", "content": ""})
        async for event in told:
            if isinstance(event, Failed):
                yield error_event(as_api_error(event.error))
                return
            if isinstance(event, Cancelled):
                return
            if isinstance(event, Quiet):
                yield PING
            elif isinstance(event, Text):
                for name, text in splitters[event.index].push(event.text):
                    yield chunk(event.index, {name: text})
            elif isinstance(event, Done):
                results[event.index] = event.result
                for text in await last(event):
                    yield text
        if with_usage:
            usage = usage_of(model, [unit.request for unit in job.units], [results[i] for i in sorted(results)])
            yield sse(head | {"choices": [], "usage": usage})
        yield sse("[DONE]")

    return events


def usage_of(model: HyperBagel, requests: Sequence[Any], results: Sequence[Any]) -> dict[str, Any]:
    """Tokens of a chat, summed over its choices. The prompt counts once, as OpenAI counts it."""
    if isinstance(results[0], TextResult):
        return chat_usage(results[0].prompt_tokens, sum(result.tokens for result in results), results[0].reused)
    usage = image_usage(model, requests, results)
    return chat_usage(usage["input_tokens"] // len(results), usage["output_tokens"])


def new_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"
