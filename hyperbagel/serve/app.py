"""`create_app`: the HTTP endpoints. Each reads a body, submits a job to the engine and answers in OpenAI's form."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Body, FastAPI, Request
from fastapi.exceptions import RequestValidationError, StarletteHTTPException
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import ValidationError

from hyperbagel import __version__
from hyperbagel.core.errors import InputError
from hyperbagel.pipeline import AskRequest, HyperBagel, ImageRequest, TextResult
from hyperbagel.serve import streams
from hyperbagel.serve.card import model_card
from hyperbagel.serve.forms import EDIT_FORM, read_edit
from hyperbagel.serve.guard import Guard, host_names
from hyperbagel.serve.incoming import Incoming
from hyperbagel.serve.jobs import Job
from hyperbagel.serve.metrics import Metrics
from hyperbagel.serve.outgoing import chat_message, choice_facts, image_usage, images_answer
from hyperbagel.serve.page import add_page
from hyperbagel.serve.realtime import Live
from hyperbagel.serve.responses import Answer, ResponsesBody, in_words_of_responses
from hyperbagel.serve.schemas import ApiError, ChatBody, ErrorBody, GenerationBody, ImageFields, Limits
from hyperbagel.serve.streams import as_api_error, collect, event_stream
from hyperbagel.serve.worker import Engine, device_failed, shutting_down

CLIENT_GONE = 499  # the status, known from nginx, of a request whose client left: for logs and metrics, nobody receives it
DRAIN_SECONDS = 30.0  # how long a server that shuts down finishes what it has accepted


def create_app(
    model: HyperBagel | Sequence[HyperBagel],
    *,
    api_key: str | None = None,
    name: str | None = None,
    limits: Limits | None = None,
    hosts: Collection[str] | None = None,
) -> FastAPI:
    """The server as an ASGI application.

    Args:
        model: one loaded model, or one per device with the same weights.
        api_key: what clients must send; None: no key is needed.
        name: what requests call the model; None: its folder's name.
        limits: what is accepted; None: the defaults.
        hosts: host names accepted in requests, besides localhost, IP addresses and names of a local network; None: any name.

    Raises:
        InputError: the key is empty.
    """
    api_key = None if api_key is None else api_key.strip()  # a header cannot hold the line end of a key that was read from a file
    if api_key == "":
        raise InputError("got an empty API key, expected some characters; leave it out to serve without one")
    models = [model] if isinstance(model, HyperBagel) else list(model)
    limits, metrics = limits or Limits(), Metrics()
    engine = Engine(models, waiting=limits.waiting, batch=limits.batch, metrics=metrics)
    called = name or Path(models[0].name).resolve().name

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close, DRAIN_SECONDS)  # in a thread: the event loop still sends what is being finished

    app = FastAPI(title="Hyper-Bagel", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.engine, app.state.metrics, app.state.body_bytes = engine, metrics, limits.body_bytes
    incoming = Incoming(models[0], (called,), limits)
    service = Service(engine, incoming, called, limits, int(time.time()))
    app.include_router(service.router())
    app.add_api_websocket_route("/v1/live", Live(engine, incoming, api_key).serve)
    add_page(app)
    paths = {str(getattr(route, "path", "")) for route in service.router().routes}
    names = None if hosts is None else host_names(hosts)
    app.add_middleware(Guard, api_key=api_key, limits=limits, metrics=metrics, paths=paths, hosts=names)
    for kind in (RequestValidationError, ValidationError, InputError, ApiError, StarletteHTTPException):
        app.add_exception_handler(kind, _refuse)
    return app


class Service:
    """The endpoints of one model. created: when it was loaded, as a Unix time."""

    def __init__(self, engine: Engine, incoming: Incoming, name: str, limits: Limits, created: int) -> None:
        self.engine, self.incoming, self.name, self.limits, self.created = engine, incoming, name, limits, created

    def router(self) -> APIRouter:
        """All endpoints with what the OpenAPI page says about them."""
        errors: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}
        router = APIRouter(responses=errors)
        event = {"type": "object", "properties": {"event": {"type": "string"}, "data": {"type": "string"}}, "required": ["data"]}
        streamed: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": event}}}}
        router.add_api_route("/health", self.health, methods=["GET"])
        router.add_api_route("/health", self.health, methods=["HEAD"], include_in_schema=False)  # what monitors send
        router.add_api_route("/version", self.version, methods=["GET"])
        router.add_api_route("/metrics", self.metrics, methods=["GET"], response_class=PlainTextResponse)
        router.add_api_route("/v1/models", self.models, methods=["GET"])
        router.add_api_route("/v1/models/{model:path}", self.one_model, methods=["GET"])
        router.add_api_route("/v1/chat/completions", self.chat, methods=["POST"], response_model=None, responses=streamed)
        router.add_api_route("/v1/responses", self.responses, methods=["POST"], response_model=None, responses=streamed)
        router.add_api_route("/v1/images/generations", self.generations, methods=["POST"], response_model=None, responses=streamed)
        form: dict[str, Any] = {"openapi_extra": EDIT_FORM, "responses": streamed}
        router.add_api_route("/v1/images/edits", self.edits, methods=["POST"], response_model=None, **form)
        return router

    # -- about the server ------------------------------------------------------------------------------------------------------

    async def health(self) -> dict[str, str]:
        """200 while requests are taken; 503 while the server shuts down, and after a device has failed for good."""
        if self.engine.closed:
            raise shutting_down()
        if self.engine.broken:
            raise device_failed()
        return {"status": "ok"}

    async def version(self) -> dict[str, str]:
        return {"version": __version__}

    async def metrics(self) -> PlainTextResponse:
        """Counters in Prometheus' text format."""
        return PlainTextResponse(self.engine.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._card()]}

    async def one_model(self, model: str) -> dict[str, Any]:
        if model != self.name:
            raise ApiError(404, f"got model {model!r}, expected {self.name}", param="model", code="model_not_found")
        return self._card()

    def _card(self) -> dict[str, Any]:
        return model_card(self.incoming.model, self.name, self.created, self.limits)

    # -- pictures --------------------------------------------------------------------------------------------------------------

    async def generations(self, request: Request, body: Annotated[GenerationBody, Body()]) -> Response:
        """Draws pictures."""
        return await self._pictures(request, body, (), "image_generation")

    async def edits(self, request: Request) -> Response:
        """Changes a picture, or composes several, as the prompt says."""
        body, files, mask = await read_edit(request, self.limits)
        return await self._pictures(request, body, files, "image_edit", mask)

    async def _pictures(
        self, request: Request, body: ImageFields, files: Sequence[bytes], event: str, mask: bytes | None = None
    ) -> Response:
        requests = await asyncio.to_thread(self.incoming.pictures, body, files, mask)
        stream = bool(body.stream)
        previews = body.partial_images or 0 if stream else 0
        job = Job(requests, stream=stream, previews=previews, progress=stream and bool(body.progress))
        self.engine.submit(job)
        model = self.incoming.model
        if stream:
            return await event_stream(job, request, streams.image_events(job, model, body, requests, event))
        results = await collect(job, request)
        if results is None:
            return Response(status_code=CLIENT_GONE)
        usage = image_usage(model, requests, results)
        return JSONResponse(await asyncio.to_thread(images_answer, body, results, usage))

    # -- chat ------------------------------------------------------------------------------------------------------------------

    async def chat(self, request: Request, body: Annotated[ChatBody, Body()]) -> Response:
        """Answers with text, or with a picture if "image" is among the modalities."""
        draw = "image" in (body.modalities or ())
        read: Callable[[ChatBody], Sequence[ImageRequest | AskRequest]] = self.incoming.chat_pictures if draw else self.incoming.questions
        requests = await asyncio.to_thread(read, body)
        job = Job(requests, stream=bool(body.stream))
        self.engine.submit(job)
        if body.stream:
            return await event_stream(job, request, streams.chat_events(job, self.incoming.model, body, self.name))
        results = await collect(job, request)
        if results is None:
            return Response(status_code=CLIENT_GONE)
        return JSONResponse(await asyncio.to_thread(self._completion, body, requests, results))

    async def responses(self, request: Request, body: Annotated[ResponsesBody, Body()]) -> Response:
        """Answers with text, as a chat does."""
        try:
            [asked] = await asyncio.to_thread(lambda: self.incoming.questions(body.as_chat()))
        except ApiError as error:
            raise in_words_of_responses(error) from error
        job, answer = Job([asked], stream=bool(body.stream)), Answer(body, self.name, self.incoming.model.parts.tokenizer)
        self.engine.submit(job)
        if body.stream:
            return await event_stream(job, request, answer.events())
        results = await collect(job, request)
        if results is None:
            return Response(status_code=CLIENT_GONE)
        assert isinstance(results[0], TextResult)
        return JSONResponse(answer.whole(results[0]))

    def _completion(self, body: ChatBody, requests: Sequence[Any], results: Sequence[Any]) -> dict[str, Any]:
        choices = [
            {
                "index": i,
                "message": chat_message(result, bool(body.think)),
                "finish_reason": getattr(result, "finish_reason", "stop"),
                "logprobs": None,
                **choice_facts(result),
            }
            for i, result in enumerate(results)
        ]
        usage = streams.usage_of(self.incoming.model, requests, results)
        head = {"id": streams.new_id(), "object": "chat.completion", "created": int(time.time()), "model": self.name}
        return head | {"choices": choices, "usage": usage}


async def _refuse(request: Request, error: Exception) -> Response:
    """The response to a request that is refused, in OpenAI's error form."""
    told = as_api_error(error)
    if isinstance(error, StarletteHTTPException) and told.status in (404, 405):
        what = f"got {request.method} {request.url.path[:80]}, expected an endpoint of this server; GET /openapi.json lists them"
        told = ApiError(told.status, what, headers=told.headers)
    return JSONResponse(told.body(), told.status, headers=told.headers)
