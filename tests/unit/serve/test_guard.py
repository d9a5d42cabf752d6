"""What stands in front of the endpoints: bodies are bounded in size and time, other sites' pages are turned away."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from hyperbagel.core.errors import InputError
from hyperbagel.serve.guard import Guard, host_names, is_foreign, is_own_name, is_same_origin
from hyperbagel.serve.metrics import Metrics
from hyperbagel.serve.schemas import Limits


def through_guard(app: Any, messages: list[dict[str, Any]], **scope: Any) -> tuple[list[dict[str, Any]], Metrics]:
    """What is sent for a request whose messages are these."""
    metrics, sent, left = Metrics(), [], iter(messages)  # type: ignore[var-annotated]

    async def receive() -> dict[str, Any]:
        return next(left)

    async def send(message: Any) -> None:
        sent.append(message)

    guard = Guard(app, api_key="key", limits=Limits(body_bytes=10), metrics=metrics, paths={"/health"})
    asyncio.run(guard({"type": "http", "method": "POST", "path": "/health", "headers": []} | scope, receive, send))
    assert guard.held == 0
    return sent, metrics


async def reads_all(scope: Any, receive: Any, send: Any) -> None:
    """An app that reads its body, and answers unless its client is gone."""
    while (message := await receive())["type"] != "http.disconnect":
        if not message.get("more_body"):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            return


async def fails_when_left(scope: Any, receive: Any, send: Any) -> None:
    await reads_all(scope, receive, send)
    raise RuntimeError("nobody reads any more")


def test_a_body_in_pieces_is_measured_whole() -> None:
    body = [{"type": "http.request", "body": b"x" * 6, "more_body": more} for more in (True, False)]
    sent, _ = through_guard(reads_all, body)
    assert sent[0]["status"] == 413
    assert through_guard(reads_all, body[1:])[0][0]["status"] == 200


@pytest.mark.parametrize("app", [reads_all, fails_when_left])
def test_who_left_is_told_nothing_and_counted_as_such(app: Any) -> None:
    sent, metrics = through_guard(app, [{"type": "http.disconnect"}])
    assert sent == [] and metrics.get("hyperbagel_requests_total", path="/health", status="499") == 1


def test_open_paths_stay_open_behind_a_proxy_s_prefix() -> None:
    told = [through_guard(reads_all, [{"type": "http.request"}], path=path, root_path="/x")[0][0] for path in ("/x/health", "/x/v1/models")]
    assert [message["status"] for message in told] == [200, 401]


def test_a_key_may_end_in_a_letter_whose_last_byte_alone_is_a_space() -> None:
    """As UTF-8, "\u00e0" ends in the byte 0xa0, which read by itself is a no-break space."""

    async def status(key: str) -> int:
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request"}

        async def send(message: Any) -> None:
            sent.append(message)

        guard = Guard(reads_all, api_key=key, limits=Limits(), metrics=Metrics(), paths=set())
        headers = [(b"authorization", b"Bearer  " + key.encode())]
        await guard({"type": "http", "method": "GET", "path": "/v1/models", "headers": headers}, receive, send)
        return sent[0]["status"]

    assert [asyncio.run(status(key)) for key in ("key", "voil\u00e0", "\u00c5", "\u00e9t\u00e9")] == [200] * 4


def test_a_path_cannot_write_lines_of_its_own_into_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def fails(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("broken")

    sent, _ = through_guard(fails, [], path="/health\nERROR: all is lost", headers=[(b"authorization", b"Bearer key")])
    assert sent[0]["status"] == 500 and "\n" not in caplog.records[0].getMessage()


async def at_once(guard: Guard, bodies: list[list[Any]], **headers: str) -> list[list[dict[str, Any]]]:
    """What is sent for each of these requests, which begin one after the other and then go on side by side. A body is a list of pieces and
    of events to wait for."""

    async def one(body: list[Any]) -> list[dict[str, Any]]:
        sent, left = [], iter(body)

        async def receive() -> dict[str, Any]:
            while isinstance(piece := next(left), asyncio.Event):
                await piece.wait()
            return {"type": "http.request", "body": piece, "more_body": piece != b""}

        async def send(message: Any) -> None:
            sent.append(message)

        raw = [(b"authorization", b"Bearer key"), *((name.replace("_", "-").encode(), value.encode()) for name, value in headers.items())]
        await guard({"type": "http", "method": "POST", "path": "/x", "headers": raw}, receive, send)
        return sent

    return await asyncio.gather(*map(one, bodies))


def test_all_bodies_together_are_bounded() -> None:
    """A body is kept until its request is answered, also while it waits."""

    async def run() -> None:
        limits = Limits(body_bytes=10, bodies_bytes=15)
        guard, go = Guard(reads_all, api_key="key", limits=limits, metrics=Metrics(), paths=set()), asyncio.Event()
        asyncio.get_running_loop().call_later(0.2, go.set)
        first, second, third = await at_once(guard, [[b"x" * 8, go, b""], [b"x" * 8, b""], [b"x" * 7, b""]])
        assert [sent[0]["status"] for sent in (first, second, third)] == [200, 429, 200]
        headers = dict(second[0]["headers"])
        assert headers[b"retry-after"] == b"1" and headers[b"connection"] == b"close", "what is left of it is not read"
        assert guard.held == 0
        assert (await at_once(guard, [[b"x" * 8, b""]]))[0][0]["status"] == 200, "there is room again"

    asyncio.run(run())


def test_a_body_that_no_longer_comes_is_given_up() -> None:
    async def run() -> None:
        guard = Guard(reads_all, api_key="key", limits=Limits(body_seconds=0.1), metrics=Metrics(), paths=set())
        (sent,) = await asyncio.wait_for(at_once(guard, [[b"x", asyncio.Event()]]), 10)
        assert sent[0]["status"] == 408 and b"no more of the body for 0.1 s" in sent[1]["body"] and guard.held == 0

    asyncio.run(run())


def test_what_comes_after_a_whole_body_may_take_any_time() -> None:
    """It is that the client leaves, which a long answer waits for."""

    async def waits(scope: Any, receive: Any, send: Any) -> None:
        assert not (await receive())["more_body"]
        assert (await receive())["type"] == "http.disconnect"
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def run() -> None:
        guard = Guard(waits, api_key=None, limits=Limits(body_seconds=0.05), metrics=Metrics(), paths=set())
        sent: list[Any] = []
        left = iter([(0.0, {"type": "http.request", "body": b"x", "more_body": False}), (0.3, {"type": "http.disconnect"})])

        async def receive() -> dict[str, Any]:
            seconds, message = next(left)
            await asyncio.sleep(seconds)
            return message  # type: ignore[return-value]

        async def send(message: Any) -> None:
            sent.append(message)

        await guard({"type": "http", "method": "POST", "path": "/x", "headers": []}, receive, send)
        assert sent[0]["status"] == 200

    asyncio.run(run())


@pytest.mark.parametrize(
    ("origin", "same"), [(None, True), ("http://here:8000", True), ("http://here", False), ("http://here:8001", False), ("null", False)]
)
def test_a_page_is_the_server_s_own_by_name_and_port(origin: str | None, same: bool) -> None:
    headers = {"host": "here:8000"} | ({} if origin is None else {"origin": origin})
    assert is_same_origin(headers) is same
    assert is_foreign(headers) is not same


@pytest.mark.parametrize(
    ("headers", "foreign"),
    [
        ({"sec-fetch-site": "cross-site", "origin": "http://evil.example"}, True),
        ({"sec-fetch-site": "cross-site"}, True),
        ({"sec-fetch-site": "same-site", "origin": "http://here:3000"}, True),
        ({"sec-fetch-site": "same-origin", "origin": "https://behind.a.proxy"}, False),  # that passes another Host on
        ({"sec-fetch-site": "none"}, False),
        ({"origin": "http://[evil"}, True),
        ({"origin": "chrome-extension://abc", "sec-fetch-site": "cross-site"}, False),
        ({"origin": "app://notes"}, False),
    ],
)
def test_what_a_browser_says_of_a_page_comes_first(headers: dict[str, str], foreign: bool) -> None:
    assert is_foreign({"host": "here:8000"} | headers) is foreign


OWN = ["127.0.0.1:8000", "[::1]:8000", "localhost", "LOCALHOST:80", "box", "a.local", "host.docker.internal:1", "x.y"]
STRANGE = ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "evil.example.", "local.evil.io", "[evil"]


@pytest.mark.parametrize(("host", "own"), [*((host, True) for host in OWN), *((host, False) for host in STRANGE)])
def test_names_that_a_stranger_can_have(host: str, own: bool) -> None:
    assert is_own_name(host, {"x.y"}) is own


def test_allowed_hosts_are_names() -> None:
    """A refusal shows the Host header with its port; given back as it was shown, it works."""
    assert host_names(["A.Example:8443", "b.example."]) == {"a.example", "b.example"}
    assert is_own_name("a.example:8443", host_names(["a.example:8443"]))
    for wrong in ("https://a.example", "a.example/", "", "[::1"):
        with pytest.raises(InputError, match="expected a name"):
            host_names([wrong])


def test_a_length_that_is_no_number_is_measured_as_it_comes() -> None:
    headers = [(b"authorization", b"Bearer key"), (b"content-length", b"-1e9")]
    for size, status in ((10, 200), (11, 413)):
        sent, _ = through_guard(reads_all, [{"type": "http.request", "body": b"x" * size}], headers=headers)
        assert sent[0]["status"] == status


def test_one_body_alone_may_be_as_large_as_a_body_may_be() -> None:
    """Also where less was allowed for all of them together."""
    guard = Guard(reads_all, api_key="key", limits=Limits(body_bytes=10, bodies_bytes=5), metrics=Metrics(), paths=set())
    [sent] = asyncio.run(at_once(guard, [[b"x" * 10, b""]]))
    assert sent[0]["status"] == 200


def test_a_refusal_leaves_its_connection_open_and_is_timed() -> None:
    sent, metrics = through_guard(reads_all, [{"type": "http.request"}], path="/v1/models")
    assert sent[0]["status"] == 401 and b"connection" not in dict(sent[0]["headers"])
    assert metrics.get("hyperbagel_request_seconds_count", path="other") == 1
