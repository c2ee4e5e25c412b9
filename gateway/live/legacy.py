"""What a live session leaves to whoever goes on with it in another process.

It lies in the coordination store under the digest of the resume token. It is written when an utterance is announced or
answered and when a block is settled, and *before* the client hears of it: a process that dies at any moment leaves
nothing told that its successor would tell again, and nothing heard as answered that it would not. Partials are not
kept; deltas are, and are written with what comes next.

Nothing here decides who goes on: that is the session's row (`Admission.resumed`). What a former holder still writes
speaks of its own turn, and hurts nobody.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

import structlog

from dispatchers.interface import Event, Final, Gap, Partial, SpeechStarted, Used
from dispatchers.streaming import Continuation, Summary
from gateway.live.codec import Codec, Resume
from gateway.live.frames import Message, ResumeFailed
from policy.errors import LedgerUnavailable
from policy.lease import Lease
from runtime.coordination import Coordination, CoordinationUnavailable

log = structlog.get_logger()

RENEW_S = 5.0
WRITE_S = 0.5
"""A message waits no longer than this for the store, and only once: then it is told without."""

LOST = "lost"


@dataclass(frozen=True, slots=True)
class Head:
    """Where a session stands: times in ms on its sample clock, `announced` utterances, of which `unfinished` have no
    final yet, each with its start. `opening` is the codec's own."""

    session: str
    turn: int
    opening: Mapping[str, Any]
    seq: int = 0
    accepted_ms: int = 0
    answered_ms: int = 0
    announced: int = 0
    unfinished: tuple[tuple[int, int], ...] = ()

    def after(self, event: Event) -> Head:
        """Where it stands when this was told."""
        match event:
            case SpeechStarted(utterance, start_ms):
                unfinished = (*self.unfinished, (utterance, start_ms))
                return replace(self, announced=max(self.announced, utterance), unfinished=unfinished)
            case Final(utterance=utterance, end_ms=end_ms):
                left = tuple(each for each in self.unfinished if each[0] != utterance)
                return replace(self, unfinished=left, answered_ms=max(self.answered_ms, end_ms))
            case Gap(start_ms, end_ms):
                left = tuple(each for each in self.unfinished if each[1] != start_ms)
                return replace(self, unfinished=left, answered_ms=max(self.answered_ms, end_ms))
            case _:
                return self


@dataclass(frozen=True, slots=True)
class Entry:
    """A message that was told, and what the session's account has of it."""

    seq: int
    message: Message
    text: str = ""
    language: str | None = None
    lost_ms: int = 0

    @classmethod
    def of(cls, seq: int, message: Message, event: Event) -> Entry:
        match event:
            case Final(text=text, language=language):
                return cls(seq, message, text, language)
            case Gap(start_ms, end_ms):
                return cls(seq, message, lost_ms=end_ms - start_ms)
            case _:
                return cls(seq, message)

    def written(self) -> str:
        return _json([self.seq, self.message, self.text, self.language, self.lost_ms])


@dataclass(frozen=True, slots=True)
class Legacy:
    """A session to go on with, as its client knows it: `missed` is what it has not heard, with numbers that follow."""

    head: Head
    last_seq: int
    told: tuple[Entry, ...]
    missed: tuple[Entry, ...]
    keys: tuple[str, str]

    @property
    def from_ms(self) -> int:
        """Where audio is taken up again."""
        return self.head.answered_ms

    def continuation(self) -> Continuation:
        """For the door."""
        summary = Summary()
        for entry in self.told + self.missed:
            summary.gap_ms += entry.lost_ms
            if entry.text:
                summary.note(Final(0, entry.text, 0, 0, entry.language or "", 0.0))
        return Continuation(UUID(self.head.session), self.head.turn, self.from_ms, self.head.announced, summary)


async def left_behind(coordination: Coordination, tenant_id: UUID, codec: Codec, resume: Resume) -> Legacy:
    """What the token stands for. Raises `ResumeFailed`, `CoordinationUnavailable`."""
    key = _key(tenant_id, resume.token)
    found = await coordination.kept(key)
    if found is None:
        raise ResumeFailed
    try:
        head = _head(found)
        entries = {entry.seq: entry for entry in map(_entry, await coordination.entries(_log(head)))}
    except (ValueError, TypeError):  # another release's
        raise ResumeFailed from None
    told = tuple(entry for seq, entry in sorted(entries.items()) if seq <= min(resume.last_seq, head.seq))
    missed = [entry for seq, entry in sorted(entries.items()) if resume.last_seq < seq <= head.seq]
    for event in _closings(head, resume, told):
        message = codec.event(event)
        if message is not None:
            missed.append(Entry.of(0, message, event))
        head = head.after(event)
    numbered = tuple(replace(entry, seq=seq) for seq, entry in enumerate(missed, resume.last_seq + 1))
    return Legacy(head, resume.last_seq, told, numbered, (key, _log(head)))


def _closings(head: Head, resume: Resume, told: tuple[Entry, ...]) -> list[Event]:
    """What the client must hear before anything new: utterances that nobody will finish, as they are heard again from
    the start, are taken back; audio that it cannot send again is a gap."""
    at = head.answered_ms
    language = next((entry.language for entry in reversed(told) if entry.language), "")
    events: list[Event] = [
        Final(utterance, "", at, at, language, confidence=0.0, revised=True) for utterance, _ in head.unfinished
    ]
    from_ms = min(resume.from_ms or 0, head.accepted_ms)
    if from_ms > at:
        events.append(Gap(at, from_ms, LOST))
    return events


class Keeper:
    """Keeps a session's legacy for as long as this process has it, and `window_s` longer."""

    def __init__(self, coordination: Coordination, tenant_id: UUID, head: Head, *, window_s: float):
        self.away = False  # the store did not answer: what it has is not the latest
        self._coordination = coordination
        self._tenant_id = tenant_id
        self._head = head
        self._interval_s = min(RENEW_S, window_s / 3)
        self._ttl_s = window_s + self._interval_s
        self._key: str | None = None
        self._log = _log(head)
        self._former: tuple[str, ...] = ()
        self._entries: list[str] = []
        self._written = 0
        self._doubt = asyncio.Event()  # whether the session is still ours

    @property
    def shared(self) -> bool:
        """Whether another process could go on with it."""
        return self._coordination.shared

    @classmethod
    def of(
        cls,
        coordination: Coordination,
        lease: Lease,
        opening: Mapping[str, Any],
        legacy: Legacy | None,
        *,
        window_s: float,
    ) -> Keeper:
        """A session's. What another process kept of it is forgotten when this has been written."""
        head = Head(lease.session_id.hex, lease.turn, opening)
        if legacy is None:
            return cls(coordination, lease.tenant_id, head, window_s=window_s)
        head = replace(legacy.head, turn=lease.turn, seq=legacy.last_seq + len(legacy.missed))
        keeper = cls(coordination, lease.tenant_id, head, window_s=window_s)
        keeper._entries = [entry.written() for entry in legacy.told + legacy.missed]
        keeper._former = legacy.keys
        return keeper

    async def move(self, token: str, accepted_ms: int) -> None:
        """From now on it is found by another token, and not by the one before."""
        former, self._key = self._key, _key(self._tenant_id, token)
        self._former += () if former is None else (former,)
        await self._save(replace(self._head, accepted_ms=accepted_ms), anew=True)
        if self._former and not self.away:
            await self._forget(*self._former)
            self._former = ()

    async def note(self, event: Event, message: Message, accepted_ms: int, seq: int) -> None:
        """This is about to be told."""
        if isinstance(event, Partial):
            return
        self._entries.append(Entry.of(seq, message, event).written())
        self._head = replace(self._head.after(event), seq=seq, accepted_ms=accepted_ms)
        if isinstance(event, SpeechStarted | Final | Gap | Used) and not self.away:
            await self._save(self._head)

    async def watch(self, check: Callable[[], Awaitable[None]]) -> None:
        """Renews it until cancelled. When it is gone, somebody else may have taken the session over, which `check`
        raises; else it is written anew."""
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._doubt.wait(), self._interval_s)
            with suppress(CoordinationUnavailable):
                if self._key is None or await self._is_there(self._key):
                    continue
            with suppress(LedgerUnavailable):
                await check()
                self._written = 0
                await self._save(self._head, anew=True)
            self._doubt.clear()

    async def leave(self, accepted_ms: int) -> None:
        """This process is done with the session: from now on the window counts."""
        await self._save(replace(self._head, accepted_ms=accepted_ms))

    async def close(self) -> None:
        """The session is over."""
        if self._key is not None:
            await self._forget(self._key, self._log)

    async def _is_there(self, key: str) -> bool:
        if self.away or self._doubt.is_set():
            return False
        return await self._coordination.renew(key, self._log, self._ttl_s)

    async def _save(self, head: Head, *, anew: bool = False) -> None:
        self._head = head
        if self._key is None:
            return
        upto = len(self._entries)
        fresh = self._entries[self._written : upto]
        value = _json({name: getattr(head, name) for name in Head.__slots__})
        try:
            async with asyncio.timeout(WRITE_S):
                ours = await self._coordination.keep(self._key, value, self._log, fresh, self._ttl_s, anew=anew)
        except (CoordinationUnavailable, TimeoutError):
            if not self.away:
                log.warning("stream.not_kept", session_id=head.session)
            self.away = True
        else:
            self.away, self._written = False, upto
            if not ours:
                self._doubt.set()

    async def _forget(self, *keys: str) -> None:
        with suppress(CoordinationUnavailable):  # it is forgotten by itself
            await self._coordination.forget(*keys)


def _key(tenant_id: UUID, token: str) -> str:
    return f"live:{tenant_id.hex}:{hashlib.sha256(token.encode()).hexdigest()}"


def _log(head: Head) -> str:
    return f"live:{head.session}:{head.turn}"


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _head(written: str) -> Head:
    fields = json.loads(written)
    unfinished = tuple((utterance, start_ms) for utterance, start_ms in fields.pop("unfinished"))
    return Head(**fields, unfinished=unfinished)


def _entry(written: str) -> Entry:
    return Entry(*json.loads(written))
