"""Multipart uploads, streamed: a short file stays in memory, a longer one goes to disk as it arrives, and the fields
are collected within limits.

Memory does not grow with the upload, nothing is trusted before it is counted, and the file on disk is gone when the
request is over.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import threading
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from dispatchers.errors import EmptyAudio
from gateway.bodies import chunks
from gateway.errors import BadRequest, StorageFull, TooLarge, UnsupportedMedia
from policy.errors import Invalid
from runtime.ids import uuid7
from workers.jobs import Upload

FILE_FIELD = "file"
FIELDS_MOST = 64
FIELD_BYTES = 2 * 1024 * 1024
FIELDS_BYTES = 16 * 1024 * 1024
NAME_BYTES = 256
BLOCK_BYTES = 1024 * 1024  # what is shorter is never written to disk
QUICK_BYTES = 128 * 1024  # digested in less time than a thread takes to begin
ABANDONED_S = 3600.0


@dataclass(frozen=True, slots=True)
class Form:
    """A whole form: its text fields as (name, value) in the order they came, and its file."""

    fields: tuple[tuple[str, str], ...]
    upload: Upload


@asynccontextmanager
async def received(request: Request, *, folder: Path, most: int, idle_s: float) -> AsyncIterator[Form]:
    """The form of a `multipart/form-data` request. A long file is under `folder` for as long as the block lasts.

    Raises `UnsupportedMedia`, `BadRequest`, `Invalid` (no file, or not as a file), `EmptyAudio`, and what
    `gateway.bodies.chunks` raises.
    """
    parts = _Parts(_boundary(request.headers.get("content-type")))
    spool = _Spool(folder / uuid7().hex, salt=request.scope["path"])
    on_disk = False
    try:
        async for chunk in chunks(request, most=most, idle_s=idle_s):
            parts.feed(chunk)
            if len(parts.pending) >= BLOCK_BYTES:
                on_disk = True
                await asyncio.to_thread(spool.write, parts.taken())
        rest = parts.taken()
        if on_disk:
            await asyncio.to_thread(spool.write, rest)
        elif len(rest) > QUICK_BYTES:
            await asyncio.to_thread(spool.keep, rest)
        else:
            spool.keep(rest)
        yield parts.form(spool)
    finally:
        if on_disk:
            await asyncio.shield(asyncio.to_thread(spool.remove))


class _Spool:
    """The file, in memory if it is kept at once, else on disk. Blocking. Whoever is cancelled leaves a thread writing,
    so what follows waits for it."""

    def __init__(self, path: Path, *, salt: str):
        self.path = path
        self.size = 0
        self._kept: bytes | None = None
        self._digest = hashlib.sha256(salt.encode())
        self._file: IO[bytes] | None = None
        self._removed = False
        self._lock = threading.Lock()

    @property
    def recording(self) -> Path | bytes:
        return self.path if self._kept is None else self._kept

    def keep(self, whole: bytearray) -> None:
        self._digest.update(whole)
        self.size = len(whole)
        self._kept = bytes(whole)

    def write(self, block: bytearray) -> None:
        with self._lock:
            if self._removed:
                return
            self._digest.update(block)
            self.size += len(block)
            try:
                self._store(block)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise StorageFull from None
                raise

    def _store(self, block: bytearray) -> None:
        if self._file is None:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            self._file = os.fdopen(descriptor, "wb", buffering=0)
        while block:
            del block[: self._file.write(block) or 0]

    def remove(self) -> None:
        with self._lock:
            self._removed = True
            if self._file is not None:
                self._file.close()
                self.path.unlink(missing_ok=True)

    def fingerprint(self, fields: Iterable[tuple[str, bytes]]) -> str:
        """Of where it was sent, the file and the fields: the same request gives the same, whatever its boundary was."""
        digest = self._digest.copy()
        for name, value in fields:
            for piece in (name.encode(), value):
                digest.update(len(piece).to_bytes(8) + piece)
        return digest.hexdigest()


def sweep(folder: Path) -> None:
    """Removes what uploads left behind whose process was killed. One that goes on is written to, or read, within the
    hour. Blocking."""
    for path in folder.glob("*"):
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > ABANDONED_S:
                path.unlink()


def _boundary(content_type: str | None) -> bytes:
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary:
        raise UnsupportedMedia("Send the recording as `multipart/form-data` with a part named `file`.", param="file")
    return boundary


class _Parts:
    """Listens to the parser. The file's bytes gather in `pending` until somebody takes them away."""

    def __init__(self, boundary: bytes):
        self.pending = bytearray()
        self._fields: list[tuple[str, bytes]] = []
        self._field_bytes = 0
        self._headers: dict[bytes, bytes] = {}
        self._header = (bytearray(), bytearray())
        self._name = ""
        self._value: bytearray | None = None  # of a text field
        self._in_file = False
        self._file: tuple[str | None, str | None] | None = None  # name and content type
        self._whole = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
                    "on_header_end": self._header_end,
                    "on_headers_finished": self._headers_finished,
                    "on_part_data": self._data,
                    "on_part_end": self._part_end,
                    "on_end": self._end,
                },
            )
        except FormParserError:
            raise BadRequest("The multipart boundary is too long.") from None

    def feed(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except FormParserError:
            raise BadRequest("The body is not valid multipart/form-data.") from None

    def taken(self) -> bytearray:
        """What has gathered, which is then the caller's."""
        block, self.pending = self.pending, bytearray()
        return block

    def form(self, spool: _Spool) -> Form:
        """Everything, once the body has ended and the file is spooled."""
        if not self._whole:
            raise BadRequest("The multipart body breaks off before its end.")
        if self._file is None:
            raise Invalid("The form has no part named `file`. Send the recording in it.", param=FILE_FIELD)
        if spool.size == 0:
            raise EmptyAudio(param=FILE_FIELD)
        filename, content_type = self._file
        upload = Upload(spool.recording, spool.size, filename, content_type, spool.fingerprint(self._fields))
        return Form(tuple((name, _text(name, value)) for name, value in self._fields), upload)

    # --- the parser's callbacks ---

    def _begin(self) -> None:
        self._headers = {}
        self._name, self._value, self._in_file = "", None, False

    def _header_end(self) -> None:
        name, value = self._header
        self._headers[bytes(name).lower()] = bytes(value)
        self._header = (bytearray(), bytearray())

    def _headers_finished(self) -> None:
        disposition = self._headers.get(b"content-disposition", b"").decode("latin-1")
        kind, options = parse_options_header(disposition)
        if kind != b"form-data" or b"name" not in options or len(options[b"name"]) > NAME_BYTES:
            raise BadRequest("Every part needs a `Content-Disposition: form-data` with a name.")
        self._name = _text("name", options[b"name"])
        is_file = b"filename" in options
        if self._name == FILE_FIELD:
            self._begin_file(options.get(b"filename"))
        elif not is_file:
            self._value = bytearray()

    def _begin_file(self, filename: bytes | None) -> None:
        if filename is None:
            raise Invalid("`file` must be a file, not text (with curl: `-F file=@recording.wav`).", param=FILE_FIELD)
        if self._file is not None:
            raise Invalid("Send one `file` a request.", param=FILE_FIELD)
        self._in_file = True
        content_type = self._headers.get(b"content-type")
        self._file = (
            PurePosixPath(filename.decode("utf-8", "replace").replace("\x00", "")).name[:255] or None,
            None if content_type is None else content_type.decode("latin-1")[:255],
        )

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self.pending += data[start:end]
        elif self._value is not None:
            self._field_bytes += end - start
            if len(self._value) + end - start > FIELD_BYTES or self._field_bytes > FIELDS_BYTES:
                raise TooLarge("A form field is too long.", param=self._name)
            self._value += data[start:end]

    def _part_end(self) -> None:
        if self._value is None:
            return
        if len(self._fields) == FIELDS_MOST:
            raise TooLarge(f"A form may have {FIELDS_MOST} fields.")
        self._fields.append((self._name, bytes(self._value)))

    def _end(self) -> None:
        self._whole = True


def _text(name: str, value: bytes) -> str:
    try:
        text = value.decode()
    except UnicodeDecodeError:
        raise Invalid("Form fields must be UTF-8.", param=name) from None
    if "\x00" in text:
        raise Invalid("Form fields must not contain NUL.", param=name)
    return text
