"""A server without a key beside a browser that visits other sites; and one with a key beside those who have none."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
from fastapi import WebSocketDisconnect
from fastapi.testclient import TestClient
from server_world import KEY, png

from hyperbagel import cli
from hyperbagel.core.errors import InputError
from hyperbagel.pipeline import HyperBagel
from hyperbagel.serve.app import create_app
from hyperbagel.serve.schemas import Limits

EVIL = {"origin": "http://evil.example", "sec-fetch-site": "cross-site"}
DRAWING: dict[str, Any] = {"data": {"prompt": "x", "steps": "1"}, "files": {"image": png("red")}}


def test_another_site_s_page_cannot_have_pictures_drawn(model: HyperBagel) -> None:
    """It may send a form anywhere without asking."""
    with TestClient(create_app(model)) as http:
        answer = http.post("/v1/images/edits", headers=EVIL, **DRAWING)
        assert answer.status_code == 403 and answer.json()["error"]["code"] == "foreign_page"
        assert http.get("/v1/models", headers=EVIL).status_code == 200, "what it cannot read does no harm"
        for own in ({}, {"origin": "http://testserver", "sec-fetch-site": "same-origin"}):
            assert http.post("/v1/images/edits", headers=own, **DRAWING).status_code == 200
    with TestClient(create_app(model, api_key=KEY)) as http:
        assert http.post("/v1/images/edits", headers=EVIL, **DRAWING).status_code == 401
        known = EVIL | {"authorization": f"Bearer {KEY}"}
        assert http.post("/v1/images/edits", headers=known, **DRAWING).status_code == 200, "who knows the key is no stranger"


def test_a_name_that_was_pointed_at_this_machine(model: HyperBagel) -> None:
    with TestClient(create_app(model, hosts=["Draw.Example.org:8000"])) as http:
        for host, status in (("evil.example:8000", 403), ("draw.example.org", 200), ("127.0.0.1:8000", 200), ("localhost:8000", 200)):
            assert http.get("/v1/models", headers={"host": host}).status_code == status
        evil = {"host": "evil.example", "origin": "http://evil.example"}
        with pytest.raises(WebSocketDisconnect), http.websocket_connect("/v1/live", headers=evil):
            pass
        with http.websocket_connect("/v1/live", headers={"host": "localhost", "origin": "http://localhost"}) as socket:
            socket.send_json({"type": "hello"})
            assert socket.receive_json()["type"] == "ready"
    with TestClient(create_app(model)) as http:
        assert http.get("/v1/models", headers={"host": "evil.example"}).status_code == 200


@pytest.mark.parametrize(
    ("arguments", "hosts"),
    [
        ([], []),
        (["--allow-host", "a.example", "--allow-host", "b.example"], ["a.example", "b.example"]),
        (["--api-key", KEY], None),
        (["--host", "0.0.0.0"], None),
        (["--host", "0.0.0.0", "--allow-host", "a.example"], ["a.example"]),
    ],
)
def test_names_are_asked_about_where_nothing_else_keeps_strangers_out(
    arguments: list[str], hosts: list[str] | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hyperbagel.serve import app, run

    seen: list[Any] = []
    monkeypatch.delenv("HYPERBAGEL_API_KEY", raising=False)
    monkeypatch.setattr(HyperBagel, "from_pretrained", lambda **_: None)
    monkeypatch.setattr(run, "warm_up", lambda *_: None)
    monkeypatch.setattr(app, "create_app", lambda *_, **more: seen.append(more["hosts"]))
    monkeypatch.setattr(run, "run", lambda *_: None)
    assert cli.main(["serve", "--port", "0", *arguments]) == 0, capsys.readouterr().err
    assert seen == [hosts]


def test_an_empty_variable_does_not_open_the_server(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`-e HYPERBAGEL_API_KEY=$KEY` where there is no KEY."""
    monkeypatch.setattr(HyperBagel, "from_pretrained", lambda **_: pytest.fail("was loaded"))
    monkeypatch.setenv("HYPERBAGEL_API_KEY", "")
    assert cli.main(["serve", "--port", "0"]) == 2
    assert "got an empty HYPERBAGEL_API_KEY, expected a key" in capsys.readouterr().err


def test_a_key_from_a_file_with_its_line_s_end(model: HyperBagel) -> None:
    with TestClient(create_app(model, api_key=f"{KEY}\r\n")) as http:
        assert http.get("/v1/models", headers={"authorization": f"Bearer {KEY}"}).status_code == 200
        assert http.get("/v1/models", headers={"authorization": "Bearer wrong"}).status_code == 401
        with http.websocket_connect("/v1/live") as socket:
            socket.send_json({"type": "hello", "key": KEY})
            assert socket.receive_json()["type"] == "ready"


def test_who_has_no_key_takes_no_place_on_the_live_line(model: HyperBagel) -> None:
    with TestClient(create_app(model, api_key=KEY, limits=Limits(live=1))) as http, ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(http.websocket_connect("/v1/live"))
        socket = stack.enter_context(http.websocket_connect("/v1/live"))
        socket.send_json({"type": "hello", "key": KEY})
        assert socket.receive_json()["type"] == "ready"


def test_a_key_of_blanks_is_none(model: HyperBagel) -> None:
    with pytest.raises(InputError, match="empty API key"):
        create_app(model, api_key=" \n")
