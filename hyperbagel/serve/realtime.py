"""/v1/live: pictures while one types. A WebSocket on which the latest request wins.

The client sends JSON: `hello` (first; the key, if one is needed), `source` (a picture to edit, or null), `draw` (see `Draw`), `stop`. The
server sends JSON (`ready`, `source`, `cancelled`, `error`) and pictures as binary frames: four bytes, big-endian, the length of a JSON
header; the header; a PNG with its settings inside.

One connection has one request at work and at most one that waits. A new one takes the place of the one that waits, and cancels the one at
work at its next denoising step. Only a preview that is as good as done, because the last one took no longer than `SHORT`, is let finish, so
that a moving slider shows pictures all along.
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
from hyperbagel.serve.guard import check_key, is_same_origin
from hyperbagel.serve.incoming import Incoming, data_url
from hyperbagel.serve.outgoing import file_of
from hyperbagel.serve.schemas import ApiError, GenerationBody, Scale, Strict
from hyperbagel.serve.streams import as_api_error
from hyperbagel.serve.worker import Cancelled, Done, Engine, Failed, Job

logger = logging.getLogger("hyperbagel.serve")
SHORT = 0.25  # seconds
HELLO_SECONDS = 20.0
PREVIEW_STEPS, BETTER_STEPS = 4, 20  # of the model itself, where no student takes its place
Tier = Literal["preview", "better", "full"]


class Hello(Strict):
    type: Literal["hello"]
    key: str = Field("", max_length=1000)


class Source(Strict):
    """The picture that following requests edit; null: they draw from the text alone."""

    type: Literal["source"]
    id: int
    image: str | None = Field(description="A data: URL.")


class Draw(Strict):
    """preview: the student of the fewest evaluations. better: the next one. full: the model itself. All start from the seed's one noise."""

    type: Literal["draw"]
    id: int
    prompt: str = Field(min_length=1, max_length=10_000)
    seed: int = Field(ge=0, lt=2**63)
    tier: Tier = "preview"
    text_scale: Scale | None = None
    image_scale: Scale | None = None
    size: str | None = Field(None, max_length=20)


class Stop(Strict):
    """Ends what is at work and what waits."""

    type: Literal["stop"]


class Named(BaseModel):
    """What can be told of a message that is refused: all else is ignored."""

    id: int


Said = Hello | Source | Draw | Stop
MESSAGE: TypeAdapter[Said] = TypeAdapter(Annotated[Said, Field(discriminator="type")])


def tiers(model: HyperBagel) -> dict[str, dict[str, Any]]:
    """Who draws each tier: a student, or the model itself in so many steps (None: as many as usual)."""
    students = sorted(model.students.names(), key=lambda name: model.students.sampler(name).nfe)
    chosen: list[dict[str, Any]] = [{"student": name, "steps": None} for name in students[:2]]
    merged = model.sampler is not None  # it has a student's few steps itself
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
        line = _Connection(socket, self)
        try:
            if not is_same_origin(socket.headers):
                raise ApiError(403, "got a page of another site, expected one of this server; open the server's own address")
            await line.greet()
            async with self._place():  # not before: who has no key must not keep out who has one
                await line.run()
        except WebSocketDisconnect:
            pass
        except Exception as error:
            if not isinstance(error, ApiError | ValidationError):
                logger.exception("error on a live connection")
            with suppress(WebSocketDisconnect, RuntimeError):  # it may be gone
                await line.refuse(error)
                await socket.close(1008)

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        limit = self.incoming.limits.live
        if self.count >= limit:
            raise ApiError(429, f"got one more than {limit} live connections, expected fewer; try again later", code="too_many_connections")
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1


@dataclass(frozen=True)
class _Asked:
    """A request, and the picture that held when it came: a later one is not for it."""

    draw: Draw
    source: Image | None


class _Connection:
    def __init__(self, socket: WebSocket, live: Live) -> None:
        self.socket, self.live = socket, live
        self.tiers = tiers(live.incoming.model)
        self.source: Image | None = None
        self.waiting: _Asked | None = None
        self.came = asyncio.Event()  # something waits
        self.job: Job | None = None
        self.at_work: Draw | None = None
        self.overtaken = False  # what is at work
        self.last_preview = 0.0  # seconds
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
        """Until the client goes away."""
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
        if isinstance(message, Source):
            try:
                data = None if message.image is None else data_url(message.image)
                self.source = None if data is None else await asyncio.to_thread(self.live.incoming.picture, data, "source")
            except (ApiError, InputError) as error:
                await self.refuse(error, message.id)
                return
            size = None if self.source is None else [self.source.width, self.source.height]
            await self._say({"type": "source", "id": message.id, "size": size})
            return
        if not isinstance(message, Draw | Stop):
            raise ApiError(400, "got a second hello, expected source, draw or stop")
        # All of this before anything is awaited: afterwards the message itself may be what is at work.
        if isinstance(message, Stop) or not self._nearly_done():
            self.overtaken = True  # it may be at work without having a job yet
            if self.job is not None:
                self.job.cancel()
        old, self.waiting = self.waiting, _Asked(message, self.source) if isinstance(message, Draw) else None
        self.came.set()
        if old is not None:
            await self._say({"type": "cancelled", "id": old.draw.id})

    def _nearly_done(self) -> bool:
        return self.at_work is not None and self.at_work.tier == "preview" and self.last_preview <= SHORT

    async def _work(self) -> None:
        """One request after another, always the latest."""
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
                return  # the reader sees it too
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
        if self.overtaken:  # while it was being read
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
        # lightly compressed: a preview is looked at once
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
    """The id of a message that is refused, so that its client knows which one it was; None if it has none that can be read."""
    try:
        return Named.model_validate_json(text).id
    except ValidationError:
        return None
