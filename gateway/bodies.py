"""Request bodies, read within limits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from gateway.errors import BadRequest, TooLarge, UploadStalled

JSON_BYTES = 256 * 1024


async def chunks(request: Request, *, most: int, idle_s: float) -> AsyncIterator[bytes]:
    """The body as it arrives.

    Raises `TooLarge` beyond `most` bytes (before reading any where the length is declared), `UploadStalled` when
    nothing comes for `idle_s`, `ClientDisconnect`.
    """
    _check_length(request, most)
    read = 0
    more = True
    while more:
        try:
            async with asyncio.timeout(idle_s):
                message = await request.receive()
        except TimeoutError:
            raise UploadStalled from None
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        more = message.get("more_body", False)
        body: bytes = message.get("body", b"")
        read += len(body)
        if read > most:
            raise _too_large(most, read)
        if body:
            yield body


async def json_object(request: Request, *, idle_s: float) -> dict[str, Any]:
    """A JSON object of moderate size; an empty body is an empty object. Raises `BadRequest`, and what `chunks` does."""
    body = b"".join([chunk async for chunk in chunks(request, most=JSON_BYTES, idle_s=idle_s)])
    try:
        value = from_json(body or b"{}")  # refuses halves of characters, which no answer could repeat
    except ValueError:
        raise BadRequest("The body is not valid JSON.") from None
    if not isinstance(value, dict):
        raise BadRequest("The body must be a JSON object.")
    return value


def _check_length(request: Request, most: int) -> None:
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared) > most:
        raise _too_large(most, int(declared))


def _too_large(most: int, found: int) -> TooLarge:
    return TooLarge(f"Maximum content size limit ({most}) exceeded ({found} bytes).")
