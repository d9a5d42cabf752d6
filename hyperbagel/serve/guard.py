"""What stands in front of every endpoint: the host, the key, the page a request comes from, its body, the count, and a last net for errors.

Plain ASGI, so that streams pass through untouched and a disconnect reaches the endpoint.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from hyperbagel.serve.metrics import Metrics
from hyperbagel.serve.schemas import ApiError, Limits

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

logger = logging.getLogger("hyperbagel.serve")
OPEN_PATHS = {"/health", "/"}  # answered without a key; so is the web page, which asks for it itself
OPEN_FOLDER = "/ui/"


class Guard:
    """Wraps an ASGI app.

    api_key: what `Authorization: Bearer ...` must hold; None: no key is asked for.
    limits: of bodies.
    paths: what is counted under its own name; others count as "other", so that scanners do not fill the metrics.
    hosts: names by which this server may be called, besides those that cannot be a stranger's; None: any.
    """

    def __init__(
        self, app: App, *, api_key: str | None, limits: Limits, metrics: Metrics, paths: set[str], hosts: Collection[str] | None = None
    ) -> None:
        self.app, self.metrics, self.limits, self.paths = app, metrics, limits, paths
        self.api_key, self.hosts = api_key, hosts
        self.held = 0  # bytes of the bodies of all requests at work and waiting: each is kept until it is answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket" and not self._is_ours(_headers(scope)):
            await receive()  # its beginning
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self.app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        began, status, gone, body = time.perf_counter(), 0, False, _Body(self, _headers(scope))

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if body.refused is not None:  # whatever the app made of a body that was cut off
                return
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        async def receiving() -> MutableMapping[str, Any]:
            nonlocal gone
            message = await body.next(receive)
            gone = gone or message["type"] == "http.disconnect"
            return message

        try:
            self._check(scope)
            body.expect()
            await self.app(scope, receiving, sending)
            if body.refused is not None:
                raise body.refused
        except Exception as error:
            if gone:  # in the middle of its request or of its answer: there is nobody to tell
                return
            if not isinstance(error, ApiError):
                logger.exception("error while answering %s %r", scope["method"], scope["path"])  # %r: a path may hold line ends
                error = internal_error()
            if status == 0:
                status = error.status
                await _answer(send, error, close=error is body.refused)
        finally:
            self.held -= body.seen
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.add("hyperbagel_requests_total", path=path, status=str(status or 499))
            self.metrics.observe("hyperbagel_request_seconds", time.perf_counter() - began, path=path)

    def _check(self, scope: Scope) -> None:
        headers = _headers(scope)
        if not self._is_ours(headers):
            raise ApiError(
                403,
                f"got the host {headers['host'][:80]!r}, expected localhost or an address; "
                "start the server with --allow-host and this name, or with a key",
                code="unknown_host",
            )
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path not in OPEN_PATHS and not path.startswith(OPEN_FOLDER):
            kind, _, given = headers.get("authorization", "").partition(" ")
            check_key(self.api_key, given.strip().encode("latin-1") if kind.lower() == "bearer" else b"")
        if self.api_key is None and scope["method"] not in ("GET", "HEAD", "OPTIONS") and is_foreign(headers):
            raise ApiError(
                403,
                "got a page of another site, expected one of this server; open the server's own address, or start it with a key",
                code="foreign_page",
            )

    def _is_ours(self, headers: Mapping[str, str]) -> bool:
        return self.hosts is None or "host" not in headers or is_own_name(headers["host"], self.hosts)


class _Body:
    """The body of one request, as it comes: how much, how slowly, of how many values."""

    def __init__(self, guard: Guard, headers: Mapping[str, str]) -> None:
        self.guard, self.limits = guard, guard.limits
        self.form = headers.get("content-type", "").startswith("multipart/")
        length = headers.get("content-length", "0")
        self.length = int(length) if re.fullmatch("[0-9]{1,18}", length) else 0
        self.seen, self.marks, self.whole = 0, 0, False
        self.refused: ApiError | None = None

    def expect(self) -> None:
        """Refuses at once what says itself that it is too long."""
        self._measure(self.length)

    async def next(self, receive: Receive) -> MutableMapping[str, Any]:
        try:
            # Once the body is whole, what comes is that the client leaves, whenever that may be.
            message = await asyncio.wait_for(receive(), None if self.whole else self.limits.body_seconds)
        except TimeoutError as error:
            told = f"got no more of the body for {self.limits.body_seconds:g} s, expected it whole; send it again"
            raise self._refuse(ApiError(408, told, code="body_too_slow")) from error
        data = message.get("body", b"")
        self.whole = self.whole or not message.get("more_body", False)
        self.seen += len(data)
        self.guard.held += len(data)
        self._measure(self.seen)
        if not self.form:
            self.marks += sum(map(data.count, (b",", b"[", b"{")))
            if self.marks > self.limits.json_values:
                told = f"got a body of more than {self.limits.json_values} values, expected fewer; shorten it"
                raise self._refuse(ApiError(413, told, code="body_too_large"))
        return message

    def _measure(self, length: int) -> None:
        if length > self.limits.body_bytes:
            told = f"got a body above {self.limits.body_bytes} bytes, expected less; send smaller or fewer pictures"
            raise self._refuse(ApiError(413, told, code="body_too_large"))
        room = max(self.limits.bodies_bytes, self.limits.body_bytes)
        if self.guard.held - self.seen + length > room:
            told = f"got more than the {room} bytes that all bodies may take together, expected room; try again"
            refused = ApiError(429, told, type="rate_limit_error", code="bodies_full", headers={"retry-after": "1"})
            raise self._refuse(refused)

    def _refuse(self, error: ApiError) -> ApiError:
        self.refused = error
        return error


def _headers(scope: Scope) -> dict[str, str]:
    return {name.lower().decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def is_own_name(host: str, allowed: Collection[str]) -> bool:
    """Whether a Host header cannot be a stranger's. Any site may let its name point at this machine, and its page is then of one origin
    with this server; what it cannot have is an address for a name, or a name that the public DNS does not hold."""
    try:
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:  # no host at all
        return False
    try:
        ipaddress.ip_address(name)
        return True
    except ValueError:
        return "." not in name or name.endswith((".localhost", ".local", ".internal")) or name in allowed


def is_foreign(headers: Mapping[str, str]) -> bool:
    """Whether a page of another site sends this. Browsers let any page send a form anywhere; programs send no origin, and what is built
    like a browser (an extension, a desktop program) has one of its own kind."""
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if origin is not None and origin != "null" and not origin.startswith(("http://", "https://")):
        return False
    if site is not None:
        return site not in ("same-origin", "none")
    return not is_same_origin(headers)


def is_same_origin(headers: Mapping[str, str]) -> bool:
    """Whether the page that sends this is the server's own, by name and port; so is what is no page."""
    origin = headers.get("origin")
    try:
        return origin is None or urlsplit(origin).netloc == headers.get("host")
    except ValueError:  # no address at all
        return False


def check_key(expected: str | None, given: bytes) -> None:
    """Raises ApiError (401) for another key than the expected one; None: any will do."""
    # constant time: how long it takes says nothing about how much of the key was right
    if expected is not None and not hmac.compare_digest(given, expected.encode()):
        raise ApiError(
            401,
            "got no API key or a wrong one, expected 'Authorization: Bearer KEY'; give the key the server was started with",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )


def internal_error() -> ApiError:
    """What a client is told of a failure that is ours. The traceback is in the log; trying again would fail again."""
    return ApiError(500, "internal error; the server's log says more", type="server_error", headers={"x-should-retry": "false"})


async def _answer(send: Send, error: ApiError, close: bool) -> None:
    """close: what is left of a refused body is not read, so the connection cannot be used again."""
    body = json.dumps(error.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    headers |= {"connection": "close"} if close else {}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
