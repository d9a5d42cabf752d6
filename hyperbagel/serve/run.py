"""Running the server on a socket."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import warnings
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from hyperbagel.core.errors import InputError, Notice
from hyperbagel.core.files import one_line
from hyperbagel.pipeline import HyperBagel
from hyperbagel.serve.app import DRAIN_SECONDS


def warm_up(model: HyperBagel) -> None:
    """An answer that nobody waits for: libraries find their kernels, and what drafting costs here is measured (1 to 2 s on a CPU)."""
    try:
        model.ask("hello", max_tokens=2)
    except Exception as error:  # of a request it would be that request's; pictures may well be drawn
        warnings.warn(f"the first answer failed ({one_line(error)}), and others may", Notice, stacklevel=2)


def bind(host: str, port: int) -> socket.socket:
    """A listening place. Port 0: any free one. Raises InputError if it cannot be had."""
    if not host.strip():  # to a socket it is every address of this machine
        raise InputError("got an empty host, expected an address of this machine; try --host 127.0.0.1, or 0.0.0.0 for every one")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol must be named: asyncio turns Nagle's algorithm off (40 ms an answer) only on sockets that say they are TCP.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)  # from here on connections wait instead of being refused, also before the first is served
    except (OSError, UnicodeError) as error:  # UnicodeError: no name at all, such as "a..b"
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        own = isinstance(error, UnicodeError | socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
        told = "an address of this machine; try --host 127.0.0.1" if own else "a free port; try --port 0"
        raise InputError(f"got {host}:{port}, which cannot be listened on ({reason}), expected {told}") from error
    return listener


class _Server(uvicorn.Server):
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A second Ctrl-C ends the process here: on the way that uvicorn takes each request leaves a traceback, and Python's own end kills
        the engine's threads in the middle of a computation, which aborts the process."""
        if self.should_exit and sig == signal.SIGINT:
            os.write(2, b"\ninterrupted; what was at work is lost\n")  # not print: this may have cut into another one
            os._exit(130)
        super().handle_exit(sig, frame)


def make_server(app: FastAPI) -> uvicorn.Server:
    """SIGINT and SIGTERM: nothing new is taken, what runs is finished for up to DRAIN_SECONDS; a second Ctrl-C ends at once."""
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
    logging.getLogger("uvicorn.error").addFilter(_is_news)
    return _Server(config)


def _is_news(record: logging.LogRecord) -> bool:
    """What was given up when DRAIN_SECONDS had passed is told in a line; the traceback of each says nothing more."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def run(app: FastAPI, listener: socket.socket, host: str, ready: Callable[[str], None]) -> None:
    """Serves at a place of `bind` until it is told to stop. `ready` is called with the address before the first request."""
    warnings.filterwarnings("always", category=Notice)  # each is of one request; Python would show the first of them alone
    shown = f"[{host}]" if ":" in host else host
    ready(f"http://{shown}:{listener.getsockname()[1]}")
    make_server(app).run(sockets=[listener])
