"""The listening place."""

from __future__ import annotations

import socket

import pytest

from hyperbagel.core.errors import InputError
from hyperbagel.serve.run import bind


def test_connections_wait_before_the_server_runs() -> None:
    """A client that reads the address as soon as it is printed must not be refused."""
    listener = bind("127.0.0.1", 0)
    try:
        with socket.create_connection(listener.getsockname(), timeout=5):
            pass
    finally:
        listener.close()


def test_a_taken_port_is_one_clear_error() -> None:
    taken = bind("127.0.0.1", 0)
    try:
        with pytest.raises(InputError, match="cannot be listened on"):
            bind("127.0.0.1", taken.getsockname()[1])
    finally:
        taken.close()
