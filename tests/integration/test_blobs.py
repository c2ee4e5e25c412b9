"""Blobs on the local disk, and on a server that speaks S3 badly."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from runtime.blobs import BlobMissing, Blobs, BlobsUnavailable, tenant_key

ROOT = Path(__file__).parents[2]
KEY = tenant_key(uuid.UUID(int=1), "uploads", "a.wav")

COPY_BIG_FILE = """
import asyncio, resource, sys
from pathlib import Path
from runtime.blobs import Blobs

async def main(folder):
    blobs = Blobs.open(None, folder / "blobs")
    await blobs.put_file("small", folder / "small")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    await blobs.put_file("big", folder / "big")
    await blobs.fetch("big", folder / "copy")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)

asyncio.run(main(Path(sys.argv[1])))
"""


@pytest.fixture(params=["folder", "url"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    folder = tmp_path / "data" / "blobs"
    return Blobs.open(None if request.param == "folder" else folder.as_uri(), folder)


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("size", [0, 1, 11_000_000])
async def test_what_is_put_comes_back(blobs: Blobs, tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    assert not await blobs.exists(KEY)
    await blobs.put_file(KEY, written(tmp_path / "in", content))
    assert await blobs.exists(KEY)
    assert await blobs.get(KEY) == content
    await blobs.fetch(KEY, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == content


async def test_a_second_put_replaces_the_first(blobs: Blobs, tmp_path: Path) -> None:
    await blobs.put_file(KEY, written(tmp_path / "in", b"first, and longer"))
    await blobs.put_file(KEY, written(tmp_path / "in", b"second"))
    assert await blobs.get(KEY) == b"second"


async def test_what_is_deleted_is_gone(blobs: Blobs, tmp_path: Path) -> None:
    await blobs.put_file(KEY, written(tmp_path / "in", b"x"))
    await blobs.delete(KEY)
    await blobs.delete(KEY)
    assert not await blobs.exists(KEY)
    assert [path for path in (tmp_path / "data" / "blobs").rglob("*") if path.is_file()] == []


async def test_what_is_missing_is_said_and_leaves_no_file(blobs: Blobs, tmp_path: Path) -> None:
    with pytest.raises(BlobMissing):
        await blobs.get(KEY)
    with pytest.raises(BlobMissing):
        await blobs.fetch(KEY, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "../a", "a/../../b", "a//b", "a/.", "a/.hidden", "a/", "a\\b", "a%2e%2e/b", "a\nb", "ä"]
)
async def test_a_key_that_leads_elsewhere_is_refused(blobs: Blobs, tmp_path: Path, key: str) -> None:
    source = written(tmp_path / "in", b"x")
    for call in (
        blobs.put_file(key, source),
        blobs.fetch(key, tmp_path / "out"),
        blobs.get(key),
        blobs.delete(key),
        blobs.exists(key),
    ):
        with pytest.raises(ValueError, match="not a blob key"):
            await call


async def test_the_default_folder_is_private(tmp_path: Path) -> None:
    Blobs.open(None, tmp_path / "data" / "blobs")
    assert ((tmp_path / "data" / "blobs").stat().st_mode & 0o777) == 0o700


async def test_an_unknown_kind_of_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="ftp"):
        Blobs.open("ftp://example.org/x", tmp_path)


async def test_a_store_that_does_not_answer_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ENDPOINT": "http://127.0.0.1:9",  # discard; nobody listens
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret-canary",
        "AWS_REGION": "x",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("runtime.blobs.STEP_S", 0.3)
    blobs = Blobs.open("s3://bucket/prefix", tmp_path)
    async with asyncio.timeout(30):
        with pytest.raises(BlobsUnavailable) as caught:
            await blobs.get(KEY)
    assert "127.0.0.1" not in str(caught.value)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    with (tmp_path / "big").open("wb") as big:
        big.truncate(200_000_000)
    written(tmp_path / "small", b"x")
    result = subprocess.run(
        [sys.executable, "-c", COPY_BIG_FILE, str(tmp_path)],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    (tmp_path / "copy").unlink()
    grown_kib = int(result.stdout)
    assert grown_kib < 100_000, "half of the file"
