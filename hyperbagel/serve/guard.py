"""What stands in front of every endpoint: the key, the size of the body, the count, and a last net for errors.

Plain ASGI, so that streams pass through untouched and a disconnect reaches the endpoint.
"""

from __future__ import annotations

import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from hyperbagel.serve.metrics import Metrics
from hyperbagel.serve.schemas import ApiError

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
    paths: what is counted under its own name; others count as "other", so that scanners do not fill the metrics.
    """

    def __init__(self, app: App, *, api_key: str | None, body_bytes: int, metrics: Metrics, paths: set[str]) -> None:
        self.app, self.metrics, self.body_bytes, self.paths = app, metrics, body_bytes, paths
        self.api_key = api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, seen, gone = time.perf_counter(), 0, 0, False

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if seen > self.body_bytes:  # whatever the app made of a body that was cut off
                return
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        async def receiving() -> MutableMapping[str, Any]:
            nonlocal seen, gone
            message = await receive()
            gone = gone or message["type"] == "http.disconnect"
            seen += len(message.get("body", b""))
            if seen > self.body_bytes:
                raise self._too_large()
            return message

        try:
            self._check(scope)
            await self.app(scope, receiving, sending)
            if seen > self.body_bytes:
                raise self._too_large()
        except Exception as error:
            if gone:  # in the middle of its request or of its answer: there is nobody to tell
                return
            if not isinstance(error, ApiError):
                logger.exception("error while answering %s %s", scope["method"], scope["path"])
                error = internal_error()
            if status == 0:
                status = error.status
                await _answer(send, error)
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.add("hyperbagel_requests_total", path=path, status=str(status or 499))
            self.metrics.observe("hyperbagel_request_seconds", time.perf_counter() - began, path=path)

    def _check(self, scope: Scope) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path not in OPEN_PATHS and not path.startswith(OPEN_FOLDER):
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            check_key(self.api_key, given.strip() if kind.lower() == b"bearer" else b"")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.body_bytes:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"got a body above {self.body_bytes} bytes, expected less; send smaller or fewer pictures", code="body_too_large"
        )


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


async def _answer(send: Send, error: ApiError) -> None:
    body = json.dumps(error.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    # what is left of a refused body is not read, so the connection cannot be used again
    headers |= {"connection": "close"} if error.status == 413 else {}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
