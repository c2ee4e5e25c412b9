"""One engine in a process of its own, from its start to its end. `dispatchers.engine.child` is the other side."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress

from dispatchers.engine import wire
from dispatchers.errors import BackendUnavailable


class EngineProcess:
    """A process that was started. It ends by itself soon after this one has ended, however that came. Use from one
    event loop; only the beginning needs none."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(  # noqa: S603 — our own program
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # a terminal's Ctrl-C is for us
        )
        self._reader: asyncio.StreamReader | None = None

    @property
    def pid(self) -> int:
        return self._process.pid

    async def greeting(self) -> str:
        """Waits until it is ready; its note on the default model. Raises why it could not be, a `DispatchError`."""
        line = await (await self._said()).readline()
        try:
            greeting = wire.load_greeting(line)
        except ValueError:
            status = await self.ended()
            raise BackendUnavailable(
                f"The engine ended with status {status} before it was ready; see its log."
            ) from None
        if greeting.failure is not None:
            raise greeting.failure.error()
        return greeting.note

    async def ended(self) -> int:
        """Waits for its end, which closes what it says; its exit status, negative for a signal."""
        said = await self._said()
        while await said.read(1024):
            pass
        status = await asyncio.to_thread(self._process.wait)
        self.let_go()
        return status

    async def end(self) -> None:
        """Has it end, and waits until it has."""
        self.let_go()
        try:
            async with asyncio.timeout(wire.END_S + 1):
                await self.ended()
        except TimeoutError:
            self._process.kill()
            await self.ended()

    def let_go(self) -> None:
        """Tells it to end, without waiting."""
        assert self._process.stdin is not None  # noqa: S101 — a pipe
        with suppress(BrokenPipeError):
            self._process.stdin.close()

    async def _said(self) -> asyncio.StreamReader:
        if self._reader is None:
            self._reader = reader = asyncio.StreamReader()
            loop = asyncio.get_running_loop()
            await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), self._process.stdout)
        return self._reader
