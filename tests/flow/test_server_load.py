"""The server under bad and heavy use: random bodies, clients that leave, a shutdown in the middle of work."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from server_world import wait_for

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


def memory() -> float:
    """MiB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


class Mixed:
    """Requests whose right answers are known, so that each answer can be compared with its own."""

    def __init__(self, model: HyperBagel) -> None:
        red, blue = (Image.new("RGB", (40, 40), colour) for colour in ("red", "blue"))
        prompts = ["a red car", "two blue dogs", "a tree"]
        self.drawn = [model.generate(p, seed=i, steps=2)[0].image for i, p in enumerate(prompts)]
        self.planned = model.generate("a tree", seed=3, steps=2, think=True, max_think_tokens=6)[0].image
        self.edited = [model.edit(picture, "make it green", seed=7, steps=2)[0].image for picture in (red, blue)]
        self.said = [model.ask(f"what {p}?", max_tokens=6).text for p in prompts]
        self.prompts, self.files = prompts, [png_bytes(picture) for picture in (red, blue)]

    async def one(self, client: httpx2.AsyncClient, number: int, leave: float | None) -> str:
        """Sends request `number` and compares its answer; `leave`: goes away after so many seconds."""
        try:
            async with asyncio.timeout(leave):
                return await self._one(client, number)
        except TimeoutError:
            return "left"

    async def _one(self, client: httpx2.AsyncClient, number: int) -> str:
        kind, i = number % 6, number // 6 % 3
        draw = {"prompt": self.prompts[i], "seed": i, "steps": 2}
        if kind == 0:
            answer = (await client.post("/v1/images/generations", json=draw)).json()
            return self._same(answer, self.drawn[i])
        if kind == 1:
            last: dict[str, Any] = {}
            body = draw | {"stream": True, "partial_images": 1}
            async with client.stream("POST", "/v1/images/generations", json=body) as events:
                async for line in events.aiter_lines():
                    last = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else last
            return self._same({"data": [last]}, self.drawn[i])
        if kind == 2:
            form = {"prompt": "make it green", "seed": "7", "steps": "2"}
            answer = (await client.post("/v1/images/edits", data=form, files={"image": self.files[i % 2]})).json()
            return self._same(answer, self.edited[i % 2])
        if kind == 3:
            plan = {"prompt": "a tree", "seed": 3, "steps": 2, "think": True, "max_think_tokens": 6}
            return self._same((await client.post("/v1/images/generations", json=plan)).json(), self.planned)
        chat = {"messages": [{"role": "user", "content": f"what {self.prompts[i]}?"}], "max_tokens": 6}
        if kind == 4:
            answer = (await client.post("/v1/chat/completions", json=chat)).json()
            return "answered" if answer["choices"][0]["message"]["content"] == self.said[i] else f"mixed up: {answer}"
        text = ""
        async with client.stream("POST", "/v1/chat/completions", json=chat | {"stream": True}) as events:
            async for line in events.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
        return "answered" if text == self.said[i] else f"mixed up: {text}"

    def _same(self, answer: dict[str, Any], expected: Image.Image) -> str:
        found = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
        apart = np.abs(np.asarray(found).astype(int) - np.asarray(expected)).max()
        return "answered" if apart <= 1 else f"mixed up: {apart}"  # batches order their sums differently


def png_bytes(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def test_a_thousand_mixed_requests_with_clients_that_leave(model: HyperBagel, caplog: pytest.LogCaptureFixture) -> None:
    """Each one is answered, with its own answer, or cancelled; memory stays flat; afterwards nothing runs or waits, and no thread, task or
    connection is left over."""
    mixed, app = Mixed(model), create_app(model, limits=Limits(waiting=400))
    loops: set[asyncio.AbstractEventLoop] = set()

    async def seen(scope: Any, receive: Any, send: Any) -> None:
        loops.add(asyncio.get_running_loop())
        await app(scope, receive, send)

    listener, server = bind("127.0.0.1", 0), make_server(app)
    server.config.app = seen
    before = threading.active_count()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    metrics, rng = app.state.metrics, random.Random(1)
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"

    async def wave(first: int, count: int) -> list[str]:
        async with httpx2.AsyncClient(base_url=address, timeout=60) as client:
            gate = asyncio.Semaphore(40)

            async def one(i: int) -> str:
                async with gate:
                    return await mixed.one(client, i, rng.choice([None, None, None, None, None, 0.001, 0.02, 0.2]))

            return await asyncio.gather(*(one(first + i) for i in range(count)))

    outcomes, sizes = [], []
    for number in range(5):
        outcomes += asyncio.run(wave(200 * number, 200))
        sizes.append(memory())
    for path in ("/v1/images/edits", "/v1/chat/completions"):  # one that leaves in the middle of its body
        with socket.create_connection(listener.getsockname()) as half:
            head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: multipart/form-data; boundary=b\r\ncontent-length: 999\r\n\r\n"
            half.sendall(head.encode() + b'--b\r\ncontent-disposition: form-data; name="prompt"\r\n\r\nx')
            time.sleep(0.05)
    wait_for(lambda: metrics.get("hyperbagel_running") == 0 == metrics.get("hyperbagel_waiting"))
    time.sleep(0.1)
    left = [task.get_coro().__qualname__ for task in asyncio.all_tasks(loops.pop())]  # type: ignore[union-attr]
    server.should_exit = True
    thread.join(30)
    listener.close()
    counts = Counter(outcomes)
    assert set(counts) == {"answered", "left"} and counts["answered"] > 400 and counts["left"] > 100
    assert sizes[-1] - sizes[1] < 25, f"memory grew: {sizes} MiB"
    assert not [name for name in left if "Server" not in name and "Lifespan" not in name], left
    assert not thread.is_alive() and threading.active_count() <= before
    done, gone = (sum(metrics.get("hyperbagel_results_total", kind=kind, outcome=o) for kind in KINDS) for o in ("done", "cancelled"))
    assert done >= counts["answered"] and gone > 0 and done + gone <= len(outcomes)
    assert 'outcome="failed"' not in metrics.text() and 'status="5' not in metrics.text()
    assert [record.getMessage() for record in caplog.records if record.name == "hyperbagel.serve"] == []


KINDS = ("image", "text")


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
