"""/v1/live: pictures while the user types, on a WebSocket where the latest request wins.

The client sends JSON: `hello` (first; with the key, if one is needed), `source` (a picture to edit, or null), `draw` (see `Draw`), `stop`.
The server sends JSON (`ready`, `source`, `cancelled`, `error`), and pictures as binary frames: the length of a JSON header (4 bytes,
big-endian), the header, and a PNG with its settings inside.

A connection has one request at work and at most one that waits. A new request replaces the waiting one, and cancels the one at work at its
next denoising step. The exception is a preview when the last one took at most `SHORT`: it is nearly done and may finish, so that a slider
in motion keeps showing pictures.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import WebSocket, WebSocketDisconnect
from PIL.Image import Image
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from hyperbagel.core.errors import InputError
from hyperbagel.pipeline import HyperBagel, ImageResult
from hyperbagel.serve.card import samplers_of
from hyperbagel.serve.guard import check_key, is_same_origin
from hyperbagel.serve.incoming import Incoming, data_url
from hyperbagel.serve.jobs import Cancelled, Done, Failed, Job
from hyperbagel.serve.outgoing import file_of
from hyperbagel.serve.schemas import ApiError, GenerationBody, Scale, Strict
from hyperbagel.serve.streams import as_api_error
from hyperbagel.serve.worker import Engine

logger = logging.getLogger("hyperbagel.serve")
SHORT = 0.25  # seconds that a preview may take and not be cancelled
HELLO_SECONDS = 20.0  # how long a new connection may take to say hello
PREVIEW_STEPS, BETTER_STEPS = 4, 20  # steps of the model itself in tiers for which there is no student
Tier = Literal["preview", "better", "full"]


class Hello(Strict):
    """The first message of a connection."""

    type: Literal["hello"]
    key: str = Field("", max_length=1000)


class Source(Strict):
    """The picture that later requests edit; null: they draw from the text alone."""

    type: Literal["source"]
    id: int
    image: str | None = Field(description="A data: URL.")


class Draw(Strict):
    """A picture to draw or edit. One seed gives the same noise in all tiers.

    tier: preview is drawn by the student with the fewest evaluations, better by the next student, full by the model itself (see `tiers`).
    """

    type: Literal["draw"]
    id: int
    prompt: str = Field(min_length=1, max_length=10_000)
    seed: int = Field(ge=0, lt=2**63)
    tier: Tier = "preview"
    text_scale: Scale | None = None
    image_scale: Scale | None = None
    size: str | None = Field(None, max_length=20)


class Stop(Strict):
    """Cancels the request at work and the one that waits."""

    type: Literal["stop"]


class Named(BaseModel):
    """The id of a message that is refused; its other fields are ignored."""

    id: int


Said = Hello | Source | Draw | Stop
MESSAGE: TypeAdapter[Said] = TypeAdapter(Annotated[Said, Field(discriminator="type")])


def tiers(model: HyperBagel) -> dict[str, dict[str, Any]]:
    """Who draws each tier: a student, or the model itself ("none") in `steps` steps; None: as many as usual."""
    samplers = samplers_of(model)
    students = sorted(samplers, key=lambda name: samplers[name]["nfe"])
    chosen: list[dict[str, Any]] = [{"student": name, "steps": None} for name in students[:2]]
    merged = model.sampler is not None  # a student is merged into the model: few steps are its usual
    if not students:
        chosen.append({"student": "none", "steps": None if merged else PREVIEW_STEPS})
    if len(chosen) < 2:
        chosen.append({"student": "none", "steps": None if merged else BETTER_STEPS})
    return dict(zip(("preview", "better", "full"), [*chosen, {"student": "none", "steps": None}]))


class Live:
    """All connections of one server."""

    def __init__(self, engine: Engine, incoming: Incoming, api_key: str | None) -> None:
        self.engine, self.incoming, self.api_key, self.count = engine, incoming, api_key, 0

    async def serve(self, socket: WebSocket) -> None:
        """The endpoint."""
        await socket.accept()
        connection = _Connection(socket, self)
        try:
            if not is_same_origin(socket.headers):
                raise ApiError(403, "got a connection from a page of another site, expected this server's own page; open its address")
            await connection.greet()
            async with self._place():  # only now: clients without the key must not take the places of those who have it
                await connection.run()
        except WebSocketDisconnect:
            pass
        except Exception as error:
            if not isinstance(error, ApiError | ValidationError):
                logger.exception("error on a live connection")
            with suppress(WebSocketDisconnect, RuntimeError):  # the client may be gone
                await connection.refuse(error)
                await socket.close(1008)

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        """Counts a connection while it lasts. Raises ApiError (429) if there are too many."""
        limit = self.incoming.limits.live
        if self.count >= limit:
            raise ApiError(429, f"got more than {limit} live connections, expected no more; try again later", code="too_many_connections")
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1


@dataclass(frozen=True)
class _Asked:
    """A request, and the source picture at its arrival: a picture sent later does not apply to it."""

    draw: Draw
    source: Image | None


class _Connection:
    """One client. The task in `run` reads its messages; a second task (`_work`) draws one request after another."""

    def __init__(self, socket: WebSocket, live: Live) -> None:
        self.socket, self.live = socket, live
        self.tiers = tiers(live.incoming.model)
        self.source: Image | None = None
        self.waiting: _Asked | None = None
        self.came = asyncio.Event()  # `waiting` has changed
        self.at_work: Draw | None = None
        self.job: Job | None = None  # of the request at work; it has none before it is read and submitted
        self.overtaken = False  # the request at work has been cancelled, perhaps before it had a job
        self.last_preview = 0.0  # seconds that the last preview took
        self.sending = asyncio.Lock()

    async def greet(self) -> None:
        """Waits for `hello` and its key."""
        try:
            message = MESSAGE.validate_json(await asyncio.wait_for(self._receive(), HELLO_SECONDS))
        except TimeoutError as error:
            raise ApiError(400, f"got nothing for {HELLO_SECONDS:g} s, expected hello; connect again") from error
        if not isinstance(message, Hello):
            raise ApiError(400, f"got {message.type!r} first, expected hello; send the key with it if the server has one")
        check_key(self.live.api_key, message.key.strip().encode())

    async def run(self) -> None:
        """Serves the client until it goes away. Raises WebSocketDisconnect then."""
        await self._say({"type": "ready", "tiers": self.tiers})
        worker = asyncio.create_task(self._work())
        try:
            while True:
                text = ""
                try:
                    text = await self._receive()
                    await self._take(MESSAGE.validate_json(text))
                except (ApiError, ValidationError) as error:
                    await self.refuse(error, _id(text))
        finally:
            worker.cancel()
            if self.job is not None:
                self.job.cancel()

    async def refuse(self, error: Exception, id: int | None = None) -> None:
        await self._say({"type": "error", "id": id} | as_api_error(error).body())

    async def _receive(self) -> str:
        try:
            return await self.socket.receive_text()
        except KeyError as error:  # a binary frame
            raise ApiError(400, "got a binary frame, expected JSON") from error

    async def _take(self, message: Said) -> None:
        """Acts on a message after hello."""
        if isinstance(message, Source):
            await self._set_source(message)
            return
        if not isinstance(message, Draw | Stop):
            raise ApiError(400, "got a second hello, expected source, draw or stop")
        # All of this happens before anything is awaited: after an await this message itself may be the one at work.
        if isinstance(message, Stop) or not self._nearly_done():
            self.overtaken = True
            if self.job is not None:
                self.job.cancel()
        old, self.waiting = self.waiting, _Asked(message, self.source) if isinstance(message, Draw) else None
        self.came.set()
        if old is not None:
            await self._say({"type": "cancelled", "id": old.draw.id})

    async def _set_source(self, message: Source) -> None:
        try:
            data = None if message.image is None else data_url(message.image)
            self.source = None if data is None else await asyncio.to_thread(self.live.incoming.picture, data, "source")
        except (ApiError, InputError) as error:
            await self.refuse(error, message.id)
            return
        size = None if self.source is None else [self.source.width, self.source.height]
        await self._say({"type": "source", "id": message.id, "size": size})

    def _nearly_done(self) -> bool:
        """Whether the request at work is a preview that will be finished soon, going by the last one."""
        return self.at_work is not None and self.at_work.tier == "preview" and self.last_preview <= SHORT

    async def _work(self) -> None:
        """Draws one request after another, always the latest."""
        while True:
            await self.came.wait()
            self.came.clear()
            asked, self.waiting = self.waiting, None
            if asked is None:
                continue
            self.at_work, self.overtaken = asked.draw, False
            try:
                await self._draw(asked.draw, asked.source)
            except WebSocketDisconnect:
                return  # `run` sees it too
            except Exception as error:
                if as_api_error(error).status >= 500:
                    logger.error("a live picture failed", exc_info=error)
                await self.refuse(error, asked.draw.id)
            finally:
                self.at_work = self.job = None

    async def _draw(self, asked: Draw, source: Image | None) -> None:
        began = time.perf_counter()
        fields = {key: value for key, value in asked.model_dump(exclude={"type", "id", "tier"}).items() if value is not None}
        body = GenerationBody.model_validate(fields | self.tiers[asked.tier])
        images = [] if source is None else [source]
        requests = await asyncio.to_thread(self.live.incoming.drawing, body, images)
        self.job = Job(requests, keep=True)
        if self.overtaken:  # while the request was being read
            self.job.cancel()
        self.live.engine.submit(self.job)
        event = await self.job.events.get()
        if isinstance(event, Cancelled):
            await self._say({"type": "cancelled", "id": asked.id})
        elif isinstance(event, Failed):
            await self.refuse(event.error, asked.id)
        elif isinstance(event, Done) and isinstance(event.result, ImageResult):
            await self._show(asked, event.result, began)

    async def _show(self, asked: Draw, result: ImageResult, began: float) -> None:
        drawn = time.perf_counter()
        # Level 1, the fastest: most of these pictures are soon replaced by the next one.
        png = await asyncio.to_thread(file_of, result.image, settings=result.settings, level=1)
        now = time.perf_counter()
        timings = result.timings | {"wait": max(0.0, drawn - began - sum(result.timings.values())), "encode": now - drawn}
        if asked.tier == "preview":
            self.last_preview = now - began
        header = {"type": "picture", "id": asked.id, "tier": asked.tier, "seed": result.seed, "nfe": result.nfe, "reused": result.reused}
        header |= {"student": result.settings["student"], "timings": timings, "server": now - began}
        data = json.dumps(header).encode()
        async with self.sending:
            await self.socket.send_bytes(len(data).to_bytes(4, "big") + data + png)

    async def _say(self, message: dict[str, Any]) -> None:
        async with self.sending:
            await self.socket.send_text(json.dumps(message))


def _id(text: str) -> int | None:
    """The id of a refused message, which tells its client which one it was; None if no id can be read."""
    try:
        return Named.model_validate_json(text).id
    except ValidationError:
        return None
