"""The engine: units of jobs wait in one bounded queue; one thread per device takes those that fit together and runs them as a batch."""

from __future__ import annotations

import logging
import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from PIL.Image import Image

from hyperbagel.core.errors import InputError
from hyperbagel.core.files import one_line
from hyperbagel.data.answer_text import AnswerText
from hyperbagel.pipeline import AskRequest, Contexts, HyperBagel, ImageRequest, ImageResult, TextResult, passes
from hyperbagel.serve.jobs import Done, Job, Preview, Progress, Started, Text, Unit
from hyperbagel.serve.metrics import Metrics, Pace
from hyperbagel.serve.previews import Previews
from hyperbagel.serve.schemas import ApiError

logger = logging.getLogger("hyperbagel.serve")
TURNS = 8  # times a batch's places are taken before it ends: it holds the jobs of all who joined, and is counted at its end


class Stop(Exception):
    """Raised in the model's callbacks to abandon a batch that nobody waits for any more."""


def batch_key(request: ImageRequest | AskRequest) -> Hashable:
    """Requests with equal keys can share every forward pass: row i of the batch is request i throughout."""
    if isinstance(request, AskRequest):
        return "ask", request.max_tokens, request.drafter, *request.sampling.values()
    # Settings are compared as they were asked for: None stands for a default of the student or the model, the same for the whole batch.
    apart = {"prompt", "images", "inputs", "seed", "size", "max_think_tokens", "think_temperature", "drafter", "student", "mask"}
    own = {f.name for f in fields(request)} - apart
    student = None if request.student == "none" else request.student
    plan = (request.drafter, request.think_temperature or 0.0) if request.think else None
    return "draw", request.is_edit, student, plan, *(getattr(request, name) for name in sorted(own))


def area_class(request: ImageRequest | AskRequest, usual: tuple[int, int], resized: Callable[[int, int], tuple[int, int]]) -> int:
    """A second part of `Unit.fit`, by area: 0 for answers and pictures of up to 512 x 512 pixels, 1 for up to twice that, 2 above.

    The rows of a batch are padded to the longest, so beside a picture of 1024 x 1024 one of 256 x 256 would cost 16 times its own work.

    Args:
        usual: (height, width) of a picture that was given no size.
        resized: from the (width, height) of a picture to edit to those of the result.
    """
    if isinstance(request, AskRequest):
        return 0
    size = request.size
    if size is None:
        pictures = [item for item in request.items() if isinstance(item, Image)]
        size = resized(*pictures[-1 if request.mask is None else 0].size) if pictures else usual
    return sum(size[0] * size[1] > most for most in (512 * 512, 2 * 512 * 512))


class Engine:
    """One queue and one thread per model.

    models: one per device, all with the same weights. waiting: how many units the queue holds. batch: the most units in one batch.
    """

    def __init__(self, models: Sequence[HyperBagel], *, waiting: int, batch: int, metrics: Metrics) -> None:
        self.models, self.limit, self.batch, self.metrics = models, waiting, batch, metrics
        self._waiting: deque[Unit] = deque()
        self._change = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._closed, self._broken = False, False
        self._running, self._idle = 0, 0  # units at work; threads that wait for some
        self._pace = Pace()

    @property
    def closed(self) -> bool:
        """Takes nothing new."""
        return self._closed

    @property
    def broken(self) -> bool:
        """A device no longer computes, which stays so until the process ends: the server must be restarted."""
        return self._broken

    def submit(self, job: Job) -> None:
        """Puts a job's units into the queue; the first job starts the threads. Raises ApiError: 429 if full, 503 if closed or broken."""
        with self._change:
            if self._closed:
                raise shutting_down()
            if self._broken:
                raise device_failed()
            self._waiting = deque(unit for unit in self._waiting if not self._dropped(unit))
            if self._waiting and len(self._waiting) + len(job.units) > self.limit:
                seconds = self._pace.wait((unit.fit for unit in self._waiting), len(self.models))
                raise ApiError(
                    429,
                    f"got {len(job.units)} to put into a queue with {len(self._waiting)} of its {self.limit} places taken, "
                    f"expected enough room; try again in {seconds} s",
                    type="rate_limit_error",
                    code="queue_full",
                    headers={"retry-after": str(seconds)},
                )
            usual, resized = self.models[0].default_size, self.models[0].parts.vae_transform.size
            for unit in job.units:
                unit.fit = batch_key(unit.request), area_class(unit.request, usual, resized)
                unit.latents = math.prod(self.models[0].grid(unit.request)) if isinstance(unit.request, ImageRequest) else 0
            self._waiting.extend(job.units)
            if not self._threads:
                self._threads = [threading.Thread(target=self._work, args=(m,), name="hyperbagel-engine", daemon=True) for m in self.models]
                for thread in self._threads:
                    thread.start()
            self._gauges()
            self._change.notify_all()

    def close(self, timeout: float | None = None) -> None:
        """Takes nothing new, finishes what waits and ends the threads. After `timeout` seconds the units still waiting are cancelled."""
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
        """What each thread does: one batch after another, until the engine is closed and empty."""
        contexts = Contexts()
        while units := self._take():
            began, fit = time.perf_counter(), units[0].fit
            try:
                self._run(model, units, contexts)
            finally:
                with self._change:
                    done = sum(unit.done for unit in units)  # what was cancelled or failed says nothing of the pace
                    self._running -= len(units) - done
                    if done:
                        self._pace.took(fit, time.perf_counter() - began, done)
                    self._gauges()

    def _take(self) -> list[Unit]:
        """Waits for units; the oldest and those that fit with it, in order of arrival. [] once the engine is closed and empty."""
        with self._change:
            while True:
                self._waiting = deque(unit for unit in self._waiting if not self._dropped(unit))
                if self._waiting:
                    break
                self._gauges()
                if self._closed:
                    return []
                self._idle += 1
                self._change.wait()
                self._idle -= 1
            fit = self._waiting[0].fit
            units = [unit for unit in self._waiting if unit.fit == fit][: self.batch]
            units = units[: len(passes([unit.latents for unit in units])[0])]  # the model would draw the others after them
            taken = {id(unit) for unit in units}
            self._waiting = deque(unit for unit in self._waiting if id(unit) not in taken)
            self._running += len(units)
            self._gauges()
            return units

    def _dropped(self, unit: Unit) -> bool:
        """Whether a waiting unit's job is over, so that it leaves the queue; counts it then."""
        if unit.job.over:
            self._count(unit, "cancelled")
        return unit.job.over

    def _run(self, model: HyperBagel, units: list[Unit], contexts: Contexts, last: bool = False) -> None:
        """Runs a batch. If it fails, runs each unit alone of which nothing was sent, so that one bad request takes no neighbour down. So it
        does with a lone one for which there was no memory beside what was kept of others; `last`: not once more."""
        failed = self._try(model, units, contexts)
        if failed is None:
            return
        # Outside the `except` block of `_try`: inside it, the error's frames still hold the batch's caches and latents, and after an
        # out-of-memory error the next attempt needs that room.
        freed = isinstance(failed, torch.OutOfMemoryError) and contexts.forget()
        for unit in units:
            if unit.done:
                continue
            if (len(units) > 1 or (freed and not last)) and not unit.job.told:
                unit.fit = object()  # nobody joins it
                self._run(model, [unit], contexts, last=len(units) == 1)
            else:
                self._count(unit, "failed")
                unit.job.fail(failed)

    def _try(self, model: HyperBagel, units: list[Unit], contexts: Contexts) -> Exception | None:
        """Runs a batch and reports its results. Returns the error, without its frames, if it failed."""
        try:
            results = self._results(model, units, contexts)
        except Stop:
            for unit in units:
                if not unit.done:
                    self._count(unit, "cancelled")
            return None
        except Exception as error:
            if not isinstance(error, InputError):
                # The traceback goes in as text: with exc_info a handler that keeps records would keep the frames too.
                logger.error("a batch of %d failed\n%s", len(units), traceback.format_exc())
                self._broken = self._broken or not device_works(model.parts.model.device)
            if isinstance(error, torch.OutOfMemoryError):
                model.forget_graphs()  # makes room for the next attempt
            return without_frames(error)
        self.metrics.observe("hyperbagel_batch_size", len(units))
        longest = max((result.timings for result in results), key=lambda timings: sum(timings.values()), default={})
        for stage, seconds in longest.items():
            self.metrics.observe("hyperbagel_stage_seconds", seconds, stage=stage)
        missing = [unit for unit in units if not unit.done]
        if not all(unit.job.over for unit in missing):  # a client must never wait for nothing
            return RuntimeError(f"got no result of {len(missing)} of {len(units)} requests, expected one of each that is waited for")
        for unit in missing:  # its client left, and the others' answers did not wait for it
            self._count(unit, "cancelled")
        return None

    def next_like(self, fit: Hashable) -> Unit | None:
        """Takes the oldest waiting unit, if it is of this kind: what joins a batch does not overtake others."""
        with self._change:
            self._waiting = deque(unit for unit in self._waiting if not self._dropped(unit))
            unit = None
            if self._waiting and self._waiting[0].fit == fit and not self._idle:  # an idle device would begin at once
                unit = self._waiting.popleft()
                self._running += 1
            self._gauges()
            return unit

    def refuse(self, unit: Unit, error: Exception) -> None:
        """Gives back a unit that was taken with `next_like`. It fails if it cannot be met; else it is taken next, and runs alone."""
        with self._change:
            self._running -= 1
            if not isinstance(error, InputError):
                logger.error("an answer could not join others, and comes after them: %s", one_line(error))
                unit.fit = object()
                self._waiting.appendleft(unit)
                self._change.notify_all()
            self._gauges()
        if isinstance(error, InputError):
            self._count(unit, "failed")
            unit.job.fail(without_frames(error))

    def _finish(self, unit: Unit, result: ImageResult | TextResult) -> None:
        """Counts a finished unit and tells its job."""
        with self._change:
            unit.done = True
            if isinstance(unit.request, AskRequest):
                unit.request = replace(unit.request, images=())  # a batch may go on for long, and pictures take room
            self._running -= 1
            self._gauges()
        self._count(unit, "cancelled" if unit.job.over else "done")
        if isinstance(result, TextResult):
            self.metrics.add("hyperbagel_tokens_total", result.tokens)
        else:
            self.metrics.add("hyperbagel_evaluations_total", result.nfe)
        unit.job.tell(Done(unit.index, result))

    def _results(self, model: HyperBagel, units: list[Unit], contexts: Contexts) -> Sequence[ImageResult | TextResult]:
        return self._ask(model, units, contexts) if isinstance(units[0].request, AskRequest) else self._draw(model, units, contexts)

    def _draw(self, model: HyperBagel, units: list[Unit], contexts: Contexts) -> Sequence[ImageResult]:
        """Draws a batch, and sends its jobs what they want to see on the way."""
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
        results = model.generate_batch(requests, on_step=on_step, on_token=on_token, contexts=kept)
        for unit, result in zip(units, results, strict=True):
            self._finish(unit, result)
        return results

    def _ask(self, model: HyperBagel, units: list[Unit], contexts: Contexts) -> Sequence[TextResult]:
        """Answers a batch, and sends streaming jobs the text as it comes. An answer that is whole does not wait for the others, and
        questions that come meanwhile join: they are added to `units`."""
        requests = [unit.request for unit in units if isinstance(unit.request, AskRequest)]
        streams = [AnswerText(model.parts.tokenizer, request.stop, request.think) for request in requests]

        def say(row: int, text: str) -> None:
            if text and units[row].job.stream:
                units[row].job.tell(Text(units[row].index, text))

        def on_token(row: int, token: int) -> None:
            _stop_if_alone(units)
            say(row, streams[row].push(token))

        def on_answer(row: int, result: TextResult) -> None:
            say(row, streams[row].finish())
            self._finish(units[row], result)

        visitors = _Visitors(self, model, units, streams, contexts)
        return model.ask_batch(requests, on_token=on_token, on_answer=on_answer, visitors=visitors, contexts=contexts)

    # -- counting --------------------------------------------------------------------------------------------------------------

    def _count(self, unit: Unit, outcome: str) -> None:
        kind = "text" if isinstance(unit.request, AskRequest) else "image"
        self.metrics.add("hyperbagel_results_total", kind=kind, outcome=outcome)

    def _gauges(self) -> None:
        self.metrics.set("hyperbagel_waiting", len(self._waiting))
        self.metrics.set("hyperbagel_running", self._running)


class _Visitors:
    """Who comes to a batch that is being answered, and who leaves it (speculative.answers.Visitors): its units and its streams."""

    def __init__(self, engine: Engine, model: HyperBagel, units: list[Unit], streams: list[AnswerText], contexts: Contexts) -> None:
        self.engine, self.model, self.units, self.streams, self.contexts = engine, model, units, streams, contexts

    def next(self, rows: int) -> AskRequest | None:
        room = rows < self.engine.batch and len(self.units) < TURNS * self.engine.batch
        unit = self.engine.next_like(self.units[0].fit) if room else None
        if unit is None:
            return None
        assert isinstance(unit.request, AskRequest)
        self.units.append(unit)
        self.streams.append(AnswerText(self.model.parts.tokenizer, unit.request.stop, unit.request.think))
        return unit.request

    def refuse(self, error: Exception) -> None:
        self.streams.pop()
        if isinstance(error, torch.OutOfMemoryError):
            self.contexts.forget()
        self.engine.refuse(self.units.pop(), error)

    def gone(self, index: int) -> bool:
        return self.units[index].job.over


def shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down; try again later", type="server_error", code="shutting_down")


def device_failed() -> ApiError:
    return ApiError(503, "the device no longer computes; the server has to be started again", type="server_error", code="device_failed")


def device_works(device: torch.device) -> bool:
    """Whether a device still computes. After an illegal access or a failed assertion, no call on a GPU succeeds until the process ends."""
    try:
        return bool(torch.ones((), device=device).add_(1).item() == 2)
    except torch.OutOfMemoryError:
        return True
    except RuntimeError:
        return False


def _stop_if_alone(units: Sequence[Unit]) -> None:
    """Raises Stop if nobody waits for any row of the batch."""
    if all(unit.done or unit.job.over for unit in units):
        raise Stop


def without_frames(error: Exception) -> Exception:
    """The error, its causes and contexts, with their tracebacks removed: the frames in them hold tensors."""
    chain: BaseException | None = error
    seen: set[int] = set()
    while chain is not None and id(chain) not in seen:
        seen.add(id(chain))
        chain.__traceback__ = None
        chain = chain.__cause__ or chain.__context__
    return error
