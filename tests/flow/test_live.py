"""The live socket on the tiny random model: pictures are the library's, the latest request wins, strangers are turned away."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fastapi import WebSocketDisconnect
from fastapi.testclient import TestClient
from PIL import Image
from server_world import KEY, wait_for

from hyperbagel.core.errors import InputError, Notice
from hyperbagel.data.images import SETTINGS_KEY
from hyperbagel.pipeline import HyperBagel, ImageRequest, ImageResult
from hyperbagel.serve import realtime
from hyperbagel.serve.app import create_app
from hyperbagel.serve.jobs import Job
from hyperbagel.serve.schemas import Limits


@pytest.fixture(scope="module")
def app(model: HyperBagel) -> Any:
    return create_app(model, api_key=KEY, limits=Limits(live=3))


@pytest.fixture(scope="module")
def http(app: Any) -> Iterator[TestClient]:
    with TestClient(app) as client:
        yield client


@pytest.fixture
def line(http: TestClient) -> Iterator[Any]:
    with http.websocket_connect("/v1/live") as socket:
        socket.send_json({"type": "hello", "key": KEY})
        ready = socket.receive_json()
        assert ready["type"] == "ready"
        assert ready["tiers"]["preview"] == {"student": "6", "steps": None}
        assert ready["tiers"]["better"] == {"student": "none", "steps": realtime.BETTER_STEPS}
        yield socket


def test_a_damaged_student_does_not_close_the_line(http: TestClient, model: HyperBagel) -> None:
    assert model.students.folder is not None
    bad = model.students.folder / "bad"
    bad.mkdir()
    try:
        (bad / "sampler.json").write_text('{"nfe":')
        with pytest.warns(Notice, match="going on without student bad"), http.websocket_connect("/v1/live") as socket:
            socket.send_json({"type": "hello", "key": KEY})
            assert socket.receive_json()["tiers"]["preview"]["student"] == "6"
    finally:
        shutil.rmtree(bad)


def draw(id: int, **more: Any) -> dict[str, Any]:
    return {"type": "draw", "id": id, "prompt": "a red car", "seed": "5", **more}


def receive(socket: Any) -> tuple[dict[str, Any], Image.Image | None]:
    """The next message, and its picture."""
    message = socket.receive()
    if (data := message.get("bytes")) is None:
        return json.loads(message["text"]), None
    length = int.from_bytes(data[:4], "big")
    return json.loads(data[4 : 4 + length]), Image.open(io.BytesIO(data[4 + length :]))


def until(socket: Any, id: int) -> list[dict[str, Any]]:
    """All messages up to the picture of a request."""
    seen = [receive(socket)[0]]
    while not (seen[-1]["type"] == "picture" and seen[-1]["id"] == id):
        assert len(seen) < 200
        seen.append(receive(socket)[0])
    return seen


def png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def test_each_tier_is_the_library_s_picture(line: Any, model: HyperBagel) -> None:
    for i, (tier, settings) in enumerate({"preview": {"student": "6"}, "better": {"steps": 20}, "full": {}}.items()):
        line.send_json(draw(i, tier=tier, text_scale=3.0))
        header, picture = receive(line)
        expected = model.generate("a red car", seed=5, text_scale=3.0, **settings)[0]  # type: ignore[arg-type]
        assert picture is not None and np.array_equal(np.asarray(picture), np.asarray(expected.image))
        assert json.loads(picture.info[SETTINGS_KEY]) == json.loads(json.dumps(expected.settings))
        assert (header["id"], header["tier"], header["nfe"], header["seed"]) == (i, tier, expected.nfe, 5)
        assert set(header["timings"]) == {"wait", "prefill", "denoise", "decode", "encode"}
        assert header["server"] == pytest.approx(sum(header["timings"].values()), abs=0.002), "the parts are the whole"


def test_a_source_is_read_once_and_only_texts_again(line: Any, model: HyperBagel) -> None:
    source = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    line.send_json({"type": "source", "id": 0, "image": png(source)})
    assert receive(line)[0] == {"type": "source", "id": 0, "size": [32, 32]}
    reused = []
    for i, prompt in enumerate(("make it", "make it blue", "make it blue")):
        line.send_json(draw(i, prompt=prompt, image_scale=1.5))
        header, picture = receive(line)
        expected = model.edit(source, prompt, seed=5, student="6", image_scale=1.5)[0].image
        assert picture is not None and np.array_equal(np.asarray(picture), np.asarray(expected))
        reused.append(header["reused"])
    assert reused[0] == 0 < reused[1] == reused[2]
    line.send_json({"type": "source", "id": 9, "image": None})
    assert receive(line)[0]["size"] is None
    line.send_json(draw(9))
    header, picture = receive(line)
    assert header["reused"] == 0 and np.array_equal(
        np.asarray(picture), np.asarray(model.generate("a red car", seed=5, student="6")[0].image)
    )


def test_a_later_source_is_not_for_what_came_before_it(app: Any, model: HyperBagel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A preview is at work and a draw waits when the source is taken away: the one that waits still edits it."""
    steps = {"preview": {"student": "none", "steps": 300}, "better": {"student": "6", "steps": None}}
    monkeypatch.setattr(realtime, "tiers", lambda model: steps)
    source = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    with TestClient(app).websocket_connect("/v1/live") as socket:
        socket.send_json({"type": "hello", "key": KEY})
        receive(socket)
        socket.send_json({"type": "source", "id": 9, "image": png(source)})
        socket.send_json(draw(10))
        socket.send_json(draw(11, tier="better"))
        socket.send_json({"type": "source", "id": 12, "image": None})
        told = [receive(socket) for _ in range(4)]
        assert [header["id"] for header, _ in told] == [9, 12, 10, 11], "the source went while 10 was at work"
        expected = model.edit(source, "a red car", seed=5, student="6")[0].image
        assert told[3][1] is not None and np.array_equal(np.asarray(told[3][1]), np.asarray(expected))
        socket.send_json(draw(13, tier="better"))
        expected = model.generate("a red car", seed=5, student="6")[0].image
        assert np.array_equal(np.asarray(receive(socket)[1]), np.asarray(expected)), "and what follows does not"


def test_the_latest_wins(line: Any, app: Any) -> None:
    """Full pictures (91 evaluations) that are overtaken end at a step; every one is answered, by a picture or as cancelled."""
    metrics = app.state.metrics
    evaluations = metrics.get("hyperbagel_evaluations_total")
    for i in range(12):
        line.send_json(draw(i, tier="full", prompt=f"car {i}"))
    line.send_json(draw(12, tier="preview"))
    seen = until(line, 12)
    cancelled = {message["id"] for message in seen if message["type"] == "cancelled"}
    shown = {message["id"] for message in seen if message["type"] == "picture"}
    assert cancelled | shown == set(range(13)) and not cancelled & shown
    assert len(cancelled) >= 8, "nearly all of them were overtaken"
    assert metrics.get("hyperbagel_evaluations_total") - evaluations == sum(message["nfe"] for message in seen if "nfe" in message)


def test_work_that_takes_long_stops_at_a_step(line: Any, app: Any, model: HyperBagel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture that would never end: `stop` ends it, and so does a new request; a short preview is let finish."""
    monkeypatch.setitem(realtime.__dict__, "SHORT", -1.0)  # no preview is short
    steps = {
        "preview": {"student": "none", "steps": 900},
        "better": {"student": "none", "steps": 900},
        "full": {"student": "6", "steps": None},
    }
    monkeypatch.setattr(realtime, "tiers", lambda model: steps)
    with TestClient(app).websocket_connect("/v1/live") as socket:
        socket.send_json({"type": "hello", "key": KEY})
        receive(socket)
        for id, tier in ((1, "better"), (2, "preview")):
            socket.send_json(draw(id, tier=tier))
            socket.send_json({"type": "stop"})
            assert receive(socket)[0] == {"type": "cancelled", "id": id}
        socket.send_json(draw(3, tier="preview"))
        socket.send_json(draw(4, tier="full"))
        assert [receive(socket)[0]["type"] for _ in range(2)] == ["cancelled", "picture"]


def test_errors_are_told_and_the_line_goes_on(line: Any) -> None:
    for message, told in (
        ({"type": "nonsense"}, "type"),
        (draw(1, seed=-1), "seed"),
        (draw(1, size="50x50"), "48x48"),
        (draw(1, prompt=" "), "empty prompt"),
        ({"type": "source", "id": 1, "image": "http://localhost/x.png"}, "data:"),
        ({"type": "source", "id": 1, "image": "data:image/png;base64,AAAA"}, "no picture"),
        ({"type": "hello"}, "second hello"),
    ):
        line.send_json(message)
        header, _ = receive(line)
        assert header["type"] == "error" and told in header["error"]["message"], header
        assert set(header["error"]) == {"message", "type", "param", "code"}
    for text in ("{", "", "7"):
        line.send_text(text)
        assert receive(line)[0]["error"]["code"] == "invalid_value", text
    line.send_bytes(b"x")
    assert "binary" in receive(line)[0]["error"]["message"]
    line.send_json(draw(5))
    assert receive(line)[0]["id"] == 5


def test_a_draw_that_is_wrong_is_answered_by_its_id(line: Any) -> None:
    without = {name: value for name, value in draw(8).items() if name != "seed"}
    wrong = [draw(7, tier="ultra"), draw(7, prompt=""), without, draw(9, colour="red"), {"type": "source", "id": 10}]
    for message, id in (*((one, one["id"]) for one in wrong), (draw(1) | {"id": "x"}, None), ({"type": "draw"}, None)):
        line.send_json(message)
        header = receive(line)[0]
        assert (header["type"], header["id"]) == ("error", id), message


@pytest.mark.parametrize(
    ("first", "headers", "code"),
    [
        ({"type": "hello", "key": "wrong"}, {}, "invalid_api_key"),
        ({"type": "hello"}, {}, "invalid_api_key"),
        (draw(1), {}, None),
        ({"type": "hello", "key": KEY}, {"origin": "http://evil.example"}, None),
        ({"type": "hello", "key": KEY}, {"origin": "http://[evil"}, None),
    ],
)
def test_strangers_are_turned_away(http: TestClient, first: dict[str, Any], headers: dict[str, str], code: str | None) -> None:
    with http.websocket_connect("/v1/live", headers=headers) as socket:
        socket.send_json(first)
        header = socket.receive_json()
        assert header["type"] == "error" and header["error"]["code"] == code
        with pytest.raises(WebSocketDisconnect) as closed:
            socket.receive_json()
        assert closed.value.code == 1008


def test_only_so_many_lines(http: TestClient) -> None:
    told = []
    with ExitStack() as stack:
        for _ in range(4):
            socket = stack.enter_context(http.websocket_connect("/v1/live", headers={"origin": "http://testserver"}))
            socket.send_json({"type": "hello", "key": KEY})
            told.append(socket.receive_json())
    assert [message["type"] for message in told] == ["ready"] * 3 + ["error"] and told[3]["error"]["code"] == "too_many_connections"


def test_the_page_needs_no_key_and_everything_else_does(http: TestClient) -> None:
    page = http.get("/")
    assert page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]
    assert http.get("/ui/app.js").headers["content-type"].startswith("text/javascript")
    assert http.get("/v1/models").status_code == 401 and http.get("/ui/../v1/models").status_code == 401
    assert http.get("/ui/%2e%2e/page.py").status_code == 404 and http.get("/ui/nothing.js").status_code == 404


def test_without_students_the_model_draws_in_fewer_steps(model: HyperBagel) -> None:
    chosen = realtime.tiers(HyperBagel(model.parts, "plain"))
    assert [(tier["student"], tier["steps"]) for tier in chosen.values()] == [("none", 4), ("none", 20), ("none", None)]


def test_who_leaves_takes_the_work_along(http: TestClient, app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(realtime, "tiers", lambda model: {"better": {"student": "none", "steps": 900}})
    metrics = app.state.metrics
    before = metrics.get("hyperbagel_results_total", kind="image", outcome="cancelled")
    with http.websocket_connect("/v1/live") as socket:
        socket.send_json({"type": "hello", "key": KEY})
        receive(socket)
        socket.send_json(draw(1, tier="better"))
        wait_for(lambda: metrics.get("hyperbagel_running") == 1)
    wait_for(lambda: metrics.get("hyperbagel_running") == 0)
    assert metrics.get("hyperbagel_results_total", kind="image", outcome="cancelled") == before + 1


def alone(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[Any]]:
    """A connection without a socket, and what it says."""
    said: list[Any] = []

    async def say(what: Any) -> None:
        said.append(json.loads(what) if isinstance(what, str) else what)

    monkeypatch.setattr(realtime, "tiers", lambda model: {"preview": {"student": None, "steps": 1}})
    live: Any = SimpleNamespace(incoming=SimpleNamespace(model=None), engine=SimpleNamespace())
    return realtime._Connection(SimpleNamespace(send_text=say, send_bytes=say), live), said  # type: ignore[arg-type]


def test_only_previews_say_how_long_a_preview_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        connection, said = alone(monkeypatch)
        result = ImageResult(Image.new("RGB", (2, 2)), 0, 1, {}, settings={"student": None})
        asked = realtime.Draw(type="draw", id=1, prompt="x", seed=0, tier="full")
        await connection._show(asked, result, time.perf_counter() - 9)
        assert connection.last_preview == 0
        await connection._show(asked.model_copy(update={"tier": "preview"}), result, time.perf_counter() - 9)
        assert 9 <= connection.last_preview < 20 and len(said) == 2

    asyncio.run(main())


def test_what_is_refused_later_is_answered_by_its_id_too(line: Any, model: HyperBagel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any, **more: Any) -> Any:
        raise InputError("got a bad prompt")

    monkeypatch.setattr(model, "generate_batch", fail)
    source = {"type": "source", "id": 3, "image": "data:image/png;base64,AAAA"}
    for message, told in ((source, "no picture"), (draw(4, size="50x50"), "48x48"), (draw(5), "bad prompt")):
        line.send_json(message)
        header = receive(line)[0]
        assert (header["type"], header["id"]) == ("error", message["id"]) and told in header["error"]["message"]


def test_a_source_s_size_is_its_width_and_height(line: Any) -> None:
    line.send_json({"type": "source", "id": 1, "image": png(Image.new("RGB", (64, 32)))})
    assert receive(line)[0]["size"] == [32, 16], "as the model reads it"


def test_a_key_with_blanks_around_it(http: TestClient) -> None:
    with http.websocket_connect("/v1/live") as socket:
        socket.send_json({"type": "hello", "key": f" {KEY}\n"})
        assert socket.receive_json()["type"] == "ready"


def test_what_is_overtaken_while_it_is_read_is_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        connection, _ = alone(monkeypatch)
        loop, reading, go, told, jobs = asyncio.get_running_loop(), asyncio.Event(), threading.Event(), asyncio.Queue[Any](), list[Job]()

        def drawing(*given: Any) -> list[ImageRequest]:
            loop.call_soon_threadsafe(reading.set)
            go.wait(10)
            return [ImageRequest("x")]

        connection.live.incoming.drawing, connection.live.engine.submit = drawing, jobs.append  # type: ignore[method-assign]
        monkeypatch.setattr(connection, "_say", told.put)
        worker = asyncio.create_task(connection._work())
        await connection._take(realtime.Draw(type="draw", id=1, prompt="x", seed=0))
        await asyncio.wait_for(reading.wait(), 10)
        await connection._take(realtime.Stop(type="stop"))
        go.set()
        assert await asyncio.wait_for(told.get(), 5) == {"type": "cancelled", "id": 1}
        assert [job.over for job in jobs] == [True]
        worker.cancel()

    asyncio.run(main())


def test_who_leaves_leaves_no_task(monkeypatch: pytest.MonkeyPatch) -> None:
    async def gone() -> str:
        raise WebSocketDisconnect

    async def main() -> int:
        connection, _ = alone(monkeypatch)
        connection.socket.receive_text = gone  # type: ignore[method-assign]
        with pytest.raises(WebSocketDisconnect):
            await connection.run()
        _, waiting = await asyncio.wait(asyncio.all_tasks() - {asyncio.current_task()}, timeout=1)  # type: ignore[type-var]
        return len(waiting)

    assert asyncio.run(main()) == 0
