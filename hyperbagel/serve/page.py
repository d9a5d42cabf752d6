"""Serves the web page: the files of hyperbagel/serve/ui/, which load nothing from elsewhere and use the public API like any client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles

FOLDER = Path(__file__).parent / "ui"
# Scripts and styles come from this server alone, so text that a model or another user wrote can never become code in the page.
POLICY = "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
HEADERS = {"cache-control": "no-cache", "x-content-type-options": "nosniff", "content-security-policy": POLICY}


class _Files(StaticFiles):
    """Files that the browser revalidates each time (a 304 costs little), so that a page and its modules are always of one version."""

    def file_response(self, *args: Any, **more: Any) -> Response:
        response = super().file_response(*args, **more)
        response.headers.update(HEADERS)
        return response


def add_page(app: FastAPI) -> None:
    """Adds GET / and /ui/*, which need no key."""

    async def index() -> FileResponse:
        return FileResponse(FOLDER / "index.html", media_type="text/html", headers=HEADERS)

    app.add_api_route("/", index, methods=["GET", "HEAD"], include_in_schema=False, response_model=None)
    app.mount("/ui", _Files(directory=FOLDER), name="ui")
