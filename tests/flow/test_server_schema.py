"""Schemathesis makes requests from the OpenAPI schema, fitting and unfitting ones: no answer is a 5xx, all are as the schema says."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings, strategies
from hypothesis import Phase as Generation
from PIL import Image
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from hyperbagel.pipeline import HyperBagel
from hyperbagel.serve.app import create_app
from hyperbagel.serve.schemas import Limits

# Overridden student settings are told on stderr, thousands of times here.
pytestmark = pytest.mark.filterwarnings("ignore::hyperbagel.core.errors.Notice")
EXAMPLES = 40  # of each endpoint and kind
MEANT = {"model": "tiny", "student": "6", "size": "32x32"}  # texts that the schema cannot know
MOST = {"steps": 2, "n": 2, "max_tokens": 2, "max_completion_tokens": 2, "max_output_tokens": 2, "max_think_tokens": 2}  # the limits below


@pytest.fixture
def app(model: HyperBagel) -> Iterator[Any]:
    """Fresh for each test: Schemathesis shuts an application down when its test ends."""
    app = create_app(model, limits=Limits(steps=2, max_tokens=2, n=2, waiting=1000))
    yield app
    app.state.engine.close(10)


@pytest.fixture
def schema(app: Any) -> Any:
    loaded = schemathesis.openapi.from_asgi("/openapi.json", app)

    @loaded.hook("map_body")  # type: ignore[untyped-decorator]
    def quick(context: Any, body: Any) -> Any:
        """Most random requests would be refused for a name or a number; those that fit otherwise shall be worked on."""
        if not isinstance(body, dict):
            return body
        limits = {"/v1/chat/completions": "max_tokens", "/v1/responses": "max_output_tokens"}
        quick = {"steps": 1, "max_think_tokens": 1, limits.get(context.operation.path, "steps"): 1}  # left out: 50 steps, 1024 tokens
        body = quick | body
        for name in ("messages", "input"):
            if isinstance(turns := body.get(name), list):
                body[name] = [*turns, {"role": "user", "content": "x"}]
        body |= {name: value for name, value in MEANT.items() if isinstance(body.get(name), str)}
        return body | {name: min(body[name], top) for name, top in MOST.items() if type(body.get(name)) is int}

    load_all_checks()
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(buffer, "PNG")
    schemathesis.openapi.format("binary", strategies.just(buffer.getvalue()) | strategies.binary())
    return loaded


OPERATIONS = [
    ("get", "/health"),
    ("get", "/version"),
    ("get", "/metrics"),
    ("get", "/v1/models"),
    ("get", "/v1/models/{model}"),
    ("post", "/v1/images/generations"),
    ("post", "/v1/images/edits"),
    ("post", "/v1/chat/completions"),
    ("post", "/v1/responses"),
]


def test_every_operation_is_here(schema: Any) -> None:
    assert sorted((found.ok().method, found.ok().path) for found in schema.get_all_operations()) == sorted(OPERATIONS)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_no_request_of_the_schema_is_answered_with_a_failure(method: str, path: str, schema: Any) -> None:
    operation = schema[path][method.upper()]
    seen: set[int] = set()
    names = ["not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"]
    checks = CHECKS.get_by_names(names)
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
        if mode is GenerationMode.NEGATIVE and method == "get":
            continue  # nothing to get wrong

        def send(case: Any) -> None:
            answer = case.call()
            seen.add(answer.status_code)
            case.validate_response(answer, checks=checks)

        limit = settings(
            max_examples=EXAMPLES if method == "post" else 5,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Generation.generate],
            suppress_health_check=list(HealthCheck),
        )
        limit(given(case=operation.as_strategy(generation_mode=mode))(send))()
    assert max(seen) < 500
    assert 200 in seen or "{" in path, "some were answered"
    if method == "post":
        assert 400 in seen, "and some refused"
