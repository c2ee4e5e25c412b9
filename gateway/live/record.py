"""A session's messages: numbered, sent to whoever is attached, and kept for whoever comes back."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from gateway.live.frames import Frames, Message, ResumeFailed

KEPT_CHARACTERS = 256 * 1024

_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))

Before: TypeAlias = Callable[[int], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Kept:
    """A message as it goes over the wire."""

    seq: int
    text: str


class Record:
    """Several tasks may speak; the messages of one record go out in the order of their numbers.

    Keeps the latest messages, up to `KEPT_CHARACTERS` of them; none where `keep` is false.
    """

    def __init__(self, *, keep: bool):
        self.frames: Frames | None = None
        self.seq = 0
        self._keep = keep
        self._kept: deque[Kept] = deque()
        self._size = 0
        self._speaking = asyncio.Lock()

    @property
    def kept(self) -> tuple[Kept, ...]:
        return tuple(self._kept)

    def go_on(self, seq: int, messages: Iterable[Message]) -> None:
        """Begins after message `seq` of another process's record, with what comes next."""
        self.seq = seq
        for message in messages:
            self.seq += 1
            self._remember(Kept(self.seq, wire(message, self.seq)))

    async def say(self, message: Message, *, again: Message | None = None, before: Before | None = None) -> None:
        """Sends the message with the next number, which `before` hears first; whoever hears it later hears `again`.
        Raises `NotReading`."""
        async with self._speaking:
            self.seq += 1
            if before is not None:
                await before(self.seq)
            text = wire(message, self.seq)
            self._remember(Kept(self.seq, text if again is None else wire(again, self.seq)))
            if self.frames is not None:
                await self.frames.send(text)

    def has_since(self, seq: int) -> bool:
        """Whether everything after message `seq` can be told again."""
        oldest = self._kept[0].seq if self._kept else self.seq + 1
        return oldest - 1 <= seq <= self.seq

    async def attach(self, frames: Frames, ready: Message, last_seq: int | None = None) -> None:
        """From now on the messages go to `frames`: first `ready`, which stands outside the count where messages after
        `last_seq` are told again, and those. Raises `NotReading`, `ResumeFailed`."""
        async with self._speaking:
            if last_seq is None:
                self.seq += 1
                await frames.send(wire(ready, self.seq))
            else:
                if not self.has_since(last_seq):
                    raise ResumeFailed
                await frames.send(wire(ready, 0))
                for kept in self.kept:
                    if kept.seq > last_seq:
                        await frames.send(kept.text)
            self.frames = frames

    def _remember(self, message: Kept) -> None:
        if not self._keep:
            return
        self._kept.append(message)
        self._size += len(message.text)
        while self._size > KEPT_CHARACTERS:
            self._size -= len(self._kept.popleft().text)


def wire(message: Message, seq: int) -> str:
    """The message as it goes over the wire."""
    return _JSON.encode({"type": message["type"], "seq": seq, **message})
