"""Uploaded recordings to samples, off the event loop where that takes time, a few at once."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dispatchers.audio.decode import load, plain
from dispatchers.errors import Overloaded
from dispatchers.interface import Samples

THREADS = 2
WAITING = 64


class Decoder:
    """Decodes at most `threads` recordings at once, keeps `waiting` more in line and refuses the rest (`Overloaded`).

    What cannot be read raises `dispatchers.errors.AudioError`.
    """

    def __init__(self, *, threads: int = THREADS, waiting: int = WAITING):
        self._threads = ThreadPoolExecutor(threads, "decode")
        self._room = threads + waiting

    async def load(self, recording: Path | bytes, limit_ms: int) -> Samples:
        """The whole recording; `AudioTooLong` beyond the limit."""
        if isinstance(recording, bytes) and (samples := plain(recording, limit_ms=limit_ms)) is not None:
            return samples
        if self._room == 0:
            raise Overloaded(retry_after_s=5)
        self._room -= 1
        work = asyncio.get_running_loop().run_in_executor(self._threads, lambda: load(recording, limit_ms=limit_ms))
        work.add_done_callback(self._leave)
        return await work

    def _leave(self, _: asyncio.Future[Samples]) -> None:
        self._room += 1
