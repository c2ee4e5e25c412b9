"""A live stream at AssemblyAI: one WebSocket, which takes audio and tells turns.

The socket is opened when the first audio comes, for AssemblyAI charges for the time it is open; and it is always told
when it will get no more. What goes wrong with it ends the stream: nothing says what AssemblyAI has heard of a turn that
it did not finish.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlencode, urlsplit, urlunsplit

import numpy as np

from dispatchers.adapters.outbox import Outbox
from dispatchers.backends.assemblyai_turns import Turns
from dispatchers.backends.assemblyai_wire import (
    LIVE,
    LIVE_HEADERS,
    Begin,
    Error,
    Message,
    Query,
    Termination,
    Turn,
    failure,
    is_formatted_later,
    load_message,
    meaning,
)
from dispatchers.backends.relay import CONNECT_S, Account
from dispatchers.backends.relay_socket import RelaySocket, connected, late
from dispatchers.errors import BackendError, BadAnswer
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
    """How long AssemblyAI may take. Of recordings: `recorded_s` for all, `silent_s` for each answer; it is asked after
    `look_s` whether one is done, then less and less often, and after each of `delete_s` to delete one. Of live streams:
    `begin_s` to say that it listens, `silent_s` to take audio, `endpoint_s` to answer a `ForceEndpoint` when a turn is
    under way, `quiet_s` when none is known of, `format_s` to format the text of an ended turn (it promises none of
    these), `drain_s` for what is left when the audio has ended. Without audio we say something after `keep_alive_s`.

    `ahead_s`: how much more audio may be sent than time has passed. It refuses audio that comes faster than life, and
    has been seen to do so at 310 s.
    """

    connect_s: float = CONNECT_S
    recorded_s: float = 600.0
    silent_s: float = 15.0
    look_s: float = 0.25
    delete_s: tuple[float, ...] = (0.0, 2.0, 15.0)
    begin_s: float = 10.0
    endpoint_s: float = 2.0
    quiet_s: float = 1.0
    format_s: float = 1.0
    drain_s: float = 120.0
    keep_alive_s: float = 15.0
    ahead_s: float = 120.0


PATIENT = Patience()
LEAST, MOST = SAMPLE_RATE // 20, SAMPLE_RATE // 4
"""Samples in one frame: AssemblyAI takes 50 ms to 1 s."""
_FAREWELL_S = 0.5
_KEEP_ALIVE, _FORCE, _TERMINATE = (json.dumps({"type": kind}) for kind in ("KeepAlive", "ForceEndpoint", "Terminate"))


class LiveStream:
    """One stream. Puts its events into `out`."""

    def __init__(self, account: Account, query: Query, options: Options, out: Outbox, patience: Patience):
        self._account = account
        self._address = f"{live_url(account.base_url)}?{urlencode(query)}"
        self._patience = patience
        self._out = out
        self._turns = Turns(options, formatted=is_formatted_later(dict(query)["speech_model"]))
        self._telling = asyncio.Lock()
        self._waiting: list[Samples] = []  # less than fits in a frame
        self._heard = self._sent = 0  # samples
        self._asked = 0  # of which everything was asked to be told
        self._sent_at = self._opened_at = 0.0
        self._answered = asyncio.Event()  # a `ForceEndpoint`
        self._forced: int | None = None  # the utterance that was too long
        self._begun = self._ended = False
        self._deadline: asyncio.Timeout | None = None
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
        return to_ms(self._heard)

    async def _talk(self, first: Samples, rest: AsyncIterator[StreamInput]) -> None:
        headers = {"Authorization": self._account.key, **LIVE_HEADERS}
        async with connected(
            self._account,
            self._address,
            headers,
            connect_s=self._patience.connect_s,
            meaning=lambda code: meaning(self._account, code),
        ) as socket:
            self._opened_at = self._loop.time()
            try:
                async with asyncio.TaskGroup() as tasks:
                    speaking = tasks.create_task(self._speak(socket, first, rest))
                    alive = tasks.create_task(self._keep_alive(socket))
                    await self._listen(socket)
                    speaking.cancel()
                    alive.cancel()
            finally:
                await self._farewell(socket)
        await self._tell(self._turns.finish())

    async def _farewell(self, socket: RelaySocket) -> None:
        """What is left without a word is charged for until AssemblyAI notices."""
        if not self._ended:
            with suppress(BackendError):
                await socket.send(_TERMINATE, _FAREWELL_S)

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
                    await self._force(socket)
                    await self._tell([*self._turns.finish(), Flushed(self._heard_ms)])
                case Clear():
                    self._turns.drop(self._heard_ms)
                    await self._force(socket)
                    await self._tell(self._turns.dropped(self._heard_ms))
        if self._waiting:
            await self._send_frame(socket, _padded(np.concatenate(self._waiting)))
        self._ended = True
        if self._deadline is not None:
            self._deadline.reschedule(self._loop.time() + self._patience.drain_s)
        await self._send(socket, _TERMINATE)

    async def _send_audio(self, socket: RelaySocket, samples: Samples) -> None:
        """In frames that AssemblyAI takes; what is too little for one waits for more."""
        self._heard += len(samples)
        self._waiting.append(samples)
        if sum(map(len, self._waiting)) < LEAST:
            return
        whole = np.concatenate(self._waiting)
        at = 0
        while len(whole) - at >= LEAST:
            await self._send_frame(socket, whole[at : at + MOST])
            at += MOST
        self._waiting = [whole[at:]] if at < len(whole) else []

    async def _send_frame(self, socket: RelaySocket, samples: Samples) -> None:
        ahead_s = self._sent / SAMPLE_RATE - (self._loop.time() - self._opened_at)
        if ahead_s > self._patience.ahead_s:
            await asyncio.sleep(ahead_s - self._patience.ahead_s)
        self._sent += len(samples)
        await self._send(socket, samples.astype("<i2", copy=False).tobytes())

    async def _force(self, socket: RelaySocket) -> None:
        """What was sent is final when this returns, or AssemblyAI has nothing to say of it."""
        if self._asked == self._sent and not self._turns.is_open:
            return
        self._answered.clear()
        self._asked = self._sent
        await self._send(socket, _FORCE)
        try:
            async with asyncio.timeout(self._patience.endpoint_s if self._turns.is_open else self._patience.quiet_s):
                await self._answered.wait()
        except TimeoutError:
            pass

    async def _keep_alive(self, socket: RelaySocket) -> None:
        while not self._ended:
            idle_s = self._loop.time() - self._sent_at
            if idle_s < self._patience.keep_alive_s:
                await asyncio.sleep(self._patience.keep_alive_s - idle_s)
            else:
                await self._send(socket, _KEEP_ALIVE)

    async def _send(self, socket: RelaySocket, frame: str | bytes) -> None:
        self._sent_at = self._loop.time()
        await socket.send(frame, self._patience.silent_s)

    # --- what we hear ---

    async def _listen(self, socket: RelaySocket) -> None:
        """To the last message. In silence AssemblyAI has nothing to say, however long; that it is still there is for
        the socket's pings to find out."""
        try:
            async with asyncio.timeout(self._patience.begin_s) as self._deadline:
                while not (isinstance(message := await self._next(socket), Termination) and self._ended):
                    await self._heed(socket, message)
        except TimeoutError:
            raise late(self._account) from None

    async def _next(self, socket: RelaySocket) -> Message | None:
        if self._turns.awaits_format:
            try:
                async with asyncio.timeout(self._patience.format_s):
                    return load_message(self._account, await socket.recv())
            except TimeoutError:
                await self._tell(self._turns.settle())
                self._answered.set()
        return load_message(self._account, await socket.recv())

    async def _heed(self, socket: RelaySocket, message: Message | None) -> None:
        if not self._begun and not isinstance(message, Begin | Error):
            raise BadAnswer(f"{self._account.backend} does not speak as expected.")
        match message:
            case Begin():
                self._begin()
            case Turn():
                await self._tell(self._turns.turn(message, self._heard_ms))
                if message.end_of_turn and not self._turns.is_open:
                    self._answered.set()
                elif self._turns.is_too_long and self._forced != message.turn_order and not self._ended:
                    self._forced = message.turn_order
                    await self._send(socket, _FORCE)
            case Error():
                raise failure(self._account, message)

    def _begin(self) -> None:
        if self._deadline is not None and not self._begun:
            drained_at = self._loop.time() + self._patience.drain_s
            self._deadline.reschedule(drained_at if self._ended else None)
        self._begun = True


def live_url(base_url: str) -> str:
    """AssemblyAI takes live audio at hosts of their own; who speaks as it does, at one."""
    scheme, host, path, *_ = urlsplit(base_url)
    if host.startswith("api.") and host.endswith(".assemblyai.com"):
        host = host.replace("api.", "streaming.", 1)
    return urlunsplit((scheme.replace("http", "ws", 1), host, path.rstrip("/") + LIVE, "", ""))


def _padded(samples: Samples) -> Samples:
    return np.pad(samples, (0, max(0, LEAST - len(samples))))
