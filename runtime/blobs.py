"""Uploads and results too big for the database: on the local disk, or in S3, Google Cloud Storage or Azure.

Nothing but `put` and `get` holds a whole blob in memory.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from runtime.errors import StenogateError

MIB = 1024 * 1024
PART = 5 * MIB  # the smallest part that S3 takes; its 10,000 parts make 48 GiB
PARTS_AT_ONCE = 2
STEP_S = 60.0  # one request, or one part of a download
SLOWEST_BYTES_PER_S = MIB  # an upload that is slower than this has failed

NAME = r"[A-Za-z0-9_-][A-Za-z0-9._-]*"
KEY = re.compile(rf"{NAME}(/{NAME})*")


class BlobMissing(StenogateError):
    """What was stored is no longer there."""

    code = "NOT_FOUND"


class BlobsUnavailable(StenogateError):
    """The store for audio does not answer. Try again shortly."""

    code = "UNAVAILABLE"
    retryable = True


def tenant_key(tenant_id: UUID, *names: str) -> str:
    """The key of something that belongs to a tenant."""
    return "/".join(("tenant", str(tenant_id), *names))


class Blobs:
    """Files under keys: names of letters, digits, `.`, `_`, `-`, joined by `/`.

    Raises `BlobMissing`, `BlobsUnavailable`, and ValueError for a key of another form.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    @classmethod
    def open(cls, url: str | None, default_dir: Path) -> Blobs:
        """The store at a `file://`, `s3://`, `gs://` or `az://` URL; without one, a folder that only we can read.

        Credentials for the clouds come from where their own tools look.
        """
        if url is None:
            default_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            return cls(LocalStore(default_dir.resolve(), automatic_cleanup=True))
        if url.startswith("file://"):
            return cls(LocalStore.from_url(url, automatic_cleanup=True, mkdir=True))
        return cls(
            from_url(
                url,
                # No limit on a whole request: a large download may take long, but may not stop.
                client_options={"connect_timeout": "5s", "read_timeout": "30s", "timeout": "1h"},
                retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=30)},
            )
        )

    async def put_file(self, key: str, path: Path) -> None:
        """Stores the file whole or not at all, in place of what the key held."""
        size = (await asyncio.to_thread(path.stat)).st_size
        async with _answering(key, STEP_S + size / SLOWEST_BYTES_PER_S):
            await obstore.put_async(self._store, key, path, chunk_size=PART, max_concurrency=PARTS_AT_ONCE)

    async def put(self, key: str, content: bytes) -> None:
        """Stores a small blob whole or not at all, in place of what the key held."""
        async with _answering(key, STEP_S):
            await obstore.put_async(self._store, key, content)

    async def fetch(self, key: str, target: Path) -> None:
        """Copies the blob to a local file, which is not there afterwards if this fails."""
        try:
            with target.open("wb") as file:
                async with _answering(key, STEP_S) as timeout:
                    found = await obstore.get_async(self._store, key)
                    async for part in found.stream(min_chunk_size=MIB):
                        await asyncio.to_thread(file.write, part)
                        timeout.reschedule(asyncio.get_running_loop().time() + STEP_S)
        except BaseException:
            target.unlink(missing_ok=True)  # noqa: ASYNC240  # must not be cancelled half way
            raise

    async def get(self, key: str) -> bytes:
        """A small blob's content."""
        async with _answering(key, STEP_S):
            found = await obstore.get_async(self._store, key)
            return bytes(await found.bytes_async())

    async def delete(self, key: str) -> None:
        """Removes the blob. No error if there is none."""
        with suppress(BlobMissing):
            async with _answering(key, STEP_S):
                await obstore.delete_async(self._store, key)

    async def exists(self, key: str) -> bool:
        try:
            async with _answering(key, STEP_S):
                await obstore.head_async(self._store, key)
        except BlobMissing:
            return False
        return True


@asynccontextmanager
async def _answering(key: str, seconds: float) -> AsyncIterator[asyncio.Timeout]:
    """Checks the key, bounds the time, and gives the store's errors our names. The store's own words stay in the
    cause: they hold paths and URLs."""
    if not KEY.fullmatch(key):
        raise ValueError(f"not a blob key: {key!r}")
    try:
        async with asyncio.timeout(seconds) as timeout:
            yield timeout
    except FileNotFoundError as error:
        raise BlobMissing from error
    except (BaseError, OSError) as error:  # TimeoutError is an OSError
        raise BlobsUnavailable from error
