"""Questions that come while others of their kind are answered join them, and take nothing from those that came before."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from engine_world import Model, engine_of, jobs, keep_busy, run
from PIL import Image

from hyperbagel.core.errors import InputError
from hyperbagel.pipeline import AskRequest, TextResult
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


def test_without_memory_for_one_that_joins_what_is_kept_goes(model: Model) -> None:
    forgotten: list[bool] = []

    def answers(requests: Any, on_token: Any, on_answer: Any, visitors: Any, contexts: Any) -> list[TextResult]:
        model.inside.set()
        model.hold.wait(10)
        contexts.forget = lambda: forgotten.append(True)
        if (request := visitors.next(1)) is not None:
            visitors.refuse(torch.OutOfMemoryError("no memory") if request.question == "big" else InputError("no"))
        on_answer(0, TextResult("a", 1, 1, {"decode": 0.1}))
        return [TextResult("a", 1, 1, {"decode": 0.1})]

    async def main() -> None:
        model.ask_batch = answers  # type: ignore[assignment, method-assign]
        for text, expected in (("big", [True]), ("bad", [])):
            engine, job = engine_of(model), question(text)
            await keep_busy(engine, model, question("abc"))
            engine.submit(job)
            model.hold.set()
            await asyncio.to_thread(engine.close)
            assert forgotten == expected and isinstance(events(job)[-1], Failed if text == "bad" else Done)
            forgotten.clear()

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


def test_each_stream_ends_at_its_own_stop_text(model: Model) -> None:
    """Also behind one that was refused."""

    async def main() -> None:
        bad, cut, whole = (Job([AskRequest(text, stop=stop)], stream=True) for text, stop in (("?", "y"), ("uvw", "v"), ("xyz", ())))
        await while_first(engine_of(model), model, bad, cut, whole)
        said = [[event.text for event in events(job) if isinstance(event, Text)] for job in (bad, cut, whole)]
        assert said == [[], ["u"], list("xyz")] and model.batches == [["abc", "uvw", "xyz"]]

    run(main)


def test_streamed_thoughts_may_hold_the_stop_text(model: Model) -> None:
    """Of who begins a batch, and of who joins it."""

    def answers(requests: Any, on_token: Any, on_answer: Any, visitors: Any, contexts: Any) -> list[TextResult]:
        model.inside.set()
        model.hold.wait(10)
        assert len(requests) == 1 and visitors.next(1) is not None
        for row in range(2):
            for letter in "<think>a.b</think>c.d":
                on_token(row, ord(letter))
            on_answer(row, TextResult("c", 20, 1, {"decode": 0.1}, "a.b", stopped_at="."))
        return []

    async def main() -> None:
        model.ask_batch = answers  # type: ignore[assignment, method-assign]
        engine, thinkers = engine_of(model), [Job([AskRequest("x", think=True, stop=".")], stream=True) for _ in range(2)]
        await keep_busy(engine, model, thinkers[0])
        engine.submit(thinkers[1])
        model.hold.set()
        await asyncio.to_thread(engine.close)
        for job in thinkers:
            assert "".join(event.text for event in events(job) if isinstance(event, Text)) == "<think>a.b</think>c"

    run(main)


def test_who_joined_what_broke_is_tried_alone(model: Model) -> None:
    """Nobody joins a question that is tried again, or it would be broken for all who come, again and again."""

    async def main() -> None:
        engine, bad, others = engine_of(model), question("a!"), [question(f"{i:03}") for i in range(6)]
        first = await while_first(engine, model, bad, *others)
        assert [[type(event) for event in events(job)] for job in (first, bad, *others)] == [[Done], [Failed], *[[Done]] * 6]
        assert [batch for batch in model.batches if "a!" in batch] == [["abc", "a!", "000", "001"], ["a!"]]
        assert engine.metrics.get("hyperbagel_results_total", kind="text", outcome="failed") == 1

    run(main)


def test_of_what_broke_only_streams_that_had_begun_are_lost(model: Model) -> None:
    async def main() -> None:
        engine, bad, streamed, plain = engine_of(model), question("ab!"), Job([AskRequest("uvw")], stream=True), question("xyz")
        first = await while_first(engine, model, bad, streamed, plain)
        assert [type(events(job)[-1]) for job in (first, bad, streamed, plain)] == [Done, Failed, Failed, Done]

    run(main)


def test_one_for_which_there_is_no_room_comes_next_and_alone(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    """Those that came behind it wait until it is done."""

    async def main() -> None:
        engine, big, late = engine_of(model), question("big"), question("xyz")
        await while_first(engine, model, big, late)
        assert model.batches == [["abc"], ["big"], ["xyz"]]
        assert [type(event) for event in events(big)] == [Done] and "no room beside others" in caplog.text

    run(main)


def test_an_idle_device_begins_at_once() -> None:
    """Where a second device has nothing to do, nobody joins the first one's batch."""

    async def main() -> None:
        models = Model(), Model()
        engine = engine_of(*models)
        first = question("abc")
        for model in models:
            model.hold.clear()
        engine.submit(first)
        while not any(model.inside.is_set() for model in models):
            await asyncio.sleep(0.01)
        busy = next(model for model in models if model.inside.is_set())
        other = next(model for model in models if model is not busy)
        while engine._idle < 1:
            await asyncio.sleep(0.01)
        second = question("xyz")
        engine.submit(second)
        assert await asyncio.to_thread(other.inside.wait, 10)
        assert engine._idle == 0
        late = question("uvw")
        engine.submit(late)
        with engine._change:
            engine._idle = 1  # as between the call that wakes a thread and its waking
        assert engine.next_like(late.units[0].fit) is None
        with engine._change:
            engine._idle = 0
        busy.hold.set()
        other.hold.set()
        await asyncio.to_thread(engine.close)
        assert sorted(batch[0] for model in models for batch in model.batches)[:2] == ["abc", "xyz"]
        assert [type(events(job)[-1]) for job in (first, second, late)] == [Done] * 3

    run(main)


def test_gauges_and_pictures_are_let_go_of_as_answers_end(model: Model) -> None:
    """While a long answer goes on, those that are done count no more and hold no picture."""
    picture = Image.new("RGB", (8, 8))

    async def main() -> None:
        engine, short = engine_of(model), Job([AskRequest("x", (picture,))])
        seen: list[tuple[float | None, int]] = []
        model.between = lambda step: seen.append((engine.metrics.get("hyperbagel_running"), len(short.units[0].request.images)))
        await while_first(engine, model, short)
        assert model.batches == [["abc", "x"]] and seen[:3] == [(1, 1), (1, 0), (0, 0)]

    run(main)


def test_a_queue_that_is_emptied_by_leaving_says_so(model: Model) -> None:
    async def main() -> None:
        engine, gone = engine_of(model), question("uvw")
        seen: list[float | None] = []
        model.between = lambda step: (gone.cancel() if not step else None, seen.append(engine.metrics.get("hyperbagel_waiting")))[0]
        await while_first(engine, model, gone)
        assert seen[1] == 0

    run(main)


def test_a_client_never_waits_for_nothing(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the model hands no answer over, which it never should."""

    async def main() -> None:
        engine, job = engine_of(model), question("abc")
        monkeypatch.setattr(model, "ask_batch", lambda requests, **_: [])
        engine.submit(job)
        await asyncio.to_thread(engine.close)
        [failed] = events(job)
        assert isinstance(failed, Failed) and "no result of 1 of 1" in str(failed.error)

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
