"""The engines of a pool: which there are now, and which of them are well."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine, Iterable, Sequence
from contextlib import suppress
from typing import Any

import structlog

from dispatchers.backends.addresses import Lookup, at_address, is_address, place
from dispatchers.backends.member import Member
from dispatchers.backends.outlier import complaint, may_go
from runtime.telemetry import ENGINE_EJECTIONS, ENGINE_IN_FLIGHT, ENGINE_UP, ENGINES

log = structlog.get_logger()

LOOKUP_S = 5.0
"""How often a name is looked up."""
FIRST_LOOK_S = 3.0


class Fleet:
    """An engine for each address that the hosts of these URLs have. `token` opens them; at most `at_once` pieces of
    work are with one. Use from one event loop."""

    def __init__(self, engines: Sequence[str], *, token: str | None, look_up: Lookup, at_once: int) -> None:
        self._engines = engines
        self._token = token
        self._look_up = look_up
        self._at_once = at_once
        self._members: dict[tuple[str, str], Member] = {}  # by URL and address
        self._watches: dict[Member, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._news = asyncio.Event()

    @property
    def members(self) -> tuple[Member, ...]:
        """In the order of the settings, and of their first appearance."""
        return tuple(self._members.values())

    @property
    def up(self) -> bool:
        """Whether any takes work."""
        return any(member.takes_work for member in self._members.values())

    async def start(self) -> None:
        """Looks the hosts up and asks each engine how it is; waits for the answers for a few seconds at most."""
        for url in self._engines:
            self._run(self._follow(url))
        with suppress(TimeoutError):
            async with asyncio.timeout(FIRST_LOOK_S):
                while not self._members or not all(member.looked for member in self._members.values()):
                    await self.news()

    async def news(self) -> None:
        """Waits until something is different: an engine's state, or the work it has."""
        await self._news.wait()

    def tell(self) -> None:
        """Wakes who waits for news."""
        news, self._news = self._news, asyncio.Event()
        news.set()
        self._count()

    def judge(self, member: Member) -> None:
        """Lets an engine out for a while that does worse than its peers."""
        ready = [each for each in self._members.values() if each.takes_work]
        if member not in ready or member.record.out:
            return
        why = complaint(member.record, [each.record for each in ready if each is not member])
        if why is not None and may_go([each.record for each in ready]):
            for_s = member.record.let_out(why)
            ENGINE_EJECTIONS.labels(why).inc()
            log.warning("engine.let_out", engine=member.label, reason=why, for_s=for_s)
            self._count()

    async def aclose(self) -> None:
        """Closes the connections."""
        tasks = {*self._tasks, *self._watches.values()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for member in self._watches:
            await self._close(member)
        self._watches.clear()
        self._members.clear()
        self._count()

    # --- who is there ---

    async def _follow(self, url: str) -> None:
        """Has an engine for each address of the URL's host, until cancelled. What cannot be looked up stays as it
        was."""
        host, port = place(url)
        if is_address(host):
            self._settle(url, port, [host])
            return
        known = True
        while True:
            try:
                self._settle(url, port, await self._look_up(host, port))
                known = True
            except (OSError, UnicodeError) as error:
                if known:
                    log.warning("engine.unknown_host", host=host, error=type(error).__name__)
                known = False
            await asyncio.sleep(LOOKUP_S)

    def _settle(self, url: str, port: int, found: Iterable[str]) -> None:
        wanted = [(url, address) for address in dict.fromkeys(found)]
        for key in wanted:
            if key not in self._members:
                self._join(key, port)
        for key in [key for key in self._members if key[0] == url and key not in wanted]:
            self._run(self._part(self._members.pop(key)))
            self.tell()

    def _join(self, key: tuple[str, str], port: int) -> None:
        url, address = key
        label = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        member = self._members[key] = Member(label, at_address(url, address, self._token), self._at_once)
        self._watches[member] = asyncio.create_task(member.watch(self.tell))

    async def _part(self, member: Member) -> None:
        """Lets an engine go that is no longer one of ours, once what it was asked is answered."""
        member.leaving = True
        log.info("engine.left", engine=member.label)
        await member.idle.wait()
        watching = self._watches[member]
        watching.cancel()
        await asyncio.wait({watching})
        del self._watches[member]
        await self._close(member)

    async def _close(self, member: Member) -> None:
        await member.client.aclose()
        with suppress(KeyError):
            ENGINE_IN_FLIGHT.remove(member.label)

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _count(self) -> None:
        states = Counter(_state(member) for member in self._members.values())
        for state in ("ready", "ejected", "away"):
            ENGINES.labels(state).set(states[state])
        ENGINE_UP.set(self.up)


def _state(member: Member) -> str:
    if not member.takes_work:
        return "away"
    return "ejected" if member.record.out else "ready"
