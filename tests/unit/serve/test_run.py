"""The listening place."""

from __future__ import annotations

import os
import socket
import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from hyperbagel import cli
from hyperbagel.core.errors import InputError, Notice
from hyperbagel.pipeline import HyperBagel
from hyperbagel.serve import run
from hyperbagel.serve.run import bind, url_of
from hyperbagel.serve.schemas import Limits


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


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as trial:
            trial.bind(("::1", 0))
        return True
    except OSError:
        return False


@pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6")
def test_an_ipv6_address_is_listened_on() -> None:
    with bind("::1", 0) as listener, socket.create_connection(listener.getsockname()[:2], timeout=5):
        pass


def test_the_address_of_an_ipv6_host_has_brackets() -> None:
    assert [url_of(host, 80) for host in ("::1", "box")] == ["http://[::1]:80", "http://box:80"]


def test_a_place_can_be_taken_again_at_once_and_says_that_it_is_tcp() -> None:
    with bind("127.0.0.1", 0) as listener:
        assert bool(listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)) == (os.name == "posix")
        assert listener.proto == socket.IPPROTO_TCP


def test_a_first_answer_that_fails_is_told_and_ends_nothing() -> None:
    def fails(*given: object, **more: object) -> None:
        raise RuntimeError("no kernel")

    with pytest.warns(Notice, match="the first answer failed .*no kernel"):
        run.warm_up(SimpleNamespace(ask_batch=fails))  # type: ignore[arg-type]


def test_every_request_s_notice_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python by itself shows one and the same place's only once."""

    def serve(sockets: object) -> None:
        for _ in range(2):
            warnings.warn("the plan was cut", Notice, stacklevel=1)

    monkeypatch.setattr(run, "make_server", lambda app: SimpleNamespace(run=serve))
    said: list[str] = []
    with warnings.catch_warnings(record=True) as told, bind("127.0.0.1", 0) as listener:
        warnings.simplefilter("default")
        run.run(None, listener, "127.0.0.1", said.append)  # type: ignore[arg-type]
        assert said == [url_of("127.0.0.1", listener.getsockname()[1])]
    assert len(told) == 2


@pytest.mark.parametrize(
    ("seconds", "drafter", "sizes"), [(0.1, "block", [1, 2, 4, 8]), (3.0, "block", [1]), (1.1, "block", [1, 2]), (0.1, None, [1])]
)
def test_a_warm_up_tries_batches_as_long_as_they_take_little(
    seconds: float, drafter: str | None, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where answers are drafted: nothing else depends on how many there are. `seconds`: what each row takes."""
    now, asked = [0.0], list[int]()

    def ask_batch(requests: list[Any]) -> list[Any]:
        asked.append(len(requests))
        now[0] += seconds * len(requests)
        return [SimpleNamespace(drafter=drafter)] * len(requests)

    monkeypatch.setattr(run.time, "perf_counter", lambda: now[0])
    run.warm_up(SimpleNamespace(ask_batch=ask_batch))  # type: ignore[arg-type]
    assert asked == sizes


def test_limits_that_are_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(HyperBagel, "from_pretrained", lambda **_: None)
    monkeypatch.setattr(run, "warm_up", lambda model, batch: seen.append(batch))
    monkeypatch.setattr(run, "run", lambda *_: None)
    monkeypatch.setattr("hyperbagel.serve.app.create_app", lambda *_, **more: seen.append(more["limits"]))
    assert cli.main(["serve", "--port", "0", "--queue", "3", "--batch", "2"]) == 0, capsys.readouterr().err
    assert seen == [2, Limits(waiting=3, batch=2)]
    assert cli.main(["serve", "--batch", "0"]) == 2 and "got --batch 0" in capsys.readouterr().err
