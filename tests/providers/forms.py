"""Multipart forms, taken to the letter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from email.message import Message

from tests.providers.http import Request


@dataclass(frozen=True)
class Form:
    """A multipart body. Names as sent, brackets included."""

    fields: Mapping[str, tuple[str, ...]]
    file: bytes | None
    filename: str = ""
    media_type: str = ""

    def one(self, name: str, default: str = "") -> str:
        """The field's only value."""
        (value,) = self.fields.get(name, (default,))
        return value


def parse(request: Request) -> Form:
    """A multipart form (RFC 7578), taken strictly: whatever is not to the letter is an `AssertionError`."""
    kind, boundary = _parameters(request.headers["content-type"], "boundary")
    assert kind == "multipart/form-data"
    first, *parts, last = (b"\r\n" + request.body).split(b"\r\n--" + boundary.encode())
    assert (first, last) == (b"", b"--\r\n")
    fields: dict[str, tuple[str, ...]] = {}
    form = Form(fields, None)
    for part in parts:
        assert part.startswith(b"\r\n")
        head, separator, content = part[2:].partition(b"\r\n\r\n")
        assert separator
        headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
        headers = {name.lower(): value for name, value in headers.items()}
        _, name = _parameters(headers["content-disposition"], "name")
        _, filename = _parameters(headers["content-disposition"], "filename")
        if filename:
            assert (name, form.file) == ("file", None)
            form = replace(form, file=content, filename=filename, media_type=headers["content-type"])
        else:
            fields[name] = (*fields.get(name, ()), content.decode())
    return form


def _parameters(header: str, name: str) -> tuple[str, str]:
    """A header's value, and one of its parameters."""
    message = Message()
    message["content-type"] = header
    return header.partition(";")[0].strip(), str(message.get_param(name, ""))
