"""Runs the ASGI application on a socket, with uvicorn: listening, warming up, shutting down."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import time
import warnings
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from hyperbagel.core.errors import InputError, Notice
from hyperbagel.core.files import one_line
from hyperbagel.pipeline import AskRequest, HyperBagel
from hyperbagel.serve.app import DRAIN_SECONDS

LONG = 2.0  # seconds for a batch's throwaway answers, from which on larger batches are not tried


def warm_up(model: HyperBagel, batch: int = 8) -> None:
    """Asks the model throwaway questions, so that no client waits for libraries to choose their kernels and for drafting to be timed.

    One question, then, if answers are drafted, 2, 4, ... up to `batch` at once, since questions join one another: drafting goes by the
    costs of as many rows as there are. The embedded model takes 3 s on a CPU; of one that takes long, larger batches are not tried. A
    failure is a Notice, not an error.
    """
    try:
        rows, more = 1, True
        while more and rows <= batch:
            start = time.perf_counter()
            first = model.ask_batch([AskRequest("hello", max_tokens=2)] * rows)[0]
            more, rows = first.drafter is not None and time.perf_counter() - start < LONG, 2 * rows
    except Exception as error:  # in a request it would fail that request alone; drawing may still work
        warnings.warn(f"the first answer failed ({one_line(error)}), and others may", Notice, stacklevel=2)


def bind(host: str, port: int) -> socket.socket:
    """A TCP socket that listens on host:port; port 0 takes any free one. Raises InputError if that is impossible."""
    if not host.strip():  # a socket takes it for every address of this machine
        raise InputError("got an empty host, expected an address of this machine; try --host 127.0.0.1, or 0.0.0.0 for every one")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol must be named: asyncio turns off Nagle's algorithm, which costs 40 ms per answer, only on sockets that say they are TCP.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    if os.name == "posix":  # elsewhere it would share a port that another program listens on
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)  # from here on connections wait instead of being refused, even while the model is still loading
    except (OSError, UnicodeError) as error:  # UnicodeError: not a host name at all, such as "a..b"
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        own = isinstance(error, UnicodeError | socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
        told = "an address of this machine; try --host 127.0.0.1" if own else "a free port; try --port 0"
        raise InputError(f"got {host}:{port}, which cannot be listened on ({reason}), expected {told}") from error
    return listener


def url_of(host: str, port: int) -> str:
    """The address that clients use; an IPv6 host needs brackets in it."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class _Server(uvicorn.Server):
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Ends the process at once at a second Ctrl-C. uvicorn's own way prints a traceback for each request, and Python's exit would kill
        the engine's threads in the middle of a computation, which aborts the process."""
        if self.should_exit and sig == signal.SIGINT:
            os.write(2, b"\ninterrupted; what was at work is lost\n")  # not print: the signal may have interrupted another print
            os._exit(130)
        super().handle_exit(sig, frame)


def make_server(app: FastAPI) -> uvicorn.Server:
    """The application under uvicorn. After SIGINT or SIGTERM it takes nothing new and finishes what runs, for up to DRAIN_SECONDS; a second
    Ctrl-C ends it at once."""
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
    logging.getLogger("asyncio").addFilter(_is_no_leaver)
    return _Server(config)


def _is_news(record: logging.LogRecord) -> bool:
    """False for the tracebacks of requests that were given up after DRAIN_SECONDS: uvicorn has already said so in one line."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def _is_no_leaver(record: logging.LogRecord) -> bool:
    """False for asyncio's remark that a client left while an answer was on its way to it, which is no fault of the server's."""
    return record.getMessage() != "socket.send() raised exception."


def run(app: FastAPI, listener: socket.socket, host: str, ready: Callable[[str], None]) -> None:
    """Serves on the socket of `bind(host, ...)` until a signal stops it. `ready` is called with the address before the first request."""
    warnings.filterwarnings("always", category=Notice)  # each concerns one request; Python would show only the first of them
    ready(url_of(host, listener.getsockname()[1]))
    make_server(app).run(sockets=[listener])
