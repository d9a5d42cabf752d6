"""A browser and a server for the tests of the web page: Debian's Chromium, the tiny model, a loopback socket."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.browser import CHROMIUM, chromium
from hyperbagel.pipeline import HyperBagel
from hyperbagel.serve.app import create_app
from hyperbagel.serve.schemas import Limits

Serving = Callable[[Any], AbstractContextManager[str]]


@pytest.fixture(scope="module")
def app(model: HyperBagel) -> Any:
    return create_app(model, limits=Limits(steps=10_000))


@pytest.fixture(scope="module")
def address(app: Any, serving: Serving) -> Iterator[str]:
    with serving(app) as address:
        yield f"{address}/"


@pytest.fixture(scope="module")
def locked(model: HyperBagel, serving: Serving) -> Iterator[str]:
    """A server that asks for a key."""
    with serving(create_app(model, api_key="sesame")) as address:
        yield f"{address}/"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium with an empty profile, or a skip."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: requirements/chromium.sh installs it, or apt-get install chromium")
    with chromium(accept_downloads=True) as context:
        yield context


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Callable[..., Any]]:
    """Opens the page: visit("draw", width=375). Afterwards nothing may have gone wrong in it that a test did not expect."""
    pages: list[Any] = []
    wrong: list[str] = []

    def open_page(tab: str = "draw", *, width: int = 1100, height: int = 800, at: str = address, ready: bool = True) -> Any:
        page = browser.new_page()
        pages.append(page)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if "Content Security Policy" in message.text else None)
        page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith((at, "blob:", "data:")) else None)
        page.set_viewport_size({"width": width, "height": height})
        page.goto(f"{at}#{tab}")
        if ready:
            page.wait_for_selector("body[data-ready]")
        return page

    yield open_page
    for page in pages:
        page.close()
    assert wrong == [], "errors in the page, or requests to somewhere else"


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture that was not made here."""
    from PIL import Image

    image = Image.radial_gradient("L").resize((32, 32)).convert("RGB")
    image.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"
