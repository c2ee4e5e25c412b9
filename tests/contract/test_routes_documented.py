"""The document says of the API what the API is."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest
from openapi_spec_validator import validate
from starlette.applications import Starlette
from starlette.routing import Route, WebSocketRoute

from gateway.app import ROUTES
from gateway.docs_page import routes as docs_routes
from gateway.errors import MEANINGS, every_error
from gateway.openapi import document


def served() -> Iterator[tuple[str, str]]:
    """(path template, method) of everything that the application answers to."""
    for route in ROUTES:
        assert isinstance(route, Route | WebSocketRoute)
        path = re.sub(r"\{(\w+):\w+\}", r"{\1}", route.path)
        methods = {"GET"} if isinstance(route, WebSocketRoute) else (route.methods or set()) - {"HEAD"}
        yield from ((path, method.lower()) for method in methods)


def documented() -> Iterator[tuple[str, str]]:
    for path, methods in document()["paths"].items():
        yield from ((path, method) for method in methods)


def test_the_document_is_valid_openapi_3_1() -> None:
    assert document()["openapi"].startswith("3.1")
    validate(document())


def test_what_is_served_is_documented_and_the_other_way_round() -> None:
    assert sorted(served()) == sorted(documented())


def test_paths_name_their_parameters() -> None:
    for path, methods in document()["paths"].items():
        for operation in methods.values():
            named = {item["name"] for item in operation.get("parameters", ()) if item["in"] == "path"}
            assert named == set(re.findall(r"\{(\w+)\}", path))


def test_every_operation_may_be_refused() -> None:
    for methods in document()["paths"].values():
        for operation in methods.values():
            assert operation["responses"]["default"] == {"$ref": "#/components/responses/Problem"}


def test_every_code_is_documented() -> None:
    codes = {error.code for error in every_error()}
    assert codes <= set(document()["x-codes"]) == set(MEANINGS)
    assert document()["components"]["schemas"]["Problem"]["properties"]["code"]["enum"] == sorted(MEANINGS)


@pytest.fixture
def http() -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(Starlette(routes=docs_routes)), base_url="http://test")


async def test_the_page_has_everything_and_needs_nothing(http: httpx.AsyncClient) -> None:
    response = await http.get("/", follow_redirects=True)
    assert response.url.path == "/docs"
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    for path, _ in documented():
        assert f"<code>{path}</code>" in response.text
    for code in MEANINGS:
        assert f'id="{code.lower()}"' in response.text  # where a problem's `type` leads
    assert not re.search(r"""(src|href)=["'](https?:)?//""", response.text)
    assert "<script" not in response.text
    assert (await http.get("/openapi.json")).json() == document()
