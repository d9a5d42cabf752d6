"""Room in the engine's queue, and what is kept of a job."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from engine_world import Model, ends, engine_of, jobs, keep_busy, run, submit_together
from PIL import Image

from hyperbagel.pipeline import ImageRequest, ImageResult
from hyperbagel.serve import worker
from hyperbagel.serve.jobs import Event, Job, Preview, Progress, Started, Text
from hyperbagel.serve.metrics import Pace
from hyperbagel.serve.schemas import ApiError


@pytest.fixture
def model() -> Model:
    return Model()


def test_what_the_queue_could_never_hold_is_taken_where_nothing_waits(model: Model) -> None:
    async def main() -> None:
        engine = engine_of(model, waiting=1)
        job = Job([ImageRequest("x") for _ in range(3)])
        engine.submit(job)
        assert len(await ends(job)) == 3
        await asyncio.to_thread(engine.close)

    run(main)


def test_two_devices_have_room_in_half_the_time() -> None:
    async def main() -> None:
        models = Model(), Model()
        engine = engine_of(*models, waiting=2, batch=1)
        engine._pace.wait = lambda kinds, devices: 10 * len(list(kinds)) // devices  # type: ignore[method-assign]
        for model in models:
            model.hold.clear()
        all_jobs = jobs("a", "b", "c", "d", "late")
        for job in all_jobs[:2]:
            engine.submit(job)
        for model in models:
            assert await asyncio.to_thread(model.inside.wait, 10)
        for job in all_jobs[2:4]:
            engine.submit(job)
        assert engine.metrics.get("hyperbagel_waiting") == 2, "told at once"
        with pytest.raises(ApiError) as caught:
            engine.submit(all_jobs[4])
        assert caught.value.headers["retry-after"] == "10"
        for job in all_jobs:
            job.cancel()
        for model in models:
            model.hold.set()
        await asyncio.to_thread(engine.close)

    run(main)


def test_when_to_come_back_goes_by_what_waits(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes a second by this clock, for any number of pictures together."""
    now, draw = [0.0], model.generate_batch

    def generate_batch(requests: Sequence[ImageRequest], **more: Any) -> list[ImageResult]:
        now[0] += requests[0].steps or 0
        return draw(requests, **more)

    monkeypatch.setattr(worker, "time", SimpleNamespace(perf_counter=lambda: now[0], monotonic=time.monotonic))
    monkeypatch.setattr(model, "generate_batch", generate_batch)

    async def main() -> list[str]:
        engine = engine_of(model, waiting=4, batch=4)

        async def told(*steps: int) -> str:
            waiting = [job for n in steps for job in jobs("x", steps=n)]
            [first, late] = jobs("first", "late")
            model.inside.clear()
            await keep_busy(engine, model, first)
            for job in waiting:
                engine.submit(job)
            with pytest.raises(ApiError) as caught:
                engine.submit(late)
            for job in waiting:
                job.cancel()
            model.hold.set()
            await ends(first)
            return caught.value.headers["retry-after"]

        for steps, count in ((4, 4), (8, 4), (300, 1)):  # 1, 2 and 300 seconds a picture
            model.inside.clear()
            together = jobs(*["x"] * count, steps=steps)
            for job in (await submit_together(engine, model, together), *together):
                await ends(job)
        [left] = jobs("x", steps=100)
        model.inside.clear()
        await keep_busy(engine, model, left)
        left.cancel()
        model.hold.set()
        found = [await told(*steps) for steps in ((4, 4, 4, 4), (4, 4, 8, 8), (4, 4, 4, 300), (100, 100, 4, 4))]
        await asyncio.to_thread(engine.close)
        return found

    assert run(main) == ["4", "6", "30", "4"], "the last: nothing is known of work that was cancelled, a second is guessed"


def test_when_to_come_back_follows_the_last_full_batch_and_forgets_old_kinds() -> None:
    pace = Pace()
    pace.took("a", 8.0, 1)
    pace.took("a", 8.0, 8)
    assert pace.wait("aa", 1) == 5 and pace.wait("aa", 4) == 2  # 2.2 s each
    for kind in range(Pace.KINDS):
        pace.took(kind, 9.0, 1)
    assert pace.wait("aa", 1) == 2 and len(pace._seconds) == Pace.KINDS


def test_contexts_are_kept_for_those_that_come_again(model: Model) -> None:
    original, kept = model.generate_batch, list[bool]()

    def generate_batch(*args: Any, **more: Any) -> list[ImageResult]:
        kept.append(more["contexts"] is not None)
        return original(*args, **more)

    model.generate_batch = generate_batch  # type: ignore[method-assign]

    async def main() -> None:
        engine = engine_of(model)
        for keep in (False, True):
            job = Job([ImageRequest("x")], keep=keep)
            engine.submit(job)
            await ends(job)
        await asyncio.to_thread(engine.close)

    run(main)
    assert kept == [False, True]


@pytest.mark.parametrize("part", [Text(0, "a"), Progress(0, 1, 2), Preview(0, 0, Image.new("RGB", (1, 1)))])
def test_a_job_does_not_forget_that_a_part_was_sent(part: Event) -> None:
    async def main() -> tuple[bool, bool]:
        job = Job([ImageRequest("x")])
        job.tell(Started())
        before = job.told
        job.tell(part)
        job.tell(Started())
        return before, job.told

    assert run(main) == (False, True)
