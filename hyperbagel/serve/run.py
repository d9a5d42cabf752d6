"""Running the server on a socket."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from hyperbagel.core.errors import InputError
from hyperbagel.serve.app import DRAIN_SECONDS


def bind(host: str, port: int) -> socket.socket:
    """A listening place. Port 0: any free one. Raises InputError if it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol must be named: asyncio turns Nagle's algorithm off (40 ms an answer) only on sockets that say they are TCP.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)  # from here on connections wait instead of being refused, also before the first is served
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise InputError(f"got {host}:{port}, which cannot be listened on ({reason}), expected a free port; try --port 0") from error
    return listener


def make_server(app: FastAPI) -> uvicorn.Server:
    """SIGINT and SIGTERM: nothing new is taken, what runs is finished for up to DRAIN_SECONDS, a second signal ends at once."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(DRAIN_SECONDS),
        ws="websockets-sansio",
        ws_max_size=app.state.body_bytes,
        ws_per_message_deflate=False,  # PNGs do not shrink
    )
    return uvicorn.Server(config)


def run(app: FastAPI, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serves until it is told to stop. `ready` is called with the address before the first request."""
    listener = bind(host, port)
    try:
        shown = f"[{host}]" if ":" in host else host
        ready(f"http://{shown}:{listener.getsockname()[1]}")
        make_server(app).run(sockets=[listener])
    finally:
        listener.close()
