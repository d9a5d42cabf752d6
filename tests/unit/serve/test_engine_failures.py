"""What fails does so alone, and gives back what it held."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from engine_world import Model, ends, engine_of, jobs, keep_busy, run

from hyperbagel.core.errors import InputError
from hyperbagel.pipeline import AskRequest, ImageRequest, ImageResult, TextResult
from hyperbagel.serve import worker
from hyperbagel.serve.jobs import Done, Failed, Job
from hyperbagel.serve.schemas import ApiError


@pytest.fixture
def model() -> Model:
    return Model()


def test_one_bad_request_does_not_take_its_neighbours_down(model: Model) -> None:
    async def main() -> None:
        engine = engine_of(model)
        [first, *others] = jobs("first", "good", "bad", "broken")
        await keep_busy(engine, model, first)
        for job in others:
            engine.submit(job)
        model.hold.set()
        [good], [bad], [broken] = [await ends(job) for job in others]
        assert good.result.thinking == "good"
        assert isinstance(bad, Failed) and isinstance(bad.error, InputError)
        assert isinstance(broken, Failed) and isinstance(broken.error, RuntimeError)
        engine.close()
        assert engine.metrics.get("hyperbagel_results_total", kind="image", outcome="failed") == 2

    run(main)


def test_what_failed_is_out_of_memory_before_it_is_tried_again(model: Model) -> None:
    """A batch that ran out of memory must not keep its tensors while its requests are tried one by one."""
    left: list[bool] = []

    class Latents:
        pass

    kept: list[weakref.ref[Latents]] = []
    original = model.generate_batch

    def generate_batch(requests: Sequence[ImageRequest], *args: Any, **more: Any) -> list[ImageResult]:
        if len(requests) == 1:
            left.extend(ref() is not None for ref in kept)
            return original(requests, *args, **more)
        latents = Latents()
        kept.append(weakref.ref(latents))
        try:
            raise RuntimeError("out of memory")
        except RuntimeError as error:
            raise RuntimeError("the batch failed") from error

    model.generate_batch = generate_batch  # type: ignore[method-assign]

    async def main() -> None:
        engine = engine_of(model)
        [first, *others] = jobs("first", "one", "two")
        await keep_busy(engine, model, first)
        for job in others:
            engine.submit(job)
        model.hold.set()
        for job in others:
            [event] = await ends(job)
            assert isinstance(event, Done)
        engine.close()

    run(main)
    assert left == [False, False]


def test_without_memory_kept_graphs_go_before_the_next_try(model: Model) -> None:
    told: list[str] = []
    model.forget_graphs = lambda: told.append("forget")
    original = model.generate_batch

    def generate_batch(requests: Sequence[ImageRequest], *args: Any, **more: Any) -> list[ImageResult]:
        told.append(str(len(requests)))
        if len(requests) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(requests, *args, **more)

    model.generate_batch = generate_batch  # type: ignore[method-assign]

    async def main() -> None:
        engine = engine_of(model)
        job = Job([ImageRequest("one"), ImageRequest("two")])
        engine.submit(job)
        assert all(isinstance(event, Done) for event in await ends(job)) and not engine.broken
        engine.close()

    run(main)
    assert told == ["2", "forget", "1", "1"]


@pytest.mark.parametrize("works", [True, False])
def test_a_device_that_no_longer_computes_is_told(model: Model, works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the request's own leaves the server as it was; one that stays makes it refuse what comes, and say so to who watches."""
    assert worker.device_works(torch.device("cpu")) and not worker.device_works(torch.device("meta"))
    monkeypatch.setattr(worker, "device_works", lambda device: works)

    async def main() -> None:
        engine = engine_of(model)
        [bad, broken, next_] = jobs("bad", "broken", "good")
        for job in (bad, broken):
            assert not engine.broken
            engine.submit(job)
            assert isinstance((await ends(job))[0], Failed)
        assert engine.broken is not works
        if works:
            engine.submit(next_)
            assert isinstance((await ends(next_))[0], Done)
        else:
            with pytest.raises(ApiError) as refused:
                engine.submit(next_)
            assert refused.value.status == 503 and "started again" in str(refused.value)
        engine.close()

    run(main)


def test_a_device_that_failed_for_good_stays_so_whatever_the_others_do(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    works = iter([False, True])
    monkeypatch.setattr(worker, "device_works", lambda device: next(works))

    async def main() -> None:
        engine = engine_of(model, batch=1)
        [first, *broken] = jobs("first", "broken", "broken")
        await keep_busy(engine, model, first)
        for job in broken:
            engine.submit(job)
        model.hold.set()
        for job in broken:
            assert isinstance((await ends(job))[0], Failed)
        assert engine.broken
        engine.close()

    run(main)


def test_frames_go_from_all_that_an_error_came_from() -> None:
    found: Exception | None = None
    try:
        try:
            _ = {}["x"]  # type: ignore[var-annotated]
        except KeyError:
            [].pop()
    except IndexError as error:
        found = worker.without_frames(error)
    assert found is not None and found.__traceback__ is None and found.__cause__ is None
    assert found.__context__ is not None and found.__context__.__traceback__ is None


def test_what_was_kept_of_others_gives_way(model: Model) -> None:
    """A lone request without memory is tried once more if earlier contexts took some of it; what was sent is not sent twice."""
    tries: list[str] = []

    def ask_batch(requests: Sequence[AskRequest], *, on_token: Any, on_answer: Any, visitors: Any, contexts: Any) -> list[TextResult]:
        [request] = requests
        tries.append(request.question)
        kept = contexts._questions.kept
        if (request.question == "long" and "short" not in kept) or request.question == "short":
            result = TextResult(request.question, 1, 1, {"decode": 0.1})
            kept[request.question] = None
            on_answer(0, result)
            return [result]
        kept[request.question] = None
        if request.question == "told":
            on_token(0, ord("x"))
        raise torch.OutOfMemoryError("no memory")

    model.ask_batch = ask_batch  # type: ignore[assignment, method-assign]

    async def main() -> None:
        engine, found = engine_of(model), list[Any]()
        for question, stream in (("short", False), ("long", False), ("never", False), ("told", True)):
            job = Job([AskRequest(question)], stream=stream)
            engine.submit(job)
            found.append((await ends(job))[-1] if not stream else [await job.events.get(), await job.events.get()][-1])
        engine.close()
        assert [type(event) for event in found] == [Done, Done, Failed, Failed]

    run(main)
    assert tries == ["short", "long", "long", "never", "never", "told"]
