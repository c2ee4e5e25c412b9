"""The live sessions of this process, and how it takes leave of them."""

from __future__ import annotations

import asyncio
import random
import secrets
from contextlib import ExitStack
from uuid import UUID

import structlog

from dispatchers.dispatch import Door
from gateway.live.frames import Restarting
from gateway.live.session import Session

log = structlog.get_logger()

FINALS_S = 15.0
RECONNECT_WITHIN_S = 2.0
RETRY_AFTER_S = 5.0


class Roster:
    """Runs sessions, finds them for those who come back, and drains them."""

    def __init__(self) -> None:
        self.draining = False
        self._sessions: dict[asyncio.Task[None], Session] = {}

    @property
    def sessions(self) -> tuple[Session, ...]:
        """Those that run now, in the order of their coming."""
        return tuple(self._sessions.values())

    def refuse_when_draining(self) -> None:
        """Raises `Restarting` when nobody new is let in."""
        if self.draining:
            raise Restarting(retry_after_s=RETRY_AFTER_S)

    def run(self, session: Session, door: Door, seats: ExitStack) -> None:
        """Starts a session, which then needs nobody to wait for it."""
        task = asyncio.create_task(session.run(door, seats))
        self._sessions[task] = session
        task.add_done_callback(lambda done: self._sessions.pop(done, None))

    def find(self, token: str, tenant_id: UUID) -> Session | None:
        """The session of this process that the token is for; nobody learns of another tenant's sessions."""
        for session in self._sessions.values():
            known = session.token is not None and secrets.compare_digest(session.token.encode(), token.encode())
            if known and session.tenant_id == tenant_id:
                return session
        return None

    async def drain(self, speak_s: float) -> None:
        """Lets nobody new in and sends everybody off: told at once, cut off after `speak_s`, gone when all they said is
        answered and settled. Clients are asked to come back at different moments."""
        self.draining = True
        log.info("stream.draining", streams=len(self._sessions))
        tasks = set(self._sessions)
        leaving = [
            session.drain(speak_s, random.uniform(0, RECONNECT_WITHIN_S))  # noqa: S311 — no secret
            for session in self._sessions.values()
        ]
        await asyncio.gather(*leaving)
        if tasks:
            await asyncio.wait(tasks, timeout=speak_s + FINALS_S)
        await self.aclose()

    async def aclose(self) -> None:
        """Ends what still runs, at once: what was accepted is settled, what was not yet answered is lost."""
        tasks = list(self._sessions)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
