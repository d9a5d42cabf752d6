"""The server under bad and heavy use: random bodies, clients that leave, a shutdown in the middle of work."""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from fastapi.testclient import TestClient

from hyperbagel.pipeline import HyperBagel
from hyperbagel.serve.app import create_app
from hyperbagel.serve.run import bind, make_server
from hyperbagel.serve.schemas import ChatBody, GenerationBody, Limits

ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    3,
    2**70,
    1.5,
    1e308,
    "",
    "x",
    "32x32",
    "auto",
    "\ud800",
    "\x00",
    "<|im_end|>",
    [],
    [0, 1],
    {},
    {"type": "text"},
]


def _odd_part(rng: random.Random) -> Any:
    address = rng.choice(["data:image/png;base64,AAAA", "data:,x", "http://localhost/", "data:image/png;base64,!", ""])
    return rng.choice([*ODD, {"type": "text", "text": rng.choice(ODD)}, {"type": "image_url", "image_url": {"url": address}}])


def _odd_body(rng: random.Random, fields: list[str], base: dict[str, Any]) -> dict[str, Any]:
    changed = {name: rng.choice(ODD) for name in rng.sample(fields, rng.randrange(1, 4))}
    if "messages" in base and rng.random() < 0.6:
        content = rng.choice([*ODD, [_odd_part(rng) for _ in range(rng.randrange(3))]])
        role = rng.choice(["user", "user", "assistant", "system", "tool"])
        changed["messages"] = [*base["messages"], {"role": role, "content": content}][-rng.randrange(1, 3) :]
    return base | changed


def test_no_body_makes_an_internal_error(model: HyperBagel) -> None:
    """400 random bodies and forms: each one is answered or refused, in OpenAI's form."""
    rng = random.Random(0)
    http = TestClient(create_app(model, limits=Limits(steps=2, max_tokens=2, n=2)), raise_server_exceptions=False)
    draw = {"prompt": "x", "steps": 1, "max_think_tokens": 2}
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "steps": 1, "max_think_tokens": 2}
    seen = set()

    def send(path: str, body: dict[str, Any]) -> Any:
        return http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})

    with http:
        for i in range(400):
            if i % 3 == 0:
                answer = send("/v1/images/generations", _odd_body(rng, list(GenerationBody.model_fields), draw))
            elif i % 3 == 1:
                answer = send("/v1/chat/completions", _odd_body(rng, list(ChatBody.model_fields), chat))
            else:
                fields = {
                    k: str(v).encode(errors="replace").decode() for k, v in _odd_body(rng, list(GenerationBody.model_fields), draw).items()
                }
                answer = http.post("/v1/images/edits", data=fields, files={rng.choice(["image", "image[]", "mask"]): rng.randbytes(20)})
            seen.add(answer.status_code)
            assert answer.status_code in (200, 400, 404), answer.text
            if answer.status_code != 200:
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        for content in (b"", b"{", b"[" * 100_000, b"\xff\xfe", b"1" * 5000, b'{"prompt": NaN}'):
            answer = http.post("/v1/images/generations", content=content, headers={"content-type": "application/json"})
            assert answer.status_code == 400 and answer.json()["error"]["message"]
    assert {200, 400} <= seen


def test_mixed_requests_with_clients_that_leave(model: HyperBagel, caplog: pytest.LogCaptureFixture) -> None:
    """Each one is answered or cancelled; afterwards nothing runs, nothing waits and no thread is left over."""
    app = create_app(model, limits=Limits(waiting=200))
    listener, server = bind("127.0.0.1", 0), make_server(app)
    before = threading.active_count()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    metrics, total = app.state.metrics, 80

    async def one(client: openai.AsyncOpenAI, i: int, rng: random.Random) -> str:
        hurried = client.with_options(timeout=rng.choice([0.02, 0.3, 30.0]))
        try:
            if i % 4 == 0:
                stream = await hurried.images.generate(prompt=f"car {i}", stream=True, partial_images=2, extra_body={"seed": i, "steps": 6})
                if rng.random() < 0.5:
                    await stream.close()
                    return "left"
                return [event.type async for event in stream][-1]
            if i % 4 == 1:
                answer = await hurried.images.generate(prompt=f"car {i}", extra_body={"seed": i, "steps": 3})
                return "answered" if answer.data and answer.data[0].seed == i else "mixed up"  # type: ignore[attr-defined]
            chat = await hurried.chat.completions.create(model="tiny", messages=[{"role": "user", "content": f"what {i}?"}], max_tokens=9)
            return "answered" if chat.choices else "mixed up"
        except (openai.APITimeoutError, openai.APIConnectionError):
            return "left"

    async def main() -> list[str]:
        rng = random.Random(1)
        async with openai.AsyncOpenAI(api_key="x", base_url=f"http://127.0.0.1:{listener.getsockname()[1]}/v1", max_retries=0) as client:
            return await asyncio.gather(*(one(client, i, rng) for i in range(total)))

    outcomes = asyncio.run(main())
    for path in ("/v1/images/edits", "/v1/chat/completions"):  # one that leaves in the middle of its body
        with socket.create_connection(listener.getsockname()) as half:
            head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: multipart/form-data; boundary=b\r\ncontent-length: 999\r\n\r\n"
            half.sendall(head.encode() + b'--b\r\ncontent-disposition: form-data; name="prompt"\r\n\r\nx')
            time.sleep(0.05)
    server.should_exit = True
    thread.join(30)
    listener.close()
    assert len(outcomes) == total and "mixed up" not in outcomes
    assert {"answered", "left", "image_generation.completed"} == set(outcomes)
    assert metrics.get("hyperbagel_running") == 0 == metrics.get("hyperbagel_waiting")
    assert not thread.is_alive() and threading.active_count() <= before
    assert 'outcome="failed"' not in metrics.text()
    assert [record.getMessage() for record in caplog.records if record.name == "hyperbagel.serve"] == []


def test_the_command_serves_and_a_shutdown_drains(model: HyperBagel) -> None:
    command = [sys.executable, "-m", "hyperbagel.cli", "serve", "--model", model.name, "--device", "cpu", "--port", "0", "--api-key", "k"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"on (http://127\.0\.0\.1:\d+/v1)", line)
        assert found is not None, line
        with openai.OpenAI(api_key="k", base_url=found[1], max_retries=0, timeout=30) as client, ThreadPoolExecutor(1) as pool:
            stream = client.images.generate(prompt="x", stream=True, extra_body={"steps": 200, "seed": 1})
            process.send_signal(signal.SIGTERM)  # in the middle: the stream has begun
            assert pool.submit(lambda: [event.type for event in stream]).result(30) == ["image_generation.completed"]
        process.wait(20)
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()
