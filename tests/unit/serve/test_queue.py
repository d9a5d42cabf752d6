"""Room in the engine's queue, and what is kept of a job."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from engine_world import Model, ends, engine_of, jobs, run
from PIL import Image

from hyperbagel.pipeline import ImageRequest, ImageResult
from hyperbagel.serve.jobs import Event, Job, Preview, Progress, Started, Text
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
        engine._unit_seconds = 10.0
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
