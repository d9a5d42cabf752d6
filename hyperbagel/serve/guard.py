"""Middleware before every endpoint. It checks the host name, the key, the origin and the body's size, counts requests, and catches errors.

It is plain ASGI, so that streams pass through untouched and a disconnect reaches the endpoint.
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

from hyperbagel.core.errors import InputError
from hyperbagel.serve.metrics import Metrics
from hyperbagel.serve.schemas import ApiError, Limits

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

logger = logging.getLogger("hyperbagel.serve")
# Answered without a key. The web page is among them: it asks its user for the key.
OPEN_PATHS = {"/health", "/"}
OPEN_FOLDER = "/ui/"


class Guard:
    """Wraps an ASGI app.

    api_key: what `Authorization: Bearer ...` must hold; None: no key is needed.
    limits: those on bodies are enforced here.
    paths: paths that are counted under their own names; all others count as "other", so that scanners do not fill the metrics.
    hosts: host names accepted besides those that `is_own_name` accepts anyway; None: any.
    """

    def __init__(
        self, app: App, *, api_key: str | None, limits: Limits, metrics: Metrics, paths: set[str], hosts: Collection[str] | None = None
    ) -> None:
        self.app, self.metrics, self.limits, self.paths = app, metrics, limits, paths
        self.api_key, self.hosts = api_key, hosts
        self.held = 0  # bytes of the bodies of all unanswered requests: a body is kept in memory until its request is answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket" and not self._is_ours(_headers(scope)):
            await receive()  # websocket.connect
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self.app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        began, status, gone, headers = time.perf_counter(), 0, False, _headers(scope)
        body = _Body(self, headers)

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if body.refused is not None:  # the app answers a body that was cut off; the refusal is sent instead
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
            self._check(scope, headers)
            body.expect()
            await self.app(scope, receiving, sending)
            if body.refused is not None:
                raise body.refused
        except Exception as error:
            if gone:  # the client left before the end: there is nobody to tell
                return
            if not isinstance(error, ApiError):
                logger.exception("error while answering %s %r", scope["method"], scope["path"])  # %r: a path may contain line ends
                error = internal_error()
            if status == 0:
                status = error.status
                await _answer(send, error, close=error is body.refused)
        finally:
            self.held -= body.seen
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.add("hyperbagel_requests_total", path=path, status=str(status or 499))
            self.metrics.observe("hyperbagel_request_seconds", time.perf_counter() - began, path=path)

    def _check(self, scope: Scope, headers: Mapping[str, str]) -> None:
        """Raises ApiError unless host, key and origin are right."""
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
            # Stripped as bytes: as latin-1 text the last byte of a UTF-8 letter may be a space.
            check_key(self.api_key, given.encode("latin-1").strip() if kind.lower() == "bearer" else b"")
        if self.api_key is None and scope["method"] not in ("GET", "HEAD", "OPTIONS") and is_foreign(headers):
            raise ApiError(
                403,
                "got a request from a page of another site, expected this server's own page; open its address, or start it with a key",
                code="foreign_page",
            )

    def _is_ours(self, headers: Mapping[str, str]) -> bool:
        return self.hosts is None or "host" not in headers or is_own_name(headers["host"], self.hosts)


class _Body:
    """The body of one request as it arrives. It is refused if it is too large, too slow or has too many JSON values.

    A refusal is raised to the app, and kept in `refused`: the app may swallow it, and its answer must then not be sent.
    """

    def __init__(self, guard: Guard, headers: Mapping[str, str]) -> None:
        self.guard, self.limits = guard, guard.limits
        self.form = headers.get("content-type", "").startswith("multipart/")
        length = headers.get("content-length", "0")
        self.length = int(length) if re.fullmatch("[0-9]{1,18}", length) else 0
        self.seen = 0  # bytes
        self.marks = 0  # commas and opening brackets: a bound on the number of JSON values, which is at most one more
        self.whole = False
        self.refused: ApiError | None = None

    def expect(self) -> None:
        """Refuses a body by its Content-Length, before any of it is read."""
        self._measure(self.length)

    async def next(self, receive: Receive) -> MutableMapping[str, Any]:
        """The next ASGI message. Raises ApiError: 408, 413 or 429."""
        try:
            # After the whole body the only message left is the client's disconnect, which may come at any time.
            message = await asyncio.wait_for(receive(), None if self.whole else self.limits.body_seconds)
        except TimeoutError as error:
            told = f"got no more of the body for {self.limits.body_seconds:g} s, expected the rest; send the request again"
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
        """Refuses a body of `length` bytes if it is too large itself, or too large beside the other bodies held."""
        if length > self.limits.body_bytes:
            told = f"got a body of more than {self.limits.body_bytes} bytes, expected a shorter one; send smaller or fewer pictures"
            raise self._refuse(ApiError(413, told, code="body_too_large"))
        room = max(self.limits.bodies_bytes, self.limits.body_bytes)
        if self.guard.held - self.seen + length > room:
            told = f"got more than the {room} bytes that all requests' bodies may take together, expected room; try again"
            refused = ApiError(429, told, type="rate_limit_error", code="bodies_full", headers={"retry-after": "1"})
            raise self._refuse(refused)

    def _refuse(self, error: ApiError) -> ApiError:
        self.refused = error
        return error


def _headers(scope: Scope) -> dict[str, str]:
    return {name.lower().decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def host_name(host: str) -> str:
    """The name in a Host header or of a host: lower case, without a port. Raises ValueError for what is not a host."""
    return (urlsplit(f"//{host}").hostname or "").rstrip(".")


def host_names(hosts: Collection[str]) -> set[str]:
    """The names that Host headers are compared with. Raises InputError for what is no host, such as a URL, which would never be equal."""
    for host in hosts:
        try:
            usable = "/" not in host and host_name(host) != ""
        except ValueError:
            usable = False
        if not usable:
            raise InputError(f"got the host {host!r}, expected a name as in draw.example.org; leave out scheme and path")
    return set(map(host_name, hosts))


def is_own_name(host: str, allowed: Collection[str]) -> bool:
    """Whether a Host header names this server and not another site: an IP address, a name outside the public DNS, or one of `allowed`.

    This stops DNS rebinding: a site can make its own name point at this machine, and its page then has the same origin as this server.
    """
    try:
        name = host_name(host)
    except ValueError:  # not a host
        return False
    try:
        ipaddress.ip_address(name)
        return True
    except ValueError:
        return "." not in name or name.endswith((".localhost", ".local", ".internal")) or name in allowed


def is_foreign(headers: Mapping[str, str]) -> bool:
    """Whether a page of another site sent the request: browsers let any page post a form to any address.

    Programs send no Origin. Browser extensions and desktop programs send one with a scheme of their own, and are no sites.
    """
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if origin is not None and origin != "null" and not origin.startswith(("http://", "https://")):
        return False
    if site is not None:
        return site not in ("same-origin", "none")
    return not is_same_origin(headers)


def is_same_origin(headers: Mapping[str, str]) -> bool:
    """Whether Origin and Host agree on name and port, that is, the server's own page sent this. A missing Origin (a program) agrees."""
    origin = headers.get("origin")
    try:
        return origin is None or urlsplit(origin).netloc == headers.get("host")
    except ValueError:  # not a URL
        return False


def check_key(expected: str | None, given: bytes) -> None:
    """Raises ApiError (401) if the given key is not the expected one. expected: None if no key is needed."""
    # compare_digest takes constant time, which says nothing about how much of the key was right
    if expected is not None and not hmac.compare_digest(given, expected.encode()):
        raise ApiError(
            401,
            "got no API key or a wrong one, expected 'Authorization: Bearer KEY'; send the key that the server was started with",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )


def internal_error() -> ApiError:
    """What a client is told of a failure that is the server's. The log has the traceback; a retry would fail again."""
    return ApiError(500, "internal error; the server's log says more", type="server_error", headers={"x-should-retry": "false"})


async def _answer(send: Send, error: ApiError, close: bool) -> None:
    """Sends an error as the whole answer. close: the rest of a refused body is not read, so the connection cannot be used again."""
    body = json.dumps(error.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    headers |= {"connection": "close"} if close else {}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
