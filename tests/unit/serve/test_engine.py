"""The engine alone, with a stand-in for the model that does what the pipeline promises and can be held, or made to fail."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from engine_world import Model, ends, engine_of, jobs, keep_busy, run, submit_together
from PIL import Image

from hyperbagel.data.transforms import ImageTransform
from hyperbagel.pipeline import AskRequest, ImageRequest, ImageResult
from hyperbagel.serve import worker
from hyperbagel.serve.jobs import Cancelled, Done, Failed, Job, Preview, Progress
from hyperbagel.serve.schemas import ApiError
from hyperbagel.serve.worker import area_class, batch_key


@pytest.fixture
def model() -> Model:
    return Model()


def test_compatible_units_share_a_batch_in_order_of_arrival(model: Model) -> None:
    async def main() -> None:
        engine = engine_of(model, waiting=20)
        others = [*jobs("a", "b"), *jobs("other", steps=3), *jobs("c", "d", "e")]
        first = await submit_together(engine, model, others)
        for job in (first, *others):
            [event] = await ends(job)
            assert event.result.thinking == job.units[0].request.prompt  # type: ignore[union-attr]
        engine.close()
        assert model.batches == [["first"], ["a", "b", "c", "d"], ["other"], ["e"]]

    run(main)


def test_cancelled_work_ends_at_the_next_step_and_never_starts(model: Model) -> None:
    async def main() -> None:
        engine = engine_of(model)
        [first, second] = jobs("first", "second")
        await keep_busy(engine, model, first)
        engine.submit(second)
        first.cancel()
        second.cancel()
        model.hold.set()
        await asyncio.to_thread(engine.close, 10)
        assert model.steps == 1 and model.batches == [["first"]]
        assert engine.metrics.get("hyperbagel_results_total", kind="image", outcome="cancelled") == 2
        assert engine.metrics.get("hyperbagel_running") == 0 == engine.metrics.get("hyperbagel_waiting")

    run(main)


def test_a_batch_goes_on_while_somebody_waits_for_it(model: Model) -> None:
    async def main() -> None:
        engine = engine_of(model)
        both = Job([ImageRequest("a"), ImageRequest("b")])
        model.hold.clear()
        engine.submit(both)
        [later] = jobs("c")
        await asyncio.to_thread(model.inside.wait, 10)
        engine.submit(later)
        model.hold.set()
        assert [event.result.thinking for event in await ends(both)] == ["a", "b"]
        assert (await ends(later))[0].result.thinking == "c"
        engine.close()

    run(main)


def test_a_full_queue_refuses_and_makes_room_for_the_cancelled(model: Model) -> None:
    async def main() -> None:
        engine = engine_of(model, waiting=2)
        [first, *waiting, late] = jobs("first", "a", "b", "late")
        await keep_busy(engine, model, first)
        for job in waiting:
            engine.submit(job)
        with pytest.raises(ApiError) as caught:
            engine.submit(late)
        assert caught.value.status == 429 and int(caught.value.headers["retry-after"]) >= 1
        waiting[0].cancel()
        engine.submit(late)
        model.hold.set()
        assert (await ends(late))[0].result.thinking == "late"
        engine.close()
        [after] = jobs("after")
        with pytest.raises(ApiError) as caught:
            engine.submit(after)
        assert caught.value.status == 503

    run(main)


def test_closing_finishes_what_waits(model: Model) -> None:
    async def main() -> None:
        engine = engine_of(model)
        all_jobs = jobs("a", "b", "c", steps=2)
        for job in all_jobs:
            engine.submit(job)
        await asyncio.to_thread(engine.close)
        assert [(await ends(job))[0].result.thinking for job in all_jobs] == ["a", "b", "c"]
        assert not any(thread.is_alive() for thread in engine._threads)

    run(main)


def test_several_devices_work_at_once() -> None:
    async def main() -> None:
        models = Model(), Model()
        engine = engine_of(*models, batch=1)
        for model in models:
            model.hold.clear()
        both = jobs("a", "b")
        for job in both:
            engine.submit(job)
        for model in models:
            assert await asyncio.to_thread(model.inside.wait, 10), "both have a picture before one is done"
        for model in models:  # only now: a model let go early might take the other picture too
            model.hold.set()
        for job in both:
            await ends(job)
        engine.close()
        assert sorted(batch for model in models for batch in model.batches) == [["a"], ["b"]]

    run(main)


def test_text_is_told_as_it_comes_and_only_to_its_own_stream(model: Model) -> None:
    async def main() -> None:
        engine = engine_of(model)
        streamed = Job([AskRequest("abc"), AskRequest("xyz")], stream=True)
        plain = Job([AskRequest("uvw")])
        engine.submit(streamed)
        engine.submit(plain)
        await asyncio.to_thread(engine.close)
        events = [streamed.events.get_nowait() for _ in range(streamed.events.qsize())]
        for index, text in enumerate(("abc", "xyz")):
            assert "".join(e.text for e in events if not isinstance(e, Done) and e.index == index) == text  # type: ignore[union-attr]
        assert [type(plain.events.get_nowait())] == [Done] and plain.events.empty()

    run(main)


def test_an_answer_nobody_waits_for_ends_at_the_next_token(model: Model) -> None:
    async def main() -> None:
        engine = engine_of(model)
        model.hold.clear()
        job = Job([AskRequest("abc")], stream=True)
        engine.submit(job)
        await asyncio.to_thread(model.inside.wait, 10)
        job.cancel()
        model.hold.set()
        await asyncio.to_thread(engine.close, 10)
        assert model.steps == 1 and engine.metrics.get("hyperbagel_results_total", kind="text", outcome="cancelled") == 1

    run(main)


def test_a_client_s_closed_loop_ends_its_job(model: Model) -> None:
    engine = engine_of(model)

    async def leave() -> Job:
        model.hold.clear()
        job = Job([ImageRequest("x")], stream=True)
        engine.submit(job)
        return job

    job = asyncio.run(leave())
    model.hold.set()
    engine.close(10)
    assert job.over and not engine._threads[0].is_alive()


def test_which_requests_fit_together() -> None:
    plain, picture = ImageRequest("a"), Image.new("RGB", (2, 2))
    assert batch_key(plain) == batch_key(ImageRequest("b", seed=9, size=(16, 32), student="none"))
    different = [
        ImageRequest("a", steps=3),
        ImageRequest("a", think=True),
        ImageRequest("a", think=True, drafter="lookup"),
        ImageRequest("a", (picture,)),
        ImageRequest("a", student="6"),
        ImageRequest("a", (picture,), student="6"),
        ImageRequest("a", student="6", steps=3),
        AskRequest("a"),
        AskRequest("a", max_tokens=2),
        AskRequest("a", temperature=1.0),
        AskRequest("a", drafter="none"),
    ]
    assert batch_key(ImageRequest("a", drafter="lookup", think_temperature=1.0)) == batch_key(plain)  # without a plan nothing is drafted
    planned = [ImageRequest("a", think=True, think_temperature=t) for t in (None, 0.0, 1.0)]
    assert batch_key(planned[0]) == batch_key(planned[1]) != batch_key(planned[2])
    keys = {batch_key(request) for request in (plain, *different)}
    assert len(keys) == len(different) + 1
    assert batch_key(ImageRequest("a", student="6")) == batch_key(ImageRequest("b", student="6", seed=2))


def test_pictures_of_very_unlike_sizes_are_apart() -> None:
    """Rows are padded to the longest. A picture to edit says how large the result will be, which is not what its file has."""
    small, large, wide = (Image.new("RGB", size) for size in ((200, 300), (1024, 1024), (4000, 3000)))
    resized = ImageTransform(1024, 512, 16).size  # BAGEL's rule for latents
    classes = {
        0: [ImageRequest("a", size=(256, 256)), ImageRequest("a", size=(512, 512)), ImageRequest("a"), AskRequest("a", (large,))],
        1: [ImageRequest("a", size=(512, 528)), ImageRequest("a", size=(1024, 512)), ImageRequest("a", (small,))],
        2: [ImageRequest("a", (large,)), ImageRequest("a", (small, wide)), ImageRequest("a", (small,), size=(1024, 1024))],
    }
    for number, requests in classes.items():
        assert [area_class(request, (64, 64), resized) for request in requests] == [number] * len(requests)
    assert area_class(ImageRequest("a"), (1024, 1024), resized) == 2
    square = Image.new("RGB", (256, 256))  # drawn at 512 x 512
    assert (
        area_class(ImageRequest("a", (square,)), (64, 64), resized)
        == 0
        == area_class(ImageRequest("a", (large,), size=(256, 256)), (64, 64), resized)
    )
    masked = ImageRequest("a", (square, wide), mask=Image.new("L", square.size))
    assert area_class(masked, (64, 64), resized) == 0  # of the picture under the mask


def test_a_large_picture_waits_for_its_like(model: Model) -> None:
    async def main() -> None:
        engine = engine_of(model, waiting=20)
        others = [*jobs("a"), *jobs("large", size=(1024, 1024)), *jobs("b", size=(256, 256)), *jobs("wide", size=(512, 2048))]
        first = await submit_together(engine, model, others)
        for job in (first, *others):
            assert isinstance((await ends(job))[0], Done)
        engine.close()
        assert model.batches == [["first"], ["a", "b"], ["large", "wide"]]

    run(main)


def test_no_more_are_taken_than_the_model_draws_at_a_time(model: Model) -> None:
    """Else those that it draws after the others would be told of the others' steps."""

    async def main() -> None:
        engine = engine_of(model, waiting=20)
        large = jobs(*"abcde", size=(1024, 1024))
        first = await submit_together(engine, model, large)
        for job in (first, *large):
            assert isinstance((await ends(job))[0], Done)
        engine.close()
        assert model.batches == [["first"], ["a", "b", "c", "d"], ["e"]]

    run(main)


def test_who_leaves_a_batch_does_not_end_it_for_the_others(model: Model) -> None:
    original = model.generate_batch

    async def main() -> None:
        engine = engine_of(model)
        leaving, staying = jobs("leaves", "stays")

        def generate_batch(requests: Sequence[ImageRequest], *args: Any, **more: Any) -> list[ImageResult]:
            if len(requests) == 2:
                leaving.cancel()  # in the middle of the work
            return original(requests, *args, **more)

        model.generate_batch = generate_batch  # type: ignore[method-assign]
        await submit_together(engine, model, [leaving, staying])
        assert (await ends(staying))[0].result.thinking == "stays"
        await asyncio.to_thread(engine.close)
        assert model.batches == [["first"], ["leaves", "stays"]]
        outcomes = {name: engine.metrics.get("hyperbagel_results_total", kind="image", outcome=name) for name in ("done", "cancelled")}
        assert outcomes == {"done": 2, "cancelled": 1}

    run(main)


def test_what_still_waits_when_the_time_to_close_is_over_is_cancelled(model: Model) -> None:
    async def main() -> None:
        engine = engine_of(model)
        [first, second] = jobs("first", "second")
        await keep_busy(engine, model, first)
        engine.submit(second)
        await asyncio.to_thread(engine.close, 0.05)
        assert isinstance((await ends(second))[0], Cancelled) and second.over
        model.hold.set()
        await asyncio.to_thread(engine.close, 10)
        assert model.batches == [["first"]]

    run(main)


def test_when_to_come_back_is_read_off_the_seconds_of_a_unit(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of four took 40 s: 10 s a unit; two wait."""
    ticks = iter((0.0, 40.0, 0.0, 0.0))
    monkeypatch.setattr(worker, "time", SimpleNamespace(perf_counter=lambda: next(ticks), monotonic=time.monotonic))

    async def main() -> None:
        engine = engine_of(model, waiting=2)
        four = Job([ImageRequest("x") for _ in range(4)])
        engine.submit(four)
        await ends(four)
        model.inside.clear()
        [first, *waiting, late] = jobs("first", "a", "b", "late")
        await keep_busy(engine, model, first)
        for job in waiting:
            engine.submit(job)
        with pytest.raises(ApiError) as caught:
            engine.submit(late)
        assert caught.value.headers["retry-after"] == "20"  # 2 x 10
        for job in (first, *waiting):
            job.cancel()
        model.hold.set()
        await asyncio.to_thread(engine.close)

    run(main)


def test_what_was_told_of_its_progress_is_not_started_again(model: Model) -> None:
    def generate_batch(requests: Sequence[ImageRequest], *, on_step: Callable[[int, int, Any], None], **more: Any) -> list[ImageResult]:
        model.batches.append([request.prompt for request in requests])
        on_step(1, 2, None)
        raise RuntimeError("in the middle")

    model.generate_batch = generate_batch  # type: ignore[assignment, method-assign]

    async def main() -> None:
        engine = engine_of(model)
        job = Job([ImageRequest("a"), ImageRequest("b")], progress=True)
        engine.submit(job)
        await asyncio.to_thread(engine.close)
        events = [job.events.get_nowait() for _ in range(job.events.qsize())]
        assert [type(event) for event in events] == [Progress, Progress, Failed] and model.batches == [["a", "b"]]

    run(main)


def test_a_preview_says_which_picture_of_its_own_request_it_is(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its row in the batch is: two requests of one picture each, and a preview of the second row."""
    due = [(1, 0, Image.new("RGB", (1, 1)))]
    monkeypatch.setattr(worker, "Previews", lambda *args: SimpleNamespace(at=lambda done, *rest: due if done == 1 else []))

    async def main() -> None:
        engine = engine_of(model)
        [first] = jobs("first", steps=2)
        await keep_busy(engine, model, first)
        one, two = jobs("one", "two")
        for job in (one, two):
            engine.submit(job)
        first.cancel()
        model.hold.set()
        event = await asyncio.wait_for(two.events.get(), 10)
        assert isinstance(event, Preview) and (event.index, event.number) == (0, 0)
        assert isinstance((await ends(one))[0], Done)
        await asyncio.to_thread(engine.close)

    run(main)
