"""`/openapi.json`, and the same as a page that needs nothing from anywhere else."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from html import escape
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from gateway.openapi import document

_STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 20%, transparent); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
section { border-top: 1px solid var(--line); padding: .5rem 0 1rem; }
h2 { margin-top: 2.5rem } h3 { margin-bottom: .2rem }
code { font: .9em ui-monospace, monospace }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line) }
.method { display: inline-block; min-width: 3.2rem; font-weight: 600 }
"""
_CSP = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


async def openapi(_: Request) -> Response:
    """The document itself."""
    return JSONResponse(document())


async def docs(_: Request) -> Response:
    """The document for people."""
    return HTMLResponse(_page(), headers={"content-security-policy": _CSP})


async def start(_: Request) -> Response:
    """The root leads to the documentation."""
    return RedirectResponse("/docs")


@cache
def _page() -> str:
    api = document()
    info = api["info"]
    operations = "".join(
        _operation(path, method, operation)
        for path, methods in api["paths"].items()
        for method, operation in methods.items()
    )
    schemas = "".join(_schema(name, schema) for name, schema in api["components"]["schemas"].items())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(info["title"])}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style>'
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1><p>{escape(info['description'])}"
        ' The same for machines: <a href="/openapi.json">openapi.json</a>.</p>'
        "<p>Send <code>Authorization: Bearer &lt;token&gt;</code>. Every answer carries <code>x-request-id</code>;"
        " every refusal is a problem (RFC 9457) with one of the codes below.</p>"
        f"<h2>Calls</h2>{operations}<h2>Codes</h2>{_codes(api['x-codes'])}<h2>Shapes</h2>{schemas}</html>"
    )


def _operation(path: str, method: str, operation: dict[str, Any]) -> str:
    rows = [
        (parameter["name"], parameter["in"], _type(parameter["schema"]), _markup(parameter.get("description", "")))
        for parameter in operation.get("parameters", ())
    ]
    body = operation.get("requestBody", {}).get("content", {})
    rows += [("body", media_type, _type(content["schema"]), "") for media_type, content in body.items()]
    answers = " ".join(
        f"<code>{escape(status)}</code> {_markup(answer['description'])}"
        for status, answer in operation["responses"].items()
        if "description" in answer
    )
    return (
        f'<section><h3><span class="method">{method.upper()}</span> <code>{escape(path)}</code></h3>'
        f"<p><strong>{escape(operation['summary'])}.</strong> {_markup(operation['description'])}</p>"
        f"{_table(rows)}<p>Answers: {answers}</p></section>"
    )


def _schema(name: str, schema: dict[str, Any]) -> str:
    rows = [
        (member, _type(content), _markup(content.get("description", "")))
        for member, content in schema.get("properties", {}).items()
    ]
    return f'<section id="{escape(name)}"><h3>{escape(name)}</h3>{_table(rows)}</section>'


def _codes(codes: dict[str, dict[str, Any]]) -> str:
    rows = "".join(
        f'<tr id="{code.lower()}"><td><code>{code}</code><td>{meaning["status"]}<td>{meaning["close"]}'
        f"<td>{escape(meaning['title'])}"
        for code, meaning in codes.items()
    )
    return f"<table><tr><th>Code<th>HTTP status<th>WebSocket close<th>Meaning{rows}</table>"


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    cells = ("<tr>" + "".join(f"<td>{cell}" for cell in (f"<code>{escape(row[0])}</code>", *row[1:])) for row in rows)
    return f"<table>{''.join(cells)}</table>" if rows else ""


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].removeprefix("#/components/schemas/").split("/")[0]
        return f'<a href="#{escape(name)}">{escape(name)}</a>'
    if "enum" in schema:
        return " | ".join(f"<code>{escape(str(value))}</code>" for value in schema["enum"])
    if "const" in schema:
        return f"<code>{escape(str(schema['const']))}</code>"
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    kinds = schema.get("type", "any")
    return escape(" or ".join(kinds) if isinstance(kinds, list) else kinds)


def _markup(text: str) -> str:
    """Escaped, with what stands between backticks as code."""
    pieces = escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if at % 2 else piece for at, piece in enumerate(pieces))


routes: list[BaseRoute] = [
    Route("/openapi.json", openapi),
    Route("/docs", docs),
    Route("/", start),
]
