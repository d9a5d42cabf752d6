"""Jobs: what the endpoints submit to the engine, and the events by which the engine reports on them.

A `Job` is one HTTP request. Its `Unit`s, one per picture or answer, may run in different batches. The engine's threads report to the event
loop through `Job.events`. The loop stops work with `Job.cancel`, which takes effect at the next denoising step or token.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from PIL.Image import Image

from hyperbagel.pipeline import AskRequest, ImageRequest, ImageResult, TextResult


@dataclass(frozen=True)
class Text:
    """More text of answer `index`."""

    index: int
    text: str


@dataclass(frozen=True)
class Started:
    """A picture of a streaming job has passed every check and is being drawn: the stream may begin."""


@dataclass(frozen=True)
class Progress:
    """`done` of `total` denoising steps of picture `index` are finished."""

    index: int
    done: int
    total: int


@dataclass(frozen=True)
class Preview:
    """Unfinished picture `index`; `number` counts its previews from 0."""

    index: int
    number: int
    image: Image


@dataclass(frozen=True)
class Done:
    """Picture or answer `index` is finished."""

    index: int
    result: ImageResult | TextResult


@dataclass(frozen=True)
class Failed:
    """The whole job has failed. Nobody reads events after this one."""

    error: Exception


@dataclass(frozen=True)
class Cancelled:
    """The whole job was cancelled. Nobody reads events after this one."""


@dataclass(frozen=True)
class Quiet:
    """Nothing has come for a while. Made by who waits for the job's events, not by the engine."""


Event = Quiet | Started | Progress | Text | Preview | Done | Failed | Cancelled


class Job:
    """One HTTP request, or one picture of the live line. Must be made on the event loop that will read `events`."""

    def __init__(
        self,
        requests: Sequence[ImageRequest | AskRequest],
        *,
        stream: bool = False,
        previews: int = 0,
        progress: bool = False,
        keep: bool = False,
    ) -> None:
        """stream: the answer is sent as it is made. previews: unfinished pictures to send per picture. progress: report every step.
        keep: its source pictures will come again, so the engine keeps their contexts."""
        self.units = [Unit(self, i, request) for i, request in enumerate(requests)]
        self.stream, self.previews, self.progress, self.keep = stream, previews, progress, keep
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.told = False  # a part of the answer has been sent, so it cannot be started again
        self._loop, self._over = asyncio.get_running_loop(), threading.Event()

    @property
    def over(self) -> bool:
        """Cancelled or failed: its remaining work need not be done."""
        return self._over.is_set()

    def tell(self, event: Event) -> None:
        """Puts an event into `events`; callable from any thread."""
        self.told = self.told or isinstance(event, Text | Progress | Preview)
        try:
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # the event loop is closed: nobody waits
            self._over.set()

    def cancel(self) -> None:
        """Stops the job, unless it is over already."""
        if not self._over.is_set():
            self._over.set()
            self.tell(Cancelled())

    def fail(self, error: Exception) -> None:
        """Ends the job with an error, unless it is over already."""
        if not self._over.is_set():
            self._over.set()
            self.tell(Failed(error))


class Unit:
    """One picture or one answer of a job."""

    def __init__(self, job: Job, index: int, request: ImageRequest | AskRequest) -> None:
        self.job, self.index, self.request = job, index, request
        self.fit: Hashable = None  # units of equal `fit` may share a batch; set by the engine
        self.latents = 0  # latent tokens of a picture; set by the engine
        self.done = False  # its result has been handed over; set by the engine
