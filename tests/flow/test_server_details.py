"""Details of the server that nothing else tells: health, keys, counters, how streams end."""

from __future__ import annotations

import asyncio
import io
import threading
from base64 import b64encode
from typing import Any

import pytest
import torch
from fastapi import WebSocketDisconnect
from fastapi.testclient import TestClient
from PIL import Image
from server_world import KEY, png, wait_for

from hyperbagel.core.errors import InputError
from hyperbagel.export import export_lora
from hyperbagel.pipeline import AskRequest, HyperBagel, ImageRequest, TextResult
from hyperbagel.serve import realtime, worker
from hyperbagel.serve.app import create_app
from hyperbagel.serve.incoming import Incoming, data_url
from hyperbagel.serve.jobs import Failed, Job, Started, Text
from hyperbagel.serve.outgoing import image_usage
from hyperbagel.serve.run import make_server
from hyperbagel.serve.schemas import ApiError, ChatBody, GenerationBody, Limits
from hyperbagel.serve.streams import chat_events, image_events
from hyperbagel.serve.worker import device_works


def test_health_tells_of_a_broken_device_and_of_the_end(model: HyperBagel) -> None:
    app = create_app(model)
    http = TestClient(app)
    app.state.engine._broken = True
    assert http.get("/health").status_code == 503 and http.get("/health").json()["error"]["code"] == "device_failed"
    app.state.engine._broken = False
    app.state.engine.close()
    assert http.get("/health").status_code == 503 and http.get("/health").json()["error"]["code"] == "shutting_down"


def test_the_newer_name_of_the_longest_answer_goes_first(model: HyperBagel) -> None:
    body = ChatBody.model_validate({"messages": [{"role": "user", "content": "x"}], "max_tokens": 9, "max_completion_tokens": 3})
    assert Incoming(model, ("tiny",), Limits()).questions(body)[0].max_tokens == 3


def test_an_answer_may_be_as_long_as_limit_and_context_leave_it(model: HyperBagel, monkeypatch: pytest.MonkeyPatch) -> None:
    config, url = model.parts.model.config.llm.__dict__, "data:image/png;base64," + b64encode(png("red")).decode()
    shown: list[Any] = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is it?"}]

    def longest(limit: int, **more: Any) -> AskRequest:
        said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}, {"role": "user", "content": shown}]
        [request] = Incoming(model, ("tiny",), Limits(max_tokens=limit)).questions(ChatBody.model_validate({"messages": said, **more}))
        return request

    monkeypatch.setitem(config, "max_position_embeddings", 4096)
    assert [longest(limit, think=think).max_tokens for limit in (4096, 7) for think in (False, True)] == [1024, 1024, 7, 7]
    assert longest(4096, max_tokens=2000).max_tokens == 2000
    for think in (False, True):
        context = model._context(longest(4096, think=think)).tokens
        for left, told in ((65, 64), (64, 32), (3, 2), (2, 1), (0, 1)):  # one for im_start
            monkeypatch.setitem(config, "max_position_embeddings", context + left)
            assert longest(4096, think=think).max_tokens == told
        monkeypatch.setitem(config, "max_position_embeddings", 4096)


def test_pictures_without_words_are_described(model: HyperBagel) -> None:
    url = "data:image/png;base64," + b64encode(png("red")).decode()
    shown = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
    before = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    system = [{"role": "system", "content": "Be brief."}]
    for messages, told in (
        ([shown], "Describe the picture."),
        ([*before, shown], "Describe the picture."),
        ([*system, shown], "Be brief.\nDescribe the picture."),
        ([*before[:1], shown], "hello"),
    ):
        [request] = Incoming(model, ("tiny",), Limits()).questions(ChatBody.model_validate({"messages": messages}))
        assert (request.question, len(request.images)) == (told, 1)
    later = ChatBody.model_validate({"messages": [shown, before[1], {"role": "user", "content": "why?"}]})
    [request] = Incoming(model, ("tiny",), Limits()).questions(later)
    assert (request.turns, request.question) == ((("Describe the picture.", "hi"),), "why?")
    for content in ("", [{"type": "text", "text": " "}]):
        nothing = ChatBody.model_validate({"messages": [shown, before[1], {"role": "user", "content": content}]})
        with pytest.raises(ApiError, match="empty question"):
            Incoming(model, ("tiny",), Limits()).questions(nothing)


def test_a_system_s_text_stands_before_a_picture_s_prompt(model: HyperBagel) -> None:
    said = [("system", "in crayon"), ("user", "a car")]
    body = ChatBody.model_validate({"messages": [{"role": role, "content": text} for role, text in said]})
    assert list(Incoming(model, ("tiny",), Limits()).chat_pictures(body)[0].items()) == ["in crayon", "a car"]


def test_a_device_without_memory_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **more: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(worker.torch, "ones", full)
    assert device_works(torch.device("cpu"))


def test_a_stream_ends_with_what_its_last_token_left_open(model: HyperBagel, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that max_tokens cut inside a character: streamed and whole are one text."""
    tokenizer = model.parts.tokenizer
    half = tokenizer.encode("\u00e9")[0] if len(tokenizer.encode("\u00e9")) > 1 else None

    def ask_batch(requests: Any, *, on_token: Any, on_answer: Any, visitors: Any, contexts: Any) -> Any:
        on_token(0, half)
        result = TextResult(tokenizer.decode([half]), 1, 1, {"decode": 0.1})
        on_answer(0, result)
        return [result]

    assert half is not None
    monkeypatch.setattr(model, "ask_batch", ask_batch)
    with TestClient(create_app(model)) as http:
        asked = {"messages": [{"role": "user", "content": "x"}]}
        whole = http.post("/v1/chat/completions", json=asked).json()["choices"][0]["message"]["content"]
        told = http.post("/v1/chat/completions", json=asked | {"stream": True}).text
    assert whole == "\ufffd" and "\\ufffd" in told


def test_tokens_and_stages_are_counted(model: HyperBagel) -> None:
    app = create_app(model)
    with TestClient(app) as http:
        usage = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}], "max_tokens": 3}).json()["usage"]
        metrics = app.state.metrics
        assert metrics.get("hyperbagel_tokens_total") == usage["completion_tokens"] > 0
        wait_for(lambda: metrics.get("hyperbagel_stage_seconds_count", stage="decode") == 1)  # once the batch ends, after its answers
        assert metrics.get("hyperbagel_stage_seconds_sum", stage="decode") > 0


async def _events(*events: Any) -> Any:
    for event in events:
        yield event


def test_a_stream_that_fails_says_so_and_does_not_say_that_it_is_done() -> None:

    async def main() -> tuple[list[str], list[str]]:
        failed = Failed(InputError("got a, expected b"))
        drawing, asking = Job([ImageRequest("x")], stream=True), Job([AskRequest("x")], stream=True)
        draw = image_events(drawing, None, GenerationBody(prompt="x"), [], "image_generation")
        chat = chat_events(asking, None, ChatBody.model_validate({"messages": [{"role": "user", "content": "x"}]}), "tiny")
        return [x async for x in draw(_events(Started(), failed))], [x async for x in chat(_events(Text(0, "hello"), failed))]

    for told in asyncio.run(main()):
        assert told[-1].startswith("event: error\ndata: ") and "got a, expected b" in told[-1]


def test_who_says_nothing_is_not_waited_for(model: HyperBagel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(realtime, "HELLO_SECONDS", 0.1)
    with TestClient(create_app(model)) as http, http.websocket_connect("/v1/live") as socket:
        received: Any = []
        reader = threading.Thread(target=lambda: received.append(socket.receive_json()), daemon=True)
        reader.start()
        reader.join(5)
        assert received and "got nothing for 0.1 s" in received[0]["error"]["message"]
        with pytest.raises(WebSocketDisconnect):
            socket.receive_json()


def test_the_total_is_what_was_read_and_drawn(model: HyperBagel) -> None:
    request = ImageRequest("a red car", steps=1)
    usage = image_usage(model, [request], model.generate_batch([request]))
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"] and usage["output_tokens"] > 0


@pytest.mark.parametrize("payload", ["AA*A", "AAA", "AAAA\nAAAA "])
def test_base64_is_read_strictly(payload: str) -> None:
    with pytest.raises(ApiError, match="damaged"):
        data_url(f"data:image/png;base64,{payload}")


def test_the_live_line_takes_no_more_than_a_body_may_hold(model: HyperBagel) -> None:
    assert make_server(create_app(model, limits=Limits(body_bytes=1000))).config.ws_max_size == 1000


@pytest.mark.parametrize("path", ["/metrics", "/version", "/openapi.json", "/v1/models", "/v1/models/tiny"])
def test_what_says_anything_needs_the_key(path: str, model: HyperBagel) -> None:
    http = TestClient(create_app(model, api_key=KEY))
    assert http.get(path).status_code == 401 and http.get(path, headers={"authorization": f"Bearer {KEY}"}).status_code == 200


def test_scanners_do_not_fill_the_metrics(model: HyperBagel) -> None:
    http = TestClient(create_app(model))
    http.get("/wp-login.php")
    text = http.get("/metrics").text
    assert 'path="other",status="404"' in text and "wp-login" not in text


def test_settings_say_width_and_height(model: HyperBagel) -> None:
    [made] = model.generate("x", size=(32, 48), steps=1, seed=0)
    assert made.image.size == (48, 32) and made.settings["size"] == [48, 32]


def test_a_lora_replaces_nothing(model: HyperBagel, tmp_path: Any) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="which exists"):
        export_lora("6", tmp_path / "mine", model=model.name)
    assert (tmp_path / "mine" / "notes.txt").exists()


def test_the_loop_goes_on_while_the_server_drains(model: HyperBagel) -> None:
    """What is being finished has to be sent."""
    app = create_app(model)

    async def main() -> str:
        loop, said = asyncio.get_running_loop(), list[str]()

        def close(seconds: float) -> None:
            said.append(asyncio.run_coroutine_threadsafe(asyncio.sleep(0, "sent"), loop).result(5))

        app.state.engine.close = close
        async with app.router.lifespan_context(app):
            pass
        return said[0]

    assert asyncio.run(main()) == "sent"


def test_the_server_draws_its_own_seed_where_none_is_sent(model: HyperBagel) -> None:
    incoming = Incoming(model, ("tiny",), Limits())
    assert len({incoming.drawing(GenerationBody(prompt="x"))[0].seed for _ in range(4)}) > 1


def test_an_automatic_size_is_the_model_s(model: HyperBagel) -> None:
    assert Incoming(model, ("tiny",), Limits()).drawing(GenerationBody(prompt="x", size="auto"))[0].size is None


def test_a_mask_is_of_the_first_picture_and_only_that_one_is_kept_whole(model: HyperBagel) -> None:
    mask = io.BytesIO()
    Image.new("L", (150, 150), 255).save(mask, "PNG")
    files = [png("red", 150), png("blue", 140)]
    [request] = Incoming(model, ("tiny",), Limits()).pictures(GenerationBody(prompt="x"), files, mask.getvalue())
    assert [image.size for image in request.images] == [(150, 150), (32, 32)]
