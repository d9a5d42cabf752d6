"""The engine: requests wait in one bounded queue; one thread a device takes those that fit together and works on them as a batch.

A `Job` is one HTTP request. It holds `Unit`s, one a picture or an answer, which may run in different batches. Threads tell the event loop
what happened through `Job.events`; the loop tells threads through `Job.cancel`, which is seen at the next denoising step or token.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from PIL.Image import Image

from hyperbagel.core.errors import InputError
from hyperbagel.pipeline import AskRequest, Contexts, HyperBagel, ImageRequest, ImageResult, TextResult
from hyperbagel.serve.metrics import Metrics
from hyperbagel.serve.previews import Previews
from hyperbagel.serve.schemas import ApiError

logger = logging.getLogger("hyperbagel.serve")


@dataclass(frozen=True)
class Text:
    """More text of answer `index`."""

    index: int
    text: str


@dataclass(frozen=True)
class Started:
    """A picture of a stream has passed every check and is being worked on: the stream may begin."""


@dataclass(frozen=True)
class Progress:
    """Picture `index` has seen `done` of `total` denoising steps."""

    index: int
    done: int
    total: int


@dataclass(frozen=True)
class Preview:
    """Picture `index` as far as it is; `number` counts its previews from 0."""

    index: int
    number: int
    image: Image


@dataclass(frozen=True)
class Done:
    index: int
    result: ImageResult | TextResult


@dataclass(frozen=True)
class Failed:
    error: Exception


@dataclass(frozen=True)
class Cancelled:
    pass


Event = Started | Progress | Text | Preview | Done | Failed | Cancelled


class Stop(Exception):
    """Raised inside the model when nobody waits for the batch any more."""


class Job:
    """One HTTP request. Made on the event loop that will read `events`."""

    def __init__(
        self,
        requests: Sequence[ImageRequest | AskRequest],
        *,
        stream: bool = False,
        previews: int = 0,
        progress: bool = False,
        keep: bool = False,
    ) -> None:
        """stream: the answer is sent as it comes. previews: pictures to send before the last one. progress: tell of every step.
        keep: the pictures it starts from will come again, so their contexts are kept."""
        self.units = [Unit(self, i, request) for i, request in enumerate(requests)]
        self.stream, self.previews, self.progress, self.keep = stream, previews, progress, keep
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.told = False  # something of the answer has been sent, so it cannot be started again
        self._loop, self._over = asyncio.get_running_loop(), threading.Event()

    @property
    def over(self) -> bool:
        """Cancelled or failed: what is left of it need not be done."""
        return self._over.is_set()

    def tell(self, event: Event) -> None:
        """From any thread."""
        self.told = self.told or isinstance(event, Text | Progress | Preview)
        try:
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # the loop is closed: nobody waits
            self._over.set()

    def cancel(self) -> None:
        if not self._over.is_set():
            self._over.set()
            self.tell(Cancelled())

    def fail(self, error: Exception) -> None:
        if not self._over.is_set():
            self._over.set()
            self.tell(Failed(error))


class Unit:
    """One picture or one answer."""

    def __init__(self, job: Job, index: int, request: ImageRequest | AskRequest) -> None:
        self.job, self.index, self.request = job, index, request
        self.fit: Hashable = None  # shares a batch with its equals; set when it is submitted


def batch_key(request: ImageRequest | AskRequest) -> Hashable:
    """Requests of equal keys share every forward, so that row i of a batch is request i."""
    if isinstance(request, AskRequest):
        return "ask", request.max_tokens, request.temperature, request.drafter
    # Defaults are the student's or the model's own: here only what was asked for is compared.
    apart = {"prompt", "images", "inputs", "seed", "size", "max_think_tokens", "student", "mask"}
    own = {f.name for f in fields(request)} - apart
    student = None if request.student == "none" else request.student
    return "draw", request.is_edit, student, *(getattr(request, name) for name in sorted(own))


def area_class(request: ImageRequest | AskRequest, usual: tuple[int, int], resized: Callable[[int, int], tuple[int, int]]) -> int:
    """0 for pictures of up to 512 x 512 pixels and for answers, 1 for up to twice that, 2 above.

    Rows of a batch are padded to the longest: beside one of 1024 x 1024 each of 256 x 256 would take sixteen times its work. usual: the
    size of pictures that nobody gave one. resized: what a picture's (width, height) become when it is edited.
    """
    if isinstance(request, AskRequest):
        return 0
    size = request.size
    if size is None:
        pictures = [item for item in request.items() if isinstance(item, Image)]
        size = resized(*pictures[-1 if request.mask is None else 0].size) if pictures else usual
    return (min(size[0] * size[1], 1 << 20) - 1 >> 18).bit_length()


class Engine:
    """models: one a device, of equal weights. waiting: units in the queue. batch: units that share forwards."""

    def __init__(self, models: Sequence[HyperBagel], *, waiting: int, batch: int, metrics: Metrics) -> None:
        self.models, self.limit, self.batch, self.metrics = models, waiting, batch, metrics
        self._waiting: deque[Unit] = deque()
        self._change = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._closed, self._broken, self._running, self._unit_seconds = False, False, 0, 1.0

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def broken(self) -> bool:
        """A device no longer computes (an error that stays until the process ends): start the server again."""
        return self._broken

    def submit(self, job: Job) -> None:
        """Puts a job in the queue; starts the threads if this is the first. Raises ApiError: 429 if it is full, 503 if it is closed."""
        with self._change:
            if self._closed:
                raise shutting_down()
            if self._broken:
                raise device_failed()
            self._waiting = deque(unit for unit in self._waiting if not self._dropped(unit))
            if self._waiting and len(self._waiting) + len(job.units) > self.limit:
                seconds = max(1, math.ceil(self._unit_seconds * len(self._waiting) / len(self.models)))
                raise ApiError(
                    429,
                    f"got {len(job.units)} more than the queue of {self.limit} holds, expected room; try again in {seconds} s",
                    type="rate_limit_error",
                    code="queue_full",
                    headers={"retry-after": str(seconds)},
                )
            usual, resized = self.models[0].default_size, self.models[0].parts.vae_transform.size
            for unit in job.units:
                unit.fit = batch_key(unit.request), area_class(unit.request, usual, resized)
            self._waiting.extend(job.units)
            if not self._threads:
                self._threads = [threading.Thread(target=self._work, args=(m,), name="hyperbagel-engine", daemon=True) for m in self.models]
                for thread in self._threads:
                    thread.start()
            self._gauges()
            self._change.notify_all()

    def close(self, timeout: float | None = None) -> None:
        """Takes nothing new, finishes what waits, ends the threads. After `timeout` seconds what is left is given up."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        end = None if timeout is None else time.monotonic() + timeout
        for thread in self._threads:
            thread.join(None if end is None else max(0.0, end - time.monotonic()))
        with self._change:
            for unit in self._waiting:
                unit.job.cancel()

    # -- the threads -----------------------------------------------------------------------------------------------------------

    def _work(self, model: HyperBagel) -> None:
        contexts = Contexts()
        while units := self._take():
            began = time.perf_counter()
            try:
                self._run(model, units, contexts)
            finally:
                with self._change:
                    self._running -= len(units)
                    # slowly forgetting mean, for Retry-After
                    self._unit_seconds += 0.2 * ((time.perf_counter() - began) / len(units) - self._unit_seconds)
                    self._gauges()

    def _take(self) -> list[Unit]:
        """The oldest unit and those that fit with it, in order of arrival; [] when the engine is closed and empty."""
        with self._change:
            while True:
                self._waiting = deque(unit for unit in self._waiting if not self._dropped(unit))
                if self._waiting:
                    break
                self._gauges()
                if self._closed:
                    return []
                self._change.wait()
            fit = self._waiting[0].fit
            units = [unit for unit in self._waiting if unit.fit == fit][: self.batch]
            taken = {id(unit) for unit in units}
            self._waiting = deque(unit for unit in self._waiting if id(unit) not in taken)
            self._running += len(units)
            self._gauges()
            return units

    def _dropped(self, unit: Unit) -> bool:
        if unit.job.over:
            self._count(unit, "cancelled")
        return unit.job.over

    def _run(self, model: HyperBagel, units: list[Unit], contexts: Contexts) -> None:
        failed = self._try(model, units, contexts)
        if failed is None:
            return
        # Behind the handler: what an error still refers to, the frames of the batch with its caches and latents, would be in the way of
        # what is tried next if the memory had run out.
        if len(units) > 1 and not any(unit.job.told for unit in units):
            for unit in units:  # one bad request must not take its neighbours down
                self._run(model, [unit], contexts)
            return
        for unit in units:
            self._count(unit, "failed")
            unit.job.fail(failed)

    def _try(self, model: HyperBagel, units: list[Unit], contexts: Contexts) -> Exception | None:
        """Runs them; the error, without its frames, if they failed."""
        try:
            results = self._results(model, units, contexts)
        except Stop:
            for unit in units:
                self._count(unit, "cancelled")
            return None
        except Exception as error:
            if not isinstance(error, InputError):
                logger.error("a batch of %d failed\n%s", len(units), traceback.format_exc())  # as text: a kept record would keep the frames
                self._broken = self._broken or not device_works(model.parts.model.device)
            if isinstance(error, torch.OutOfMemoryError) and model.runner is not None:
                model.runner.forget()  # room for what is tried next
            return without_frames(error)
        self.metrics.observe("hyperbagel_batch_size", len(units))
        for stage, seconds in results[0].timings.items():
            self.metrics.observe("hyperbagel_stage_seconds", seconds, stage=stage)
        for unit, result in zip(units, results, strict=True):
            self._count(unit, "cancelled" if unit.job.over else "done")
            if isinstance(result, TextResult):
                self.metrics.add("hyperbagel_tokens_total", result.tokens)
            else:
                self.metrics.add("hyperbagel_evaluations_total", result.nfe)
            unit.job.tell(Done(unit.index, result))
        return None

    def _results(self, model: HyperBagel, units: list[Unit], contexts: Contexts) -> Sequence[ImageResult | TextResult]:
        return self._ask(model, units) if isinstance(units[0].request, AskRequest) else self._draw(model, units, contexts)

    def _draw(self, model: HyperBagel, units: list[Unit], contexts: Contexts) -> Sequence[ImageResult]:
        requests = [unit.request for unit in units if isinstance(unit.request, ImageRequest)]
        previews = Previews(model, requests, [unit.job.previews for unit in units])
        started: set[Job] = set()

        def begin() -> None:
            _stop_if_alone(units)
            for job in {unit.job for unit in units if unit.job.stream} - started:
                started.add(job)
                job.tell(Started())

        def on_token(row: int, token: int) -> None:
            begin()

        def on_step(done: int, total: int, latents: Any) -> None:
            begin()
            for unit in units:
                if unit.job.progress:
                    unit.job.tell(Progress(unit.index, done, total))
            for row, number, image in previews.at(done, total, latents):
                units[row].job.tell(Preview(units[row].index, number, image))

        kept = contexts if any(unit.job.keep for unit in units) else None
        return model.generate_batch(requests, on_step=on_step, on_token=on_token, contexts=kept)

    def _ask(self, model: HyperBagel, units: list[Unit]) -> Sequence[TextResult]:
        requests = [unit.request for unit in units if isinstance(unit.request, AskRequest)]
        streams = [model.parts.tokenizer.stream() for _ in units]

        def say(row: int, text: str) -> None:
            if text and units[row].job.stream:
                units[row].job.tell(Text(units[row].index, text))

        def on_token(row: int, token: int) -> None:
            _stop_if_alone(units)
            say(row, streams[row].push(token))

        results = model.ask_batch(requests, on_token=on_token)
        for row, stream in enumerate(streams):
            say(row, stream.finish())
        return results

    # -- counting --------------------------------------------------------------------------------------------------------------

    def _count(self, unit: Unit, outcome: str) -> None:
        kind = "text" if isinstance(unit.request, AskRequest) else "image"
        self.metrics.add("hyperbagel_results_total", kind=kind, outcome=outcome)

    def _gauges(self) -> None:
        self.metrics.set("hyperbagel_waiting", len(self._waiting))
        self.metrics.set("hyperbagel_running", self._running)


def shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down; try again later", type="server_error", code="shutting_down")


def device_failed() -> ApiError:
    return ApiError(503, "the device no longer computes; the server has to be started again", type="server_error", code="device_failed")


def device_works(device: torch.device) -> bool:
    """Whether it still computes. After an illegal access or a failed assertion no call on a GPU succeeds until the process ends."""
    try:
        return bool(torch.ones((), device=device).add_(1).item() == 2)
    except torch.OutOfMemoryError:
        return True
    except RuntimeError:
        return False


def _stop_if_alone(units: Sequence[Unit]) -> None:
    """A batch goes on for as long as anyone waits for one of its rows."""
    if all(unit.job.over for unit in units):
        raise Stop


def without_frames(error: Exception) -> Exception:
    """The error and those behind it, without the frames they came from: frames hold tensors."""
    chain: BaseException | None = error
    seen: set[int] = set()
    while chain is not None and id(chain) not in seen:
        seen.add(id(chain))
        chain.__traceback__ = None
        chain = chain.__cause__ or chain.__context__
    return error
