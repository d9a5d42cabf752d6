"""A stand-in for the model that does as the pipeline promises and can be held or made to fail; what tests of the engine do with it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from hyperbagel.core.errors import InputError
from hyperbagel.pipeline import AskRequest, ImageRequest, ImageResult, TextResult
from hyperbagel.serve.jobs import Done, Job
from hyperbagel.serve.metrics import Metrics
from hyperbagel.serve.worker import Engine


class Model:
    """Pictures say in `thinking` whose they are. `hold` stops the work at each step; prompts "bad" and "broken" fail."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.hold = threading.Event()
        self.hold.set()
        self.inside = threading.Event()
        self.steps = 0
        tokenizer = SimpleNamespace(stream=lambda: SimpleNamespace(push=chr, finish=lambda: ""))
        same = SimpleNamespace(size=lambda width, height: (width, height))
        self.between: Callable[[int], None] | None = None  # called behind each token of answers
        self.at_work: list[int] = []  # answers, by token
        self.parts = SimpleNamespace(tokenizer=tokenizer, model=SimpleNamespace(device=torch.device("cpu")), vae_transform=same)
        self.forget_graphs: Any = lambda: None
        self.default_size = (64, 64)

    def grid(self, request: ImageRequest) -> tuple[int, int]:
        height, width = request.size or self.default_size
        return height // 32, width // 32

    def generate_batch(
        self, requests: Sequence[ImageRequest], on_step: Callable[[int, int, Any], None], on_token: Callable[[int, int], None], **more: Any
    ) -> list[ImageResult]:
        prompts = [request.prompt for request in requests]
        self.batches.append(prompts)
        if "bad" in prompts:
            raise InputError("got a bad prompt")
        if "broken" in prompts:
            raise RuntimeError("secret inside")
        for step in range(1000):
            self.inside.set()
            self.hold.wait(10)
            self.steps = step + 1
            on_step(step + 1, 1000, None)
        return [ImageResult(Image.new("RGB", (1, 1)), r.seed, 1, {"denoise": 0.1}, r.prompt) for r in requests]

    def ask_batch(
        self,
        requests: Sequence[AskRequest],
        on_token: Callable[[int, int], None],
        on_answer: Callable[[int, TextResult], None],
        visitors: Any,
        contexts: Any = None,
    ) -> list[TextResult]:
        """Answers with the question's first three letters, a letter a step. "!" is where it breaks; a "?" is refused when it joins, and
        for "big" there is no room then."""
        said: list[tuple[str, int]] = []  # and the step at which each begins
        results: list[TextResult] = []

        def begin(request: AskRequest, step: int) -> None:
            text = request.question[:3]
            said.append((text, step))
            results.append(TextResult(text, len(text), 1, {"decode": 0.1 * len(text)}))

        for request in requests:
            begin(request, 0)
        self.batches.append([request.question for request in requests])
        step = 0
        while step < max(first + 3 for _, first in said):
            self.inside.set()
            self.hold.wait(10)
            alive = sum(first + len(text) > step for text, first in said)
            while visitors is not None and step and alive and (request := visitors.next(alive)) is not None:
                if request.question == "?":
                    visitors.refuse(InputError("got a question that is too long"))
                    continue
                if request.question == "big":
                    visitors.refuse(MemoryError("no room beside others"))
                    break
                self.batches[-1].append(request.question)
                begin(request, step)
                alive += 1
            self.steps = step + 1
            self.at_work.append(sum(0 <= step - first < len(text) for text, first in said))
            for row, (text, first) in enumerate(said):
                if text[step - first : step - first + 1] == "!" and step >= first:
                    raise RuntimeError("secret inside")
                if 0 <= step - first < len(text):
                    on_token(row, ord(text[step - first]))
                if step - first + 1 == len(text):
                    on_answer(row, results[row])
            if self.between is not None:
                self.between(step)
            step += 1
        return results


def engine_of(*models: Model, waiting: int = 10, batch: int = 4) -> Engine:
    return Engine(models, waiting=waiting, batch=batch, metrics=Metrics())  # type: ignore[arg-type]


def jobs(*prompts: str, **settings: Any) -> list[Job]:
    return [Job([ImageRequest(prompt, **settings)]) for prompt in prompts]


async def keep_busy(engine: Engine, model: Model, job: Job) -> None:
    """Submits a job and waits until it is being worked on, where it stays until `model.hold` is set."""
    model.hold.clear()
    model.inside.clear()
    engine.submit(job)
    await asyncio.to_thread(model.inside.wait, 10)


async def submit_together(engine: Engine, model: Model, others: Sequence[Job]) -> Job:
    """Submits them while the engine is busy with a job of its own, which is given back: so all of them wait when it next takes some."""
    [first] = jobs("first")
    await keep_busy(engine, model, first)
    for job in others:
        engine.submit(job)
    model.hold.set()
    return first


async def ends(job: Job) -> list[Any]:
    """The events of a job of pictures, up to its end."""
    events = [await asyncio.wait_for(job.events.get(), 10)]
    while isinstance(events[-1], Done) and len(events) < len(job.units):
        events.append(await asyncio.wait_for(job.events.get(), 10))
    return events


def run(main: Callable[[], Any]) -> Any:
    return asyncio.run(main())
