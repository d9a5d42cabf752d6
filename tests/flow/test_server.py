"""The server end to end on the tiny random model: the official client, in process and over a real socket; nothing faked."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from server_world import KEY, png, wait_for

from hyperbagel.data.images import read_settings
from hyperbagel.pipeline import HyperBagel, ImageRequest
from hyperbagel.serve.app import create_app
from hyperbagel.serve.incoming import Incoming
from hyperbagel.serve.outgoing import image_usage
from hyperbagel.serve.schemas import ApiError, ChatBody, GenerationBody, Limits


@pytest.fixture(scope="module")
def address(model: HyperBagel, serving: Callable[[Any], AbstractContextManager[str]]) -> Iterator[tuple[str, Any]]:
    """The same server on a loopback socket: (address, app)."""
    app = create_app(model, api_key=KEY, limits=Limits(waiting=12, steps=10_000))
    with serving(app) as address:
        yield f"{address}/v1", app
    assert not any(t.is_alive() for t in app.state.engine._threads), "the engine's threads end with the server"


@pytest.fixture(scope="module")
def remote(address: tuple[str, Any]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key=KEY, base_url=address[0], max_retries=0, timeout=30) as client:
        yield client


def pixels(b64: str | None) -> np.ndarray:
    assert b64 is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))).convert("RGB")).astype(int)


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def close_to(a: np.ndarray, b: Image.Image) -> bool:
    """Equal up to the rounding of sums that batches order differently."""
    return a.shape == np.asarray(b).shape and int(np.abs(a - np.asarray(b).astype(int)).max()) <= 1


# -- pictures ----------------------------------------------------------------------------------------------------------------------


def test_a_picture_is_the_library_s(client: openai.OpenAI, model: HyperBagel, tmp_path: Path) -> None:
    extra = {"seed": 5, "steps": 2, "text_scale": 3.0, "interval": [0.2, 1.0]}
    answer = client.images.generate(model="tiny", prompt="a red car", n=2, size="48x32", quality="high", extra_body=extra)
    expected = model.generate("a red car", n=2, size=(32, 48), seed=5, steps=2, text_scale=3.0, interval=(0.2, 1.0))
    assert answer.data is not None and answer.usage is not None and answer.size == "48x32"
    for item, result in zip(answer.data, expected, strict=True):
        assert np.array_equal(pixels(item.b64_json), np.asarray(result.image))
    assert [item.seed for item in answer.data] == [5, 6]  # type: ignore[attr-defined]
    assert answer.usage.output_tokens == 2 * 3 * 2
    (tmp_path / "a.png").write_bytes(base64.b64decode(answer.data[0].b64_json or ""))
    assert read_settings(tmp_path / "a.png") == json.loads(json.dumps(expected[0].settings))


def test_a_picture_as_a_stream(client: openai.OpenAI, model: HyperBagel) -> None:
    extra = {"seed": 1, "steps": 8}
    events = list(client.images.generate(prompt="a red car", stream=True, partial_images=3, extra_body=extra))
    assert [e.type for e in events] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [e.partial_image_index for e in events[:-1]] == [0, 1, 2]  # type: ignore[union-attr]
    final = model.generate("a red car", seed=1, steps=8)[0].image
    assert np.array_equal(pixels(events[-1].b64_json), np.asarray(final))
    errors = [np.abs(pixels(e.b64_json) - np.asarray(final).astype(int)).mean() for e in events]
    assert errors[3] == 0 < errors[2] < errors[0], "previews come closer to the picture"


def test_students_are_chosen_per_request(client: openai.OpenAI, model: HyperBagel) -> None:
    assert client.models.retrieve("tiny").students == ["6"]  # type: ignore[attr-defined]
    own, student = (
        list(client.images.generate(prompt="a red car", stream=True, partial_images=2, extra_body={"seed": 1, "student": s, "steps": n}))
        for s, n in (("none", 3), ("6", None))
    )
    assert [event.nfe for event in (own[-1], student[-1])] == [6, 6]  # type: ignore[union-attr]
    assert np.array_equal(pixels(own[-1].b64_json), np.asarray(model.generate("a red car", seed=1, steps=3)[0].image))
    assert np.array_equal(pixels(student[-1].b64_json), np.asarray(model.generate("a red car", seed=1, student="6")[0].image))
    assert len(student) == 3 and not np.array_equal(pixels(own[-1].b64_json), pixels(student[-1].b64_json))


def test_edits_of_one_and_several_pictures(client: openai.OpenAI, model: HyperBagel) -> None:
    extra = {"seed": 0, "steps": 2, "interval": [0.0, 1.0]}
    red, blue = png("red", 150), png("blue")  # one is shrunk first
    pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in (red, blue)]
    answer = client.images.edit(image=io.BytesIO(red), prompt="make it green", extra_body=extra)
    assert np.array_equal(pixels(answer.data[0].b64_json), np.asarray(model.edit(pictures[0], "make it green", seed=0, steps=2)[0].image))
    answer = client.images.edit(image=[red, blue], prompt="side by side", output_format="jpeg", response_format="url", extra_body=extra)
    assert answer.data is not None and (answer.data[0].url or "").startswith("data:image/jpeg;base64,/9j/")
    events = list(client.images.edit(image=[red, blue], prompt="side by side", stream=True, partial_images=1, extra_body=extra))
    assert [e.type for e in events] == ["image_edit.partial_image", "image_edit.completed"]
    assert np.array_equal(pixels(events[-1].b64_json), np.asarray(model.edit(pictures, "side by side", seed=0, steps=2)[0].image))


def test_a_mask_keeps_what_is_not_transparent(client: openai.OpenAI, model: HyperBagel) -> None:
    red = Image.new("RGB", (150, 150), "red")  # the result is of 32 x 32
    mask = Image.new("RGBA", (150, 150), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (75, 0, 150, 150))
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    extra = {"seed": 0, "steps": 2}
    [item] = client.images.edit(image=png("red", 150), mask=buffer.getvalue(), prompt="make it green", extra_body=extra).data or ()
    kept, drawn = pixels(item.b64_json)[:, :16], pixels(item.b64_json)[:, 16:]
    assert (kept == (255, 0, 0)).all() and (drawn != (255, 0, 0)).any(-1).mean() > 0.9
    small = red.resize((32, 32))
    white = Image.new("L", (32, 32), 0)
    white.paste(255, (16, 0, 32, 32))
    assert np.array_equal(pixels(item.b64_json), np.asarray(model.edit(small, "make it green", seed=0, steps=2, mask=white)[0].image))


def test_what_a_mask_keeps_is_sharp_at_any_size(client: openai.OpenAI, model: HyperBagel) -> None:
    """The model looks at 32 x 32 pixels of this picture; what is kept is its own 150 x 150 at the size that was asked for."""
    source = Image.fromarray(np.random.default_rng(0).integers(0, 256, (150, 150, 3), dtype=np.uint8))
    mask = Image.new("L", (150, 150))
    mask.paste(255, (75, 0, 150, 150))
    files = []
    for picture in (source, mask):
        picture.save(buffer := io.BytesIO(), "PNG")
        files.append(buffer.getvalue())
    size: Any = "64x48"
    answer = client.images.edit(image=files[0], mask=files[1], prompt="make it green", size=size, extra_body={"seed": 0, "student": "6"})
    assert answer.data is not None
    found = pixels(answer.data[0].b64_json)
    expected = model.edit(source, "make it green", seed=0, student="6", mask=mask, size=(48, 64))[0].image
    assert np.array_equal(found, np.asarray(expected)), "the library's"
    assert np.array_equal(found[:, :32], np.asarray(source.resize((64, 48), Image.Resampling.BICUBIC))[:, :32])


def test_a_stream_may_tell_of_every_step(client: openai.OpenAI) -> None:
    extra = {"seed": 1, "steps": 4, "progress": True}
    events = list(client.images.generate(prompt="a red car", stream=True, partial_images=1, extra_body=extra))
    told = [(e.type.partition(".")[2], getattr(e, "step", None)) for e in events]
    assert told == [("progress", 1), ("progress", 2), ("partial_image", None), ("progress", 3), ("progress", 4), ("completed", None)]


def test_a_chat_that_is_answered_with_a_picture(client: openai.OpenAI, model: HyperBagel) -> None:
    def ask(messages: list[Any], **more: Any) -> Any:
        extra = {"seed": 3, "steps": 2}
        return client.chat.completions.create(model="tiny", messages=messages, modalities=["text", "image"], extra_body=extra, **more)  # type: ignore[call-overload]

    first = ask([{"role": "user", "content": "a red car"}]).choices[0].message
    url = first.images[0]["image_url"]["url"]
    drawn = model.generate("a red car", seed=3, steps=2)[0].image
    assert first.content == "" and np.array_equal(pixels(url.partition(",")[2]), np.asarray(drawn))
    conversation = [{"role": "user", "content": "a red car"}, first.model_dump(), {"role": "user", "content": "make it blue"}]
    chunks = list(ask(conversation, stream=True))
    [url] = [c.choices[0].delta.images[0]["image_url"]["url"] for c in chunks if getattr(c.choices[0].delta, "images", None)]
    edited = model.edit(drawn, "make it blue", seed=3, steps=2)[0].image
    assert np.array_equal(pixels(url.partition(",")[2]), np.asarray(edited)), "the picture drawn before is edited"
    assert chunks[-1].choices[0].finish_reason == "stop"


# -- text --------------------------------------------------------------------------------------------------------------------------


def test_an_answer_is_the_library_s_streamed_or_not(client: openai.OpenAI, model: HyperBagel) -> None:
    parts: list[Any] = [{"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": {"url": data_url(png("red"))}}]
    messages: list[Any] = [{"role": "user", "content": parts}]
    expected = model.ask("what is it?", Image.new("RGB", (32, 32), "red"), max_tokens=12)
    whole = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12)
    assert whole.choices[0].message.content == expected.text and whole.choices[0].finish_reason == expected.finish_reason
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (expected.prompt_tokens, expected.tokens)
    options: Any = {"include_usage": True}
    chunks = list(client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, stream=True, stream_options=options))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected.text
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == expected.finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == expected.tokens


def test_a_drafter_changes_the_speed_alone(client: openai.OpenAI, model: HyperBagel) -> None:
    messages: list[Any] = [{"role": "user", "content": "one two one two one two"}]
    assert "lookup" in client.models.retrieve("tiny").drafters  # type: ignore[attr-defined]
    plain, drafted = (
        client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, extra_body={"drafter": d})
        for d in ("none", "lookup")
    )
    assert plain.choices[0].message.content == drafted.choices[0].message.content
    assert plain.choices[0].tau is None and drafted.choices[0].tau >= 1  # type: ignore[attr-defined]
    last = list(
        client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, stream=True, extra_body={"drafter": "lookup"})
    )
    facts: Any = last[-1].choices[0]
    assert facts.tau >= 1 and facts.tokens == 12 and facts.timings["decode"] > 0  # how often it drafts hangs on what the first one taught


def test_a_conversation_and_several_answers(client: openai.OpenAI, model: HyperBagel) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "and now?"},
    ]
    answer = client.chat.completions.create(
        model="tiny", messages=messages, n=2, temperature=2.0, seed=7, max_completion_tokens=5, extra_body={"think": True}
    )
    for i, choice in enumerate(answer.choices):
        turns = (("Be brief.\nhello", "hi"),)
        expected = model.ask("and now?", turns=turns, seed=7 + i, temperature=2.0, max_tokens=5, think=True)
        assert (choice.message.content, choice.index) == (expected.text, i)


# -- about the server --------------------------------------------------------------------------------------------------------------


def test_the_longest_answer_is_the_limit_s_or_the_context_s(model: HyperBagel) -> None:
    context = model.parts.model.config.llm.max_position_embeddings
    for limit, told in ((7, 7), (context + 1, context)):
        http = TestClient(create_app(model, limits=Limits(max_tokens=limit)))
        assert http.get("/v1/models").json()["data"][0]["limits"]["max_tokens"] == told


def test_models_health_version_metrics_and_schema(client: openai.OpenAI, app: Any) -> None:
    assert [m.id for m in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")
    http = TestClient(app, headers={"authorization": f"Bearer {KEY}"})
    assert http.get("/health").json() == {"status": "ok"} and TestClient(app).get("/health").status_code == 200
    assert [http.head(path).status_code for path in ("/", "/health")] == [200, 200] and not http.head("/health").content
    assert http.get("/version").json()["version"]
    client.images.generate(prompt="a red car", extra_body={"steps": 1})
    text = http.get("/metrics").text
    assert 'hyperbagel_results_total{kind="image",outcome="done"}' in text and "hyperbagel_waiting 0" in text
    schema = http.get("/openapi.json").json()
    knobs = {"seed", "think", "student", "steps", "text_scale", "image_scale", "interval", "renorm", "renorm_min", "shift", "drafter"}
    form = schema["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    for fields in (form, *(schema["components"]["schemas"][name] for name in ("GenerationBody", "ChatBody"))):
        assert knobs <= set(fields["properties"])


# -- many clients, over a socket -----------------------------------------------------------------------------------------------------


def test_results_of_many_clients_never_mix(remote: openai.OpenAI, address: tuple[str, Any], model: HyperBagel) -> None:
    """Pictures of several sizes and settings and answers, all at once: batches form, and each client gets what the library gives alone."""
    prompts = [f"{colour} {thing}" for colour in ("red", "blue") for thing in ("car", "dog", "tree")]

    async def main() -> tuple[list[Any], list[Any]]:
        async with openai.AsyncOpenAI(api_key=KEY, base_url=address[0], max_retries=20, timeout=30) as client:
            images = [
                client.images.generate(prompt=p, size=("32x32", "48x32")[i % 2], extra_body={"seed": i, "steps": 2 + i // 4})  # type: ignore[call-overload]
                for i, p in enumerate(prompts)
            ]
            answers = [
                client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": p}], max_tokens=6) for p in prompts[:3]
            ]
            both = await asyncio.gather(*images, *answers)
            return both[: len(images)], both[len(images) :]

    images, answers = asyncio.run(main())
    for i, (prompt, answer) in enumerate(zip(prompts, images, strict=True)):
        expected = model.generate(prompt, seed=i, steps=2 + i // 4, size=((32, 32), (32, 48))[i % 2])[0]
        assert close_to(pixels(answer.data[0].b64_json), expected.image), prompt
    for prompt, answer in zip(prompts, answers):
        assert answer.choices[0].message.content == model.ask(prompt, max_tokens=6).text


def test_those_that_wait_together_are_one_batch(remote: openai.OpenAI, address: tuple[str, Any], model: HyperBagel) -> None:
    metrics = address[1].state.metrics
    with ThreadPoolExecutor(5) as pool:
        first = pool.submit(remote.images.generate, prompt="first", extra_body={"seed": 0, "steps": 150})
        wait_for(lambda: metrics.get("hyperbagel_running") == 1)
        before = metrics.get("hyperbagel_batch_size_count")
        others = [pool.submit(remote.images.generate, prompt=f"car {i}", extra_body={"seed": i, "steps": 3}) for i in range(4)]
        wait_for(lambda: metrics.get("hyperbagel_waiting") == 4)
        answers = [other.result() for other in others]
        first.result()
    assert metrics.get("hyperbagel_batch_size_count") - before == 2, "the first alone, then four at once"
    for i, answer in enumerate(answers):
        assert answer.data is not None
        assert close_to(pixels(answer.data[0].b64_json), model.generate(f"car {i}", seed=i, steps=3)[0].image)


def test_a_client_that_goes_away_stops_its_work(remote: openai.OpenAI, address: tuple[str, Any]) -> None:
    """100,000 steps would take many minutes: they end at the next step, for a stream and for a plain request."""
    metrics = address[1].state.metrics

    def cancelled() -> float:
        return metrics.get("hyperbagel_results_total", kind="image", outcome="cancelled")

    before = cancelled()
    with pytest.raises(openai.APITimeoutError):
        remote.with_options(timeout=0.5).images.generate(prompt="x", extra_body={"steps": 10_000})
    wait_for(lambda: cancelled() == before + 1 and metrics.get("hyperbagel_running") == 0)
    stream = remote.images.generate(prompt="x", stream=True, partial_images=3, extra_body={"steps": 10_000})
    assert metrics.get("hyperbagel_running") == 1, "the stream begins with the work, long before its first picture"
    stream.close()
    wait_for(lambda: cancelled() == before + 2 and metrics.get("hyperbagel_running") == 0)


def test_a_plan_is_cancelled_as_well(remote: openai.OpenAI, address: tuple[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its first denoising step: the plan here would take minutes, and ends at its next token."""
    metrics, decoded = address[1].state.metrics, []

    def endless(sessions: Any, *, on_token: Callable[[int, int], None], **how: Any) -> Any:
        for token in range(100_000):
            decoded.append(token)
            time.sleep(0.002)
            on_token(0, token)

    monkeypatch.setattr("hyperbagel.speculative.thinking.decode", endless)
    before = metrics.get("hyperbagel_results_total", kind="image", outcome="cancelled")
    with pytest.raises(openai.APITimeoutError):
        remote.with_options(timeout=0.3).images.generate(prompt="x", extra_body={"think": True})
    wait_for(lambda: metrics.get("hyperbagel_results_total", kind="image", outcome="cancelled") == before + 1)
    stream = remote.images.generate(prompt="x", stream=True, extra_body={"think": True})
    assert metrics.get("hyperbagel_running") == 1, "the stream begins with the plan"
    stream.close()
    wait_for(lambda: metrics.get("hyperbagel_running") == 0)
    assert 0 < len(decoded) < 5000


def test_a_full_queue_says_when_to_come_back(remote: openai.OpenAI, address: tuple[str, Any]) -> None:
    metrics = address[1].state.metrics
    with ThreadPoolExecutor(14) as pool:
        blocker = pool.submit(remote.images.generate, prompt="first", extra_body={"steps": 300})
        wait_for(lambda: metrics.get("hyperbagel_running") == 1)
        waiting = [pool.submit(remote.images.generate, prompt="x", extra_body={"steps": 1}) for _ in range(12)]
        wait_for(lambda: metrics.get("hyperbagel_waiting") == 12)
        with pytest.raises(openai.RateLimitError) as caught:
            remote.images.generate(prompt="x", extra_body={"steps": 1})
        assert int(caught.value.response.headers["retry-after"]) >= 1 and caught.value.code == "queue_full"
        for one in (blocker, *waiting):
            assert one.result().data


def test_tokens_of_an_edit_are_those_of_its_context(model: HyperBagel) -> None:
    request = ImageRequest("make it green", (Image.new("RGB", (40, 30)), Image.new("RGB", (32, 16))), steps=1)
    [result] = model.generate_batch([request])
    usage, session = image_usage(model, [request], [result]), model._prepare(request).session
    details = usage["input_tokens_details"]
    assert usage["input_tokens"] == details["text_tokens"] + details["image_tokens"] == session.cache.lengths[0]
    assert details["text_tokens"] == len(session.texts[0])
    assert usage["output_tokens"] == (result.image.width // 16) * (result.image.height // 16)


def test_messages_of_one_speaker_in_a_row_are_one_turn(model: HyperBagel) -> None:
    said = [("user", "a"), ("assistant", "b"), ("assistant", "c"), ("user", "d"), ("user", "e")]
    body = ChatBody.model_validate({"messages": [{"role": role, "content": text} for role, text in said]})
    [request] = Incoming(model, ("tiny",), Limits()).questions(body)
    assert (request.turns, request.question) == ((("a", "b\nc"),), "d\ne")


def test_a_chat_edits_the_last_picture_of_several(model: HyperBagel) -> None:
    def shown(colour: str) -> dict[str, Any]:
        return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url(png(colour))}}]}

    body = ChatBody.model_validate({"messages": [shown("red"), shown("blue"), {"role": "user", "content": "make it green"}]})
    [request] = Incoming(model, ("tiny",), Limits()).chat_pictures(body)
    picture, text = request.items()
    assert isinstance(picture, Image.Image) and picture.getpixel((0, 0)) == (0, 0, 255) and text == "make it green"


def test_a_chat_may_draw_more_pictures_than_it_reads(model: HyperBagel, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {"role": "assistant", "content": "", "images": [{"image_url": {"url": data_url(png("red"))}}] * 2}
    asked = {"role": "user", "content": "make it green"}
    incoming, read = Incoming(model, ("tiny",), Limits(images=1)), list[bytes]()
    monkeypatch.setattr(incoming, "picture", lambda data, name: read.append(data) or Image.new("RGB", (32, 32)))
    [request] = incoming.chat_pictures(ChatBody.model_validate({"messages": [asked, *[drawn, asked] * 20]}))
    assert [type(item) for item in request.items()] == [Image.Image, str] and read == [png("red")]


def test_a_plan_is_no_longer_than_an_answer_may_be(model: HyperBagel) -> None:
    incoming = Incoming(model, ("tiny",), Limits(max_tokens=7))
    for asked, given in ((None, 7), (3, 3)):
        body = GenerationBody(prompt="x", think=True, max_think_tokens=asked)
        assert incoming.drawing(body)[0].max_think_tokens == given
    with pytest.raises(ApiError, match="expected at most 7"):
        incoming.drawing(GenerationBody(prompt="x", max_think_tokens=8))


def test_a_plan_is_drawn_at_the_temperature_that_was_asked_for(client: openai.OpenAI, app: Any, model: HyperBagel) -> None:
    http = TestClient(app, headers={"authorization": f"Bearer {KEY}"})
    asked: dict[str, Any] = {"prompt": "a red car", "seed": 5, "steps": 1, "think": True, "max_think_tokens": 6}
    warmths: list[dict[str, Any]] = [{}, {"think_temperature": 3.0}]
    for warmth in warmths:
        [made] = http.post("/v1/images/generations", json=asked | warmth).json()["data"]
        [same] = model.generate("a red car", seed=5, steps=1, think=True, max_think_tokens=6, **warmth)
        assert made["revised_prompt"] == same.thinking
    assert same.thinking != model.generate("a red car", seed=5, steps=1, think=True, max_think_tokens=6)[0].thinking
    assert http.post("/v1/images/generations", json=asked | {"think_temperature": -1}).status_code == 400
