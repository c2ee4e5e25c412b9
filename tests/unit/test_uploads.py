"""Multipart bodies in every shape that clients send, and in shapes that nobody should."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import ClientDisconnect, Request

from dispatchers.errors import EmptyAudio
from gateway.errors import BadRequest, StorageFull, TooLarge, UnsupportedMedia, UploadStalled
from gateway.uploads import BLOCK_BYTES, FIELD_BYTES, FIELDS_MOST, QUICK_BYTES, Form, _Spool, received, sweep
from policy.errors import Invalid

FILE = b'Content-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\nRIFF'
MODEL = b'Content-Disposition: form-data; name="model"\r\n\r\nmicro'


def multipart(*parts: bytes, boundary: bytes = b"b") -> bytes:
    return b"".join(b"--" + boundary + b"\r\n" + part + b"\r\n" for part in parts) + b"--" + boundary + b"--\r\n"


def field(name: str, value: str = "x") -> bytes:
    return f'Content-Disposition: form-data; name="{name}"\r\n\r\n{value}'.encode()


def request(
    chunks: Iterable[bytes],
    *,
    content_type: str | None = "multipart/form-data; boundary=b",
    ends: bool = True,
    **more: Any,
) -> Request:
    headers = [(b"content-type", content_type.encode())] if content_type is not None else []
    headers += [(name.replace("_", "-").encode(), value.encode()) for name, value in more.items()]
    messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    messages.append({"type": "http.request", "more_body": False} if ends else {"type": "http.disconnect"})
    coming = iter(messages)

    async def receive() -> Any:
        return next(coming)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/audio/transcriptions",
        "headers": headers,
        "query_string": b"",
    }
    return Request(scope | {"server": ("test", 80), "scheme": "http"}, receive)


def left_in(folder: Path) -> list[Path]:
    return list(folder.glob("*"))


async def read(folder: Path, asked: Request, most: int = 1 << 30) -> tuple[Form, bytes]:
    async with received(asked, folder=folder, most=most, idle_s=5) as form:
        recording = form.upload.recording
        content = recording if isinstance(recording, bytes) else recording.read_bytes()
    assert left_in(folder) == []
    return form, content


async def refused(folder: Path, asked: Request, error: type[Exception], most: int = 1 << 30) -> Any:
    with pytest.raises(error) as raised:
        await read(folder, asked, most)
    assert left_in(folder) == []
    return raised.value


@pytest.mark.parametrize("parts", [(MODEL, FILE), (FILE, MODEL)], ids=["file last", "file first"])
@pytest.mark.parametrize("step", [1, 7, 10_000])
async def test_any_order_and_any_cut(tmp_path: Path, parts: tuple[bytes, ...], step: int) -> None:
    body = multipart(*parts)
    form, content = await read(tmp_path, request(body[at : at + step] for at in range(0, len(body), step)))
    assert content == b"RIFF"
    assert form.fields == (("model", "micro"),)
    assert (form.upload.size, form.upload.filename, form.upload.content_type) == (4, "a.wav", "audio/wav")


async def test_names_are_kept_as_they_came_and_other_files_are_dropped(tmp_path: Path) -> None:
    other = b'Content-Disposition: form-data; name="image"; filename="b.png"\r\n\r\nPNG'
    form, _ = await read(
        tmp_path, request([multipart(field("a[]", "1"), field("a[]", "2"), other, field("c[d]"), FILE)])
    )
    assert form.fields == (("a[]", "1"), ("a[]", "2"), ("c[d]", "x"))


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\\\temp\\\\a.wav", "a.wav"),
        ("größe ü.wav", "größe ü.wav"),
        ("", None),
        ("x" * 300, "x" * 255),
    ],
)
async def test_a_filename_is_a_name_and_no_path(tmp_path: Path, sent: str, kept: str | None) -> None:
    part = f'Content-Disposition: form-data; name="file"; filename="{sent}"\r\n\r\nRIFF'.encode()
    form, _ = await read(tmp_path, request([multipart(part)]))
    assert form.upload.filename == kept


async def test_a_short_file_never_sees_the_disk(tmp_path: Path) -> None:
    for size, kind in ((4, bytes), (QUICK_BYTES + 1, bytes), (BLOCK_BYTES, Path)):
        body = multipart(FILE[:-4] + b"x" * size)
        asked = request(body[at : at + 65_536] for at in range(0, len(body), 65_536))
        async with received(asked, folder=tmp_path, most=1 << 30, idle_s=5) as form:
            assert isinstance(form.upload.recording, kind)
            assert len(left_in(tmp_path)) == (kind is Path)
            assert form.upload.size == size
    assert left_in(tmp_path) == []


async def test_the_file_goes_to_disk_as_it_comes(tmp_path: Path) -> None:
    """Nothing of a long file is kept but what has not yet been written."""
    sizes = []

    def body() -> Iterable[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(40):
            yield b"z" * (BLOCK_BYTES // 4)
            sizes.append(sum(path.stat().st_size for path in tmp_path.iterdir()))
        yield b"\r\n--b--\r\n"

    messages = iter(body())
    asked = request([])

    async def receive() -> Any:
        chunk = next(messages, None)
        return {"type": "http.request", "body": chunk or b"", "more_body": chunk is not None}

    asked._receive = receive
    form, content = await read(tmp_path, asked)
    assert form.upload.size == len(content) == 10 * BLOCK_BYTES
    assert all(at * BLOCK_BYTES // 4 - size <= 2 * BLOCK_BYTES for at, size in enumerate(sizes))


async def test_the_fingerprint_is_of_the_content_and_not_of_the_boundary(tmp_path: Path) -> None:
    async def of(*parts: bytes, boundary: bytes = b"b") -> str:
        content_type = f"multipart/form-data; boundary={boundary.decode()}"
        form, _ = await read(tmp_path, request([multipart(*parts, boundary=boundary)], content_type=content_type))
        return form.upload.fingerprint

    same = await of(MODEL, FILE)
    assert len(same) == hashlib.sha256().digest_size * 2
    assert await of(MODEL, FILE, boundary=b"other") == same
    assert await of(FILE) != same
    assert await of(MODEL, FILE + b"!") != same
    assert await of(field("model", "other"), FILE) != same


async def test_a_client_that_goes_away_leaves_nothing(tmp_path: Path) -> None:
    await refused(tmp_path, request([multipart(MODEL, FILE)[:-20]], ends=False), ClientDisconnect)


@pytest.mark.parametrize("turns", range(0, 24, 3))
async def test_a_request_that_is_cancelled_leaves_nothing(tmp_path: Path, turns: int) -> None:
    async def waits() -> None:
        async with received(request([multipart(FILE)]), folder=tmp_path, most=1 << 30, idle_s=5):
            await asyncio.Event().wait()

    working = asyncio.create_task(waits())
    for _ in range(turns):
        await asyncio.sleep(0.0005)
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    assert working.cancelled()
    assert left_in(tmp_path) == []


async def test_a_client_that_stalls(tmp_path: Path) -> None:
    asked = request([])
    asked._receive = asyncio.Event().wait  # type: ignore[assignment]
    with pytest.raises(UploadStalled):
        async with received(asked, folder=tmp_path, most=100, idle_s=0.01):
            pass
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    "content_type", [None, "", "application/json", "multipart/form-data", "multipart/mixed; boundary=b"]
)
async def test_other_content_types(tmp_path: Path, content_type: str | None) -> None:
    await refused(tmp_path, request([b"{}"], content_type=content_type), UnsupportedMedia)


async def test_a_boundary_that_is_too_long(tmp_path: Path) -> None:
    await refused(tmp_path, request([b""], content_type=f"multipart/form-data; boundary={'b' * 300}"), BadRequest)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"garbage",
        b"--b\r\n",
        multipart(MODEL, FILE)[:-4],
        multipart(b"Content-Disposition: form-data\r\n\r\nx"),
        multipart(b"X: y\r\n\r\nx"),
        multipart(b'Content-Disposition: attachment; name="file"; filename="a"\r\n\r\nx'),
        multipart(b'Content-Disposition: form-data; name="' + b"n" * 300 + b'"\r\n\r\nx'),
        multipart(b"A: b\r\n" * 100 + MODEL),
        multipart(b"A: " + b"b" * 100_000 + b"\r\n" + MODEL),
    ],
)
async def test_what_is_no_form(tmp_path: Path, body: bytes) -> None:
    await refused(tmp_path, request([body]), BadRequest)


async def test_no_file_an_empty_one_two_and_one_that_is_text(tmp_path: Path) -> None:
    error = await refused(tmp_path, request([multipart(MODEL)]), Invalid)
    assert error.param == "file"
    error = await refused(tmp_path, request([multipart(FILE[:-4])]), EmptyAudio)
    assert error.param == "file"
    error = await refused(tmp_path, request([multipart(FILE, FILE)]), Invalid)
    assert error.param == "file"
    error = await refused(tmp_path, request([multipart(field("file", "a.wav"))]), Invalid)
    assert error.param == "file"


async def test_limits_of_fields(tmp_path: Path) -> None:
    fits = [field(f"f{at}") for at in range(FIELDS_MOST)]
    form, _ = await read(tmp_path, request([multipart(*fits, FILE)]))
    assert len(form.fields) == FIELDS_MOST
    await refused(tmp_path, request([multipart(*fits, MODEL, FILE)]), TooLarge)
    form, _ = await read(tmp_path, request([multipart(field("known_speaker_references[]", "x" * FIELD_BYTES), FILE)]))
    assert len(form.fields[0][1]) == FIELD_BYTES
    await refused(tmp_path, request([multipart(field("prompt", "x" * (FIELD_BYTES + 1)), FILE)]), TooLarge)
    many = [field(f"f{at}", "x" * FIELD_BYTES) for at in range(9)]
    await refused(tmp_path, request([multipart(*many, FILE)]), TooLarge)


async def test_text_that_is_none(tmp_path: Path) -> None:
    for value in (b"\xff", b"a\x00b"):
        body = multipart(b'Content-Disposition: form-data; name="prompt"\r\n\r\n' + value, FILE)
        assert (await refused(tmp_path, request([body]), Invalid)).param == "prompt"


async def test_a_declared_length_beyond_the_limit_is_refused_unread(tmp_path: Path) -> None:
    await refused(tmp_path, request([], content_length=str(10 << 30)), TooLarge)


async def test_an_undeclared_one_as_soon_as_it_is_passed(tmp_path: Path) -> None:
    body = multipart(FILE + b"x" * 1000)
    await refused(tmp_path, request(body[at : at + 100] for at in range(0, len(body), 100)), TooLarge, most=500)


@given(body=st.binary(max_size=400), prefix=st.sampled_from([b"", b"--b\r\n", b"--b\r\n" + FILE, b"--b\r\n" + MODEL]))
async def test_no_body_breaks_the_reader(tmp_path_factory: pytest.TempPathFactory, body: bytes, prefix: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "anything"
    with suppress(BadRequest, Invalid, EmptyAudio, TooLarge):
        await read(folder, request([prefix + body]))
    assert left_in(folder) == []


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    left, fresh = tmp_path / "left", tmp_path / "fresh"
    for path in (left, fresh):
        path.write_bytes(b"audio")
    os.utime(left, (0, 0))
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["fresh"]
    sweep(tmp_path / "never made")


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    spool = _Spool(tmp_path / "upload", salt="")
    spool._file = open("/dev/full", "wb", buffering=0)  # noqa: PTH123, SIM115 — every write to it fails as a full disk's
    with pytest.raises(StorageFull):
        spool.write(bytearray(b"audio"))
    spool.remove()
