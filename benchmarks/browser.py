"""Debian's Chromium, driven by Playwright: for the web page's tests, its pictures in the documentation, and the latency a user sees."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")
# The browser must neither use a GPU nor talk to anyone but the server.
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
]  # fmt: skip


@contextmanager
def chromium(*, timeout: float = 10.0, **options: Any) -> Iterator[Any]:
    """A Playwright browser context with an empty profile. timeout: seconds for each wait. options: Playwright's own for the context."""
    from playwright.sync_api import sync_playwright

    if CHROMIUM is None:
        raise SystemExit("got no program called chromium, expected Debian's; run requirements/chromium.sh")
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        sync_playwright() as playwright,
        playwright.chromium.launch_persistent_context(Path(profile), executable_path=CHROMIUM, args=FLAGS, **options) as context,
    ):
        context.set_default_timeout(timeout * 1e3)
        yield context


def open_tab(context: Any, address: str, tab: str, *, width: int = 1100, height: int = 800) -> Any:
    """Open the server's page at one of its tabs, ready for use. address: ends in a slash. width, height: of the window, in pixels."""
    page = context.new_page()
    page.set_viewport_size({"width": width, "height": height})
    page.goto(f"{address}#{tab}")
    page.wait_for_selector("body[data-ready]")
    return page


def live_settled(page: Any, tier: str | None = None) -> None:
    """Wait until the Live tab has no request pending and, if `tier` is given, shows a picture of that tier."""
    page.wait_for_selector(f"#live{f'[data-tier={tier}]' if tier else ''}:not([aria-busy])")


def live_opened(page: Any) -> None:
    """Wait until the Live tab is connected."""
    page.wait_for_function("() => document.querySelector('#live [data-link]').textContent === 'connected'")
