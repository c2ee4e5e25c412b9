"""A live stream at Deepgram: one WebSocket, which takes audio and tells what it hears of it.

The socket is opened when the first audio comes, for one that never gets any is closed; while none comes, it is told
that we are still there. What goes wrong with it ends the stream: nothing says what Deepgram has heard of an utterance
that it did not finish.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from urllib.parse import urlencode

from dispatchers.adapters.outbox import Outbox
from dispatchers.backends.deepgram_utterances import Utterances
from dispatchers.backends.deepgram_wire import (
    LISTEN,
    Error,
    Message,
    Metadata,
    Query,
    Results,
    SpeechBegan,
    UtteranceEnd,
    load_message,
)
from dispatchers.backends.relay import CONNECT_S, Account
from dispatchers.backends.relay_socket import RelaySocket, connected, late
from dispatchers.errors import BackendFailed
from dispatchers.interface import (
    SAMPLE_RATE,
    Clear,
    Cleared,
    Event,
    Flush,
    Flushed,
    Options,
    Pcm,
    Samples,
    StreamInput,
    to_ms,
)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long Deepgram may take. `recorded_s`: for a recording. Of live streams: `silent_s` to take audio, and to
    answer any; `finalize_s` to answer a `Finalize`, which it does not promise; `drain_s` for what is left when the
    audio has ended. It leaves who says nothing for 10 s: we say something after `keep_alive_s`."""

    connect_s: float = CONNECT_S
    recorded_s: float = 300.0
    silent_s: float = 15.0
    finalize_s: float = 2.0
    drain_s: float = 120.0
    keep_alive_s: float = 4.0


PATIENT = Patience()
_BITE = SAMPLE_RATE // 4
"""Samples in one frame, however much comes at once."""

_KEEP_ALIVE, _FINALIZE, _CLOSE = (json.dumps({"type": kind}) for kind in ("KeepAlive", "Finalize", "CloseStream"))


class LiveStream:
    """One stream. Puts its events into `out`."""

    def __init__(self, account: Account, query: Query, options: Options, out: Outbox, patience: Patience):
        self._account = account
        self._address = f"{account.base_url.rstrip('/').replace('http', 'ws', 1)}{LISTEN}?{urlencode(query)}"
        self._patience = patience
        self._out = out
        self._utterances = Utterances(options)
        self._telling = asyncio.Lock()
        self._sent = 0  # samples
        self._sent_at = 0.0
        self._unanswered = 0  # samples since the last message
        self._ended_at: float | None = None
        self._answered = asyncio.Event()  # a `Finalize`
        self._closing: asyncio.Timeout | None = None
        self._loop = asyncio.get_running_loop()

    async def run(self, audio: AsyncIterator[StreamInput]) -> None:
        """Reads the input to its end and has all of it answered. Raises a `BackendError`."""
        async for item in audio:
            match item:
                case Pcm(samples) if len(samples):
                    await self._talk(samples, audio)
                    break
                case Flush():
                    await self._out.put(Flushed(0))
                case Clear():
                    await self._out.put(Cleared(0))

    @property
    def _heard_ms(self) -> int:
        return to_ms(self._sent)

    async def _talk(self, first: Samples, rest: AsyncIterator[StreamInput]) -> None:
        headers = {"Authorization": f"Token {self._account.key}"}
        opening = connected(self._account, self._address, headers, connect_s=self._patience.connect_s)
        async with opening as socket, asyncio.TaskGroup() as tasks:
            speaking = tasks.create_task(self._speak(socket, first, rest))
            alive = tasks.create_task(self._keep_alive(socket))
            await self._listen(socket)
            speaking.cancel()
            alive.cancel()
        await self._tell(self._utterances.finish(self._heard_ms))

    async def _tell(self, events: list[Event]) -> None:
        async with self._telling:
            await self._out.put(*events)

    # --- what we say ---

    async def _speak(self, socket: RelaySocket, first: Samples, rest: AsyncIterator[StreamInput]) -> None:
        await self._send_audio(socket, first)
        async for item in rest:
            match item:
                case Pcm(samples):
                    await self._send_audio(socket, samples)
                case Flush():
                    await self._finalize(socket)
                    await self._tell([*self._utterances.finish(self._heard_ms), Flushed(self._heard_ms)])
                case Clear():
                    self._utterances.drop(self._heard_ms)
                    await self._finalize(socket)
                    await self._tell(self._utterances.dropped(self._heard_ms))
        self._ended_at = self._loop.time()
        if self._closing is not None:
            self._closing.reschedule(self._ended_at + self._patience.drain_s)
        await self._send(socket, _CLOSE)

    async def _send_audio(self, socket: RelaySocket, samples: Samples) -> None:
        for at in range(0, len(samples), _BITE):
            bite = samples[at : at + _BITE]
            self._sent += len(bite)
            self._unanswered += len(bite)
            await self._send(socket, bite.astype("<i2", copy=False).tobytes())

    async def _finalize(self, socket: RelaySocket) -> None:
        """What was sent is final when this returns, or Deepgram has nothing to say of it."""
        if self._utterances.covers(self._heard_ms):
            return
        self._answered.clear()
        await self._send(socket, _FINALIZE)
        try:
            async with asyncio.timeout(self._patience.finalize_s):
                await self._answered.wait()
        except TimeoutError:
            pass

    async def _keep_alive(self, socket: RelaySocket) -> None:
        """Words that nothing follows are asked to be made final: Deepgram's clock stands still without audio."""
        while self._ended_at is None:
            idle_s = self._loop.time() - self._sent_at
            if idle_s < self._patience.keep_alive_s:
                await asyncio.sleep(self._patience.keep_alive_s - idle_s)
            else:
                await self._send(socket, _FINALIZE if self._utterances.unsure else _KEEP_ALIVE)

    async def _send(self, socket: RelaySocket, frame: str | bytes) -> None:
        self._sent_at = self._loop.time()
        await socket.send(frame, self._patience.silent_s)

    # --- what we hear ---

    async def _listen(self, socket: RelaySocket) -> None:
        """To the last message."""
        try:
            async with asyncio.timeout(None) as self._closing:
                while not (isinstance(message := await self._next(socket), Metadata) and self._ended_at is not None):
                    await self._heed(message)
        except TimeoutError:
            raise late(self._account) from None

    async def _next(self, socket: RelaySocket) -> Message | None:
        self._unanswered, since = 0, self._loop.time()
        while True:
            try:
                async with asyncio.timeout(self._patience.silent_s):
                    frame = await socket.recv()
            except TimeoutError:
                if self._is_late(since):
                    raise late(self._account) from None
            else:
                return load_message(self._account, frame)

    def _is_late(self, since: float) -> bool:
        """Whether more than a little should have been said since then. A few words without a pause after them are
        answered when there is more audio."""
        if self._ended_at is not None:
            return self._loop.time() - max(since, self._ended_at) >= self._patience.silent_s
        return self._unanswered >= self._patience.silent_s * SAMPLE_RATE

    async def _heed(self, message: Message | None) -> None:
        match message:
            case Results():
                await self._tell(self._utterances.results(message, self._heard_ms))
                if message.from_finalize or (message.is_final and self._utterances.covers(self._heard_ms)):
                    self._answered.set()
            case SpeechBegan(timestamp=timestamp):
                await self._tell(self._utterances.began(timestamp, self._heard_ms))
            case UtteranceEnd(last_word_end=last_word_end):
                await self._tell(self._utterances.ended(last_word_end, self._heard_ms))
            case Error():
                raise BackendFailed(f"{self._account.backend} cannot go on with the stream.")
