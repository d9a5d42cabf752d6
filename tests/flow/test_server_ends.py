"""How the server ends when it is not let finish: in a line, whatever was at work."""

from __future__ import annotations

import asyncio
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

import httpx2
import openai
import pytest
from fastapi import FastAPI

from hyperbagel.pipeline import HyperBagel
from hyperbagel.serve import run
from hyperbagel.serve.app import create_app
from hyperbagel.serve.run import bind, make_server


def wait_until_closed(port: int) -> None:
    """Until nothing listens there any more."""
    end = time.monotonic() + 20
    with suppress(OSError):
        while time.monotonic() < end:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            time.sleep(0.05)
        pytest.fail("the server still takes connections")


def test_a_second_ctrl_c_ends_at_once_in_a_line(model: HyperBagel) -> None:
    command = [sys.executable, "-m", "hyperbagel.cli", "serve", "--model", model.name, "--device", "cpu", "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        found = re.search(r"on (http://127\.0\.0\.1:(\d+)/v1)", line := process.stderr.readline())
        assert found is not None, line
        process.stderr.readline()  # where the page is
        with openai.OpenAI(api_key="k", base_url=found[1], max_retries=0, timeout=30) as client:
            stream = client.images.generate(prompt="x", n=10, stream=True, extra_body={"steps": 1000, "progress": True})
            next(iter(stream))  # in the middle of the work
            process.send_signal(signal.SIGINT)
            wait_until_closed(int(found[2]))  # the first one has been heard
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 130
            assert process.stderr.read().split("\n") == ["", "interrupted; what was at work is lost", ""]
    finally:
        process.kill()
        process.wait()


def test_what_does_not_end_in_time_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(run, "DRAIN_SECONDS", 1.0)
    app, begun = FastAPI(), threading.Event()
    app.state.body_bytes = 1000

    @app.get("/")
    async def never() -> None:
        begun.set()
        await asyncio.sleep(100)

    def ask(port: int) -> None:
        with suppress(httpx2.HTTPError):
            httpx2.get(f"http://127.0.0.1:{port}/", timeout=20)

    listener, server = bind("127.0.0.1", 0), make_server(app)
    threads = [
        threading.Thread(target=server.run, kwargs={"sockets": [listener]}),
        threading.Thread(target=ask, args=(listener.getsockname()[1],)),
    ]
    for thread in threads:
        thread.start()
    try:
        assert begun.wait(20)
    finally:
        server.should_exit = True
        for thread in threads:
            thread.join(20)
    assert capsys.readouterr().err.splitlines() == ["ERROR:    Cancel 1 running task(s), timeout graceful shutdown exceeded"]


def test_of_clients_that_left_nothing_is_logged(model: HyperBagel) -> None:
    """asyncio remarks on it once more has been written to them; all else of it is shown."""
    make_server(create_app(model))
    for message, shown in (("socket.send() raised exception.", False), ("Executing took 3 seconds", True)):
        record = logging.LogRecord("asyncio", logging.WARNING, "", 0, message, None, None)
        assert bool(logging.getLogger("asyncio").filter(record)) is shown
