"""Questions that come while others of their kind are answered join them, and take nothing from those that came before."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from engine_world import Model, engine_of, jobs, run

from hyperbagel.core.errors import InputError
from hyperbagel.pipeline import AskRequest
from hyperbagel.serve.jobs import Cancelled, Done, Failed, Job, Text
from hyperbagel.serve.worker import TURNS, Engine


@pytest.fixture
def model() -> Model:
    return Model()


def question(text: str, **settings: Any) -> Job:
    return Job([AskRequest(text, **settings)])


async def while_first(engine: Engine, model: Model, *others: Job) -> Job:
    """Submits the others while a first question is held before its first letter, and lets all of them end."""
    first = question("abc")
    model.hold.clear()
    engine.submit(first)
    await asyncio.to_thread(model.inside.wait, 10)
    for job in others:
        engine.submit(job)
    model.hold.set()
    await asyncio.to_thread(engine.close)
    assert engine.metrics.get("hyperbagel_running") == 0 == engine.metrics.get("hyperbagel_waiting")
    return first


def events(job: Job) -> list[Any]:
    return [job.events.get_nowait() for _ in range(job.events.qsize())]


def test_a_question_joins_those_that_are_answered(model: Model) -> None:
    async def main() -> None:
        engine, second, streamed = engine_of(model), question("xyz"), Job([AskRequest("uvw")], stream=True)
        first = await while_first(engine, model, second, streamed)
        assert model.batches == [["abc", "xyz", "uvw"]]
        assert [events(job)[-1].result.text for job in (first, second)] == ["abc", "xyz"]
        *texts, last = events(streamed)
        assert [event.text for event in texts if isinstance(event, Text)] == list("uvw") and isinstance(last, Done)
        assert engine.metrics.get("hyperbagel_results_total", kind="text", outcome="done") == 3
        assert engine.metrics.get("hyperbagel_tokens_total") == 9
        assert engine.metrics.get("hyperbagel_batch_size_sum") == 3

    run(main)


def test_nobody_joins_before_those_that_came_earlier(model: Model) -> None:
    """Behind a question of another kind, and behind a picture, it waits, though it would fit."""

    async def main() -> None:
        engine, other, late = engine_of(model), question("uvw", max_tokens=9), question("xyz")
        [picture] = jobs("a")
        await while_first(engine, model, other, late, picture)
        assert model.batches == [["abc"], ["uvw"], ["xyz"], ["a"]]

    run(main)


def test_a_full_batch_takes_nobody_until_there_is_room(model: Model) -> None:
    async def main() -> None:
        engine = engine_of(model, batch=2)
        await while_first(engine, model, question("x"), question("uvw"), question("rst"))
        # "x" joins at the second letter of "abc" and is done with it; "uvw" takes its place; then "abc" is over, and "rst" comes
        assert model.batches == [["abc", "x", "uvw", "rst"]]
        assert max(model.at_work) == 2

    run(main)


def test_a_batch_ends_however_many_wait(model: Model) -> None:
    async def main() -> None:
        engine = engine_of(model, batch=2, waiting=100)
        await while_first(engine, model, *(question(f"{i:03}") for i in range(TURNS * 2 + 3)))
        assert [len(batch) for batch in model.batches] == [TURNS * 2, 2, 2]  # the last two pairs begin and end together
        assert engine.metrics.get("hyperbagel_tokens_total") == 3 * (TURNS * 2 + 4)

    run(main)


def test_one_that_cannot_be_met_fails_alone(model: Model) -> None:
    async def main() -> None:
        engine, bad, good = engine_of(model), question("?"), question("xyz")
        first = await while_first(engine, model, bad, good)
        [failed] = events(bad)
        assert isinstance(failed, Failed) and isinstance(failed.error, InputError) and "too long" in str(failed.error)
        assert [events(job)[-1].result.text for job in (first, good)] == ["abc", "xyz"]
        assert model.batches == [["abc", "xyz"]]
        assert engine.metrics.get("hyperbagel_results_total", kind="text", outcome="failed") == 1

    run(main)


def test_who_joined_what_broke_is_tried_again(model: Model) -> None:
    """Each alone; what comes meanwhile joins those, and all are counted."""

    async def main() -> None:
        engine, bad, good, late = engine_of(model), question("!"), question("xyz"), question("uvw")
        model.between = lambda step: engine.submit(late) if not step and model.batches == [["abc"]] and not late.units[0].fit else None
        first = await while_first(engine, model, bad, good)
        told = {name: [type(event) for event in events(job)] for name, job in dict(first=first, bad=bad, good=good, late=late).items()}
        assert told == {"first": [Done], "bad": [Failed], "good": [Done], "late": [Done]}
        assert sorted(name for batch in model.batches for name in batch).count("!") == 2

    run(main)


def test_who_left_the_queue_does_not_join(model: Model) -> None:
    async def main() -> None:
        engine, gone, good = engine_of(model), question("uvw"), question("xyz")
        model.hold.clear()
        first = question("abc")
        engine.submit(first)
        await asyncio.to_thread(model.inside.wait, 10)
        engine.submit(gone)
        engine.submit(good)
        gone.cancel()
        model.hold.set()
        await asyncio.to_thread(engine.close)
        assert model.batches == [["abc", "xyz"]] and isinstance(events(gone)[0], Cancelled)
        assert engine.metrics.get("hyperbagel_results_total", kind="text", outcome="cancelled") == 1
        assert engine.metrics.get("hyperbagel_running") == 0

    run(main)
