"""An answer that is whole goes to its client at once, whatever the rest of its batch still says or however that ends."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from engine_world import Model, ends, engine_of, run

from hyperbagel.pipeline import AskRequest
from hyperbagel.serve.jobs import Cancelled, Done, Failed, Job, Text


@pytest.fixture
def model() -> Model:
    return Model()


def questions(*texts: str, **settings: Any) -> list[Job]:
    return [Job([AskRequest(text)], **settings) for text in texts]


async def begun(model: Model, *jobs: Job) -> Any:
    """An engine that has all these jobs in one batch, held before its first token."""
    engine, first = engine_of(model), Job([AskRequest("abc", max_tokens=9)])
    model.hold.clear()
    engine.submit(first)
    await asyncio.to_thread(model.inside.wait, 10)
    for job in jobs:
        engine.submit(job)
    return engine


def test_a_short_answer_does_not_wait_for_a_long_one(model: Model) -> None:
    """The long one is held behind its first token until the short one has come."""
    gone = threading.Event()

    async def main() -> None:
        short, long = questions("y", "xyz")
        engine = await begun(model, short, long)
        model.between = lambda i: gone.wait(10) and None if len(model.batches) == 2 else None
        model.hold.set()
        [event] = await ends(short)
        assert isinstance(event, Done) and event.result.text == "y" and long.events.empty()  # type: ignore[union-attr]
        gone.set()
        [event] = await ends(long)
        assert event.result.text == "xyz"
        await asyncio.to_thread(engine.close)
        assert short.events.empty()  # once
        assert model.batches == [["abc"], ["y", "xyz"]]
        assert engine.metrics.get("hyperbagel_results_total", kind="text", outcome="done") == 3
        assert engine.metrics.get("hyperbagel_tokens_total") == 7
        assert engine.metrics.get("hyperbagel_stage_seconds_sum", stage="decode") == pytest.approx(0.6)  # the longest of each batch

    run(main)


def test_a_stream_ends_with_its_own_answer(model: Model) -> None:
    async def main() -> None:
        short, long = questions("y", "xyz", stream=True)
        engine = await begun(model, short, long)
        model.hold.set()
        await asyncio.to_thread(engine.close)
        for job, text in ((short, "y"), (long, "xyz")):
            told = [job.events.get_nowait() for _ in range(job.events.qsize())]
            assert [event.text for event in told[:-1] if isinstance(event, Text)] == list(text) and isinstance(told[-1], Done)

    run(main)


def test_what_fails_later_is_tried_again_without_those_that_are_done(model: Model) -> None:
    async def main() -> None:
        good, bad, late = questions("y", "a!", "uvw")
        engine = await begun(model, good, bad, late)
        model.hold.set()
        await asyncio.to_thread(engine.close)
        told = [[job.events.get_nowait() for _ in range(job.events.qsize())] for job in (good, bad, late)]
        assert [[type(event) for event in events] for events in told] == [[Done], [Failed], [Done]]
        assert model.batches == [["abc"], ["y", "a!", "uvw"], ["a!"], ["uvw"]]
        assert engine.metrics.get("hyperbagel_results_total", kind="text", outcome="done") == 3
        assert engine.metrics.get("hyperbagel_results_total", kind="text", outcome="failed") == 1

    run(main)


def test_a_batch_whose_last_clients_left_ends_though_one_was_served(model: Model) -> None:
    async def main() -> None:
        short, long = questions("y", "xyz")
        engine = await begun(model, short, long)
        model.between = lambda i: long.cancel() if len(model.batches) == 2 else None
        model.hold.set()
        await asyncio.to_thread(engine.close)
        assert model.steps == 2  # the second token was not said
        assert isinstance(short.events.get_nowait(), Done) and isinstance(long.events.get_nowait(), Cancelled)
        assert engine.metrics.get("hyperbagel_results_total", kind="text", outcome="cancelled") == 1
        assert engine.metrics.get("hyperbagel_results_total", kind="text", outcome="done") == 2

    run(main)
