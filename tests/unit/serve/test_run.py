"""The listening place."""

from __future__ import annotations

import socket

import pytest

from hyperbagel import cli
from hyperbagel.core.errors import InputError
from hyperbagel.pipeline import HyperBagel
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


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a..b", "192.0.2.1", "", " "])
def test_a_host_that_is_not_this_machine(host: str) -> None:
    with pytest.raises(InputError, match=r"expected an address of this machine; try --host 127\.0\.0\.1"):
        bind(host, 0)


def test_a_taken_port_costs_no_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(HyperBagel, "from_pretrained", lambda **_: pytest.fail("the model was loaded first"))
    with bind("127.0.0.1", 0) as taken:
        assert cli.main(["serve", "--port", str(taken.getsockname()[1])]) == 2
    assert "expected a free port; try --port 0" in capsys.readouterr().err
