"""What goes over the wire: thoughts split from answers, previews, forms, errors, counters."""

from __future__ import annotations

import asyncio
import io
import random
import struct
import zlib
from contextlib import aclosing
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import pytest
import torch
from fastapi import Body, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient
from PIL import Image
from pydantic import ValidationError

from hyperbagel.core.errors import InputError
from hyperbagel.data.transforms import ImageTransform
from hyperbagel.flow.schedule import time_grid
from hyperbagel.model.student import Sampler
from hyperbagel.pipeline import ImageRequest, TextResult
from hyperbagel.serve import previews, streams
from hyperbagel.serve.forms import _add, read_edit
from hyperbagel.serve.incoming import Incoming
from hyperbagel.serve.jobs import Done, Job, Progress
from hyperbagel.serve.metrics import Metrics
from hyperbagel.serve.outgoing import ThinkSplitter, chat_message, file_of, sse
from hyperbagel.serve.previews import Previews, due_after
from hyperbagel.serve.realtime import tiers
from hyperbagel.serve.schemas import PROMPT_CHARACTERS, ApiError, ChatBody, EditFields, GenerationBody, Limits
from hyperbagel.serve.streams import as_api_error, collect, follow, usage_of

TEXTS = {
    "<think> a b </think> c d ": ("a b", "c d"),
    "<think>a</think>c": ("a", "c"),
    "\n<think>\n a < b </thin k </think>\n\nc": ("a < b </thin k", "c"),
    "no thought  at all": (None, "no thought  at all"),
    "<thin": (None, "<thin"),
    "<think> cut  off </thi": ("cut  off </thi", ""),
    "<think></think>": (None, ""),
    "": (None, ""),
}


@pytest.mark.parametrize("text", TEXTS)
def test_thoughts_are_split_however_the_text_is_cut(text: str) -> None:
    rng = random.Random(0)
    for _ in range(50):
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(8)))
        splitter = ThinkSplitter(True)
        found: dict[str, str] = {}
        pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)])]
        for name, piece in [p for part in pieces for p in splitter.push(part)] + splitter.finish():
            assert piece
            found[name] = found.get(name, "") + piece
        assert (found.get("reasoning_content"), found.get("content", "")) == TEXTS[text]


def test_without_thinking_tags_are_text() -> None:
    splitter = ThinkSplitter(False)
    assert [*splitter.push(" <think> a"), *splitter.finish()] == [("content", "<think> a")]


def test_a_cut_off_thought_is_a_thought_in_the_whole_answer_too() -> None:
    message = chat_message(TextResult("<think> what", 3, 1, {}), think=True)
    assert message == {"role": "assistant", "content": "", "reasoning_content": "what"}
    assert chat_message(TextResult("b", 3, 1, {}, thinking="a"), think=True)["reasoning_content"] == "a"


@pytest.mark.parametrize(("total", "count", "expected"), [(50, 3, [12, 25, 38]), (50, 0, []), (2, 3, [1]), (1, 3, []), (6, 1, [3])])
def test_previews_are_spread_over_the_steps(total: int, count: int, expected: list[int]) -> None:
    assert due_after(total, count) == expected


def test_a_preview_shows_where_the_latent_is_heading(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a straight path x_t = (1 - t) x0 + t eps every preview is x0 itself, whatever t is."""
    from hyperbagel.flow.schedule import time_grid
    from hyperbagel.serve import previews

    monkeypatch.setattr(previews, "decode_latents", lambda parts, latents, grid: latents)
    watch = Previews.__new__(Previews)
    watch.wanted, watch.before, watch.grids, watch.shift = [3, 0], None, [(2, 3), (2, 2)], 3.0
    watch.model = type("Model", (), {"parts": None})()  # type: ignore[assignment]
    x0, eps = torch.randn(2, 6, 4), torch.randn(2, 6, 4)
    shown = []
    for done, t in enumerate(time_grid(8, 3.0)[1:], start=1):
        shown += list(watch.at(done, 8, (1 - t) * x0 + t * eps))
    assert [(row, number) for row, number, _ in shown] == [(0, 0), (0, 1), (0, 2)]
    for _, _, latents in shown:
        torch.testing.assert_close(latents, x0[0], atol=1e-4, rtol=0)


def test_errors_have_openai_s_form_and_tell_no_secrets() -> None:
    with pytest.raises(ValidationError) as caught:
        GenerationBody.model_validate({"prompt": "x", "text-scale": 1})
    told = as_api_error(caught.value)
    assert told.status == 400 and told.param == "text-scale" and told.code == "unknown_parameter"
    assert as_api_error(RequestValidationError([{"loc": ("body", "n"), "msg": "no", "type": "x", "input": 0}])).param == "n"
    assert as_api_error(InputError("got a, expected b")).body()["error"]["message"] == "got a, expected b"
    inside = as_api_error(RuntimeError("/root/secret"))
    assert inside.status == 500 and "secret" not in str(inside.body()) and inside.headers["x-should-retry"] == "false"
    assert as_api_error(ApiError(418, "x")).status == 418


@pytest.mark.parametrize(
    ("content", "param", "words"),
    [
        ([{"type": "audio", "text": "x"}], "messages.0.content.0.type", "'text' or 'image_url'"),
        (
            [{"type": "image_url", "image_url": "data:"}],
            "messages.0.content.0.image_url",
            "got 'data:', input should be a valid dict",
        ),
        ([{"type": "text", "text": 1}], "messages.0.content.0.text", "got 1, input should be a valid string"),
        (5, "messages.0.content", "got 5, input should be"),
        ("x" * 100_001, "messages.0.content", "at most 100000 characters"),
    ],
)
def test_a_wrong_part_of_a_message_is_named(content: object, param: str, words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ChatBody.model_validate({"messages": [{"role": "user", "content": content}]})
    told = as_api_error(caught.value)
    assert told.param == param and words in str(told) and "str:" not in str(told)


@pytest.mark.parametrize(
    ("headers", "content", "words"),
    [
        ({"content-type": "application/json"}, "{a", "got JSON that cannot be read (Expecting property name"),
        ({}, '{"messages": []}', "got another content type, expected a JSON object with the header Content-Type: application/json"),
        ({"content-type": "application/json"}, "[1]", "got a JSON list, expected a JSON object"),
    ],
)
def test_a_body_that_is_no_json_object(headers: dict[str, str], content: str, words: str) -> None:
    app = FastAPI()
    app.add_exception_handler(RequestValidationError, lambda request, error: JSONResponse(as_api_error(error).body(), 400))

    @app.post("/")
    def read(body: Annotated[ChatBody, Body()]) -> None: ...

    told = TestClient(app).post("/", content=content, headers=headers).json()["error"]
    assert told["message"].startswith(words) and told["param"] is None


def test_a_wrong_mask_is_told_of_as_the_mask() -> None:
    incoming = Incoming(None, ("m",), Limits(image_pixels=9))  # type: ignore[arg-type]  # the model is not asked
    picture = io.BytesIO()
    Image.new("L", (4, 4)).save(picture, "PNG")
    for data in (b"no picture", picture.getvalue()):
        for name, param in (("mask", "mask"), ("image 1", "image")):
            with pytest.raises(ApiError) as caught:
                incoming._check_file(data, name)
            assert caught.value.param == param


def test_a_tiff_is_turned_away_before_it_is_read() -> None:
    """Its tiles, which are unpacked whole, may be far larger than its picture: these 200 bytes would take 2 GB."""
    incoming = Incoming(None, ("m",), Limits())  # type: ignore[arg-type]  # the model is not asked
    tile = zlib.compress(bytes(1000))
    entries = [(256, 4, 64), (257, 4, 64), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1), (322, 4, 46_336), (323, 4, 46_336)]
    entries += [(324, 4, 8), (325, 4, len(tile))]
    data = b"II*\0" + struct.pack("<I", 8 + len(tile)) + tile + struct.pack("<H", len(entries))
    data += b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries) + bytes(4)
    with pytest.raises(ApiError, match="no picture, expected PNG, JPEG, WebP, GIF or BMP"):
        incoming.picture(data, "image 1")


def test_bodies() -> None:
    form = EditFields.model_validate({"prompt": "x", "n": "2", "stream": "true", "interval": ["0.1", "1"], "text_scale": "3"})
    assert (form.n, form.stream, form.interval, form.text_scale) == (2, True, (0.1, 1.0), 3.0)
    for wrong in ({"prompt": "x", "text_scale": float("nan")}, {"prompt": "x", "seed": 2**63}, {"prompt": "x", "partial_images": 4}):
        with pytest.raises(ValidationError):
            GenerationBody.model_validate(wrong)
    with pytest.raises(ValidationError):
        ChatBody.model_validate({"messages": [{"role": "tool", "content": "x"}]})


def test_server_sent_events() -> None:
    assert sse({"a": "b\nc"}, "name") == 'event: name\ndata: {"a": "b\\nc"}\n\n' and sse("[DONE]") == "data: [DONE]\n\n"


def test_metrics_text() -> None:
    metrics = Metrics()
    metrics.add("hyperbagel_requests_total", path="/health", status="200")
    metrics.add("hyperbagel_requests_total", path="/health", status="200")
    metrics.observe("hyperbagel_batch_size", 3)
    metrics.set("hyperbagel_waiting", 2)
    lines = metrics.text().splitlines()
    assert 'hyperbagel_requests_total{path="/health",status="200"} 2' in lines
    assert {"hyperbagel_batch_size_sum 3", "hyperbagel_batch_size_count 1", "hyperbagel_waiting 2"} <= set(lines)
    assert metrics.get("hyperbagel_batch_size_sum") == 3 and metrics.get("hyperbagel_running") == 0


def test_tokens_of_several_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt counts once, what was said or drawn as often as it was."""
    said: list[Any] = [TextResult("a", 3, 7, {}, reused=4), TextResult("b", 5, 7, {}, reused=7)]
    usage = {"prompt_tokens": 7, "completion_tokens": 8, "total_tokens": 15, "prompt_tokens_details": {"cached_tokens": 4}}
    assert usage_of(None, [], said) == usage  # type: ignore[arg-type]
    monkeypatch.setattr(streams, "image_usage", lambda *args: {"input_tokens": 20, "output_tokens": 8})
    assert usage_of(None, [], [None, None])["prompt_tokens"] == 10  # type: ignore[arg-type]


def test_a_reader_that_stops_early_ends_the_job() -> None:
    async def main() -> bool:
        job = Job([ImageRequest("x")], progress=True)
        request: Any = SimpleNamespace(receive=asyncio.Event().wait)
        job.tell(Progress(0, 1, 2))
        async with aclosing(follow(job, request)) as events:
            await anext(events)
        return job.over

    assert asyncio.run(main())


def test_results_come_in_the_order_of_the_request() -> None:
    async def main() -> list[Any] | None:
        job = Job([ImageRequest("x"), ImageRequest("y")])
        for index in (1, 0):
            job.tell(Done(index, index))  # type: ignore[arg-type]
        return await collect(job, SimpleNamespace(receive=asyncio.Event().wait))  # type: ignore[arg-type]

    assert asyncio.run(main()) == [0, 1]


@pytest.mark.parametrize("wanted", [[1, 1], [0, 1]])
def test_previews_are_cut_to_their_own_picture_at_the_requests_own_shift(wanted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(previews, "decode_latents", lambda parts, latents, grid: (latents, grid))
    grids = {"wide": (1, 3), "high": (2, 2)}
    model: Any = SimpleNamespace(grid=lambda r: grids[r.prompt], settings=lambda r, warn: SimpleNamespace(shift=3.0), parts=None)
    watch = Previews(model, [ImageRequest("wide"), ImageRequest("high")], wanted)
    x0, eps = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    shown: list[Any] = []
    for done, t in enumerate(time_grid(4, 3.0)[1:], start=1):
        shown += watch.at(done, 4, (1 - t) * x0 + t * eps)
    assert [(row, number, grid) for row, number, (_, grid) in shown] == [(0, 0, (1, 3)), (1, 0, (2, 2))][-sum(wanted) :]
    for row, _, (latents, (h, w)) in shown:
        torch.testing.assert_close(latents, x0[row, : h * w], atol=1e-4, rtol=0)


@pytest.mark.parametrize("values", [["0.2", "1"], ["0.2,1"], ["[0.2, 1]"]])
def test_lists_in_forms(values: list[str]) -> None:
    fields: dict[str, Any] = {"prompt": "x"}
    for value in values:
        _add(fields, "interval", value)
    assert EditFields.model_validate(fields).interval == (0.2, 1.0)


def test_the_strongest_compression_is_zero_and_the_usual_one_is_not() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    sizes = [len(file_of(image, "jpeg", compression)) for compression in (0, 50, 90, None)]
    assert sizes[0] < sizes[1] < sizes[2] == sizes[3]


def test_tiers_go_by_evaluations_and_not_by_names() -> None:
    students = SimpleNamespace(names=lambda: ["1", "10", "6"], sampler=lambda name: Sampler(nfe=int(name)))
    chosen = tiers(SimpleNamespace(students=students, sampler=None))  # type: ignore[arg-type]
    assert [tier["student"] for tier in chosen.values()] == ["1", "6", "none"]


def test_a_form_may_hold_as_many_pictures_as_the_limit_says_and_a_mask() -> None:
    app = FastAPI()

    @app.post("/")
    async def read(request: Request) -> int:
        return len((await read_edit(request, Limits(images=2)))[1])

    client, picture = TestClient(app), ("image[]", ("a.png", b"x"))
    assert client.post("/", data={"prompt": "x"}, files=[picture, picture, ("mask", ("m.png", b"x"))]).json() == 2
    with pytest.raises(ApiError, match="got 3 pictures, expected at most 2"):
        client.post("/", data={"prompt": "x"}, files=[*[picture] * 3, ("mask", ("m.png", b"x"))])


def test_without_students_a_merged_one_draws_in_its_usual_steps() -> None:
    model = SimpleNamespace(students=SimpleNamespace(names=lambda: []), sampler=Sampler(nfe=6))
    assert [tier["steps"] for tier in tiers(model).values()] == [None] * 3  # type: ignore[arg-type]


def test_counters_are_told_to_the_last_digit() -> None:
    metrics = Metrics()
    metrics.add("hyperbagel_tokens_total", 123_456_789)
    assert "hyperbagel_tokens_total 123456789" in metrics.text().splitlines()


def test_a_picture_that_would_be_shrunk_twice_is_left_alone() -> None:
    rule = ImageTransform(1024, 512, 16, 2**18)
    incoming = Incoming(SimpleNamespace(parts=SimpleNamespace(vae_transform=rule)), ("m",), Limits())  # type: ignore[arg-type]
    for size, kept in (((556, 525), (556, 525)), ((512, 1024), rule.size(512, 1024))):
        buffer = io.BytesIO()
        Image.new("RGB", size).save(buffer, "PNG")
        assert incoming.picture(buffer.getvalue(), "image 1").size == kept


def test_a_form_may_hold_as_long_a_prompt_as_a_body() -> None:
    app = FastAPI()

    @app.post("/")
    async def read(request: Request) -> int:
        return len((await read_edit(request, Limits()))[0].prompt)

    answer = TestClient(app).post("/", data={"prompt": "\u732b" * PROMPT_CHARACTERS}, files={"image": ("a.png", b"x")})
    assert answer.json() == PROMPT_CHARACTERS


def test_a_job_that_is_done_is_watched_no_more() -> None:
    async def main() -> set[Any]:
        job = Job([ImageRequest("x")])
        job.tell(Done(0, 0))  # type: ignore[arg-type]
        await collect(job, SimpleNamespace(receive=asyncio.Event().wait))  # type: ignore[arg-type]
        _, waiting = await asyncio.wait(asyncio.all_tasks() - {asyncio.current_task()}, timeout=1)  # type: ignore[type-var]
        return waiting

    assert asyncio.run(main()) == set()


def test_an_error_can_be_sent_whatever_it_quotes() -> None:
    error = ApiError(400, "got \ud800", param="\ud800").body()["error"]
    assert (error["message"], error["param"]) == ("got ?", "?")
