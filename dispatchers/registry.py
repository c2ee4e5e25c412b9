"""What is plugged in: this installation's own engine, and the operator's relays as the database has them now.

A relay is plugged in once for each credential. A tenant is shown the one with its own credential, else the shared one.
A changed relay, or another credential, is a new plug beside the old, which serves to their end those who use it: keys
are rotated, and addresses changed, without anybody noticing.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias
from uuid import UUID

import structlog

from dispatchers.adapters.guarded import Guarded
from dispatchers.errors import DispatchError
from dispatchers.health import STATES, Breaker, RetryBudget
from dispatchers.interface import Dispatcher
from dispatchers.plug import Plug
from dispatchers.providers import PROVIDERS, open_relay
from policy.relays import Credential, Relay
from policy.resolve import Offer
from runtime.telemetry import BACKEND_CREDENTIALS, BACKEND_PROBES, BACKEND_UP

log = structlog.get_logger()

CLOSE_S = 5.0
NO_KEY = "none"
"""For servers of the operator's own, which may want none."""

Key: TypeAlias = tuple[Relay, UUID | None]
Known: TypeAlias = tuple[tuple[Relay, ...], tuple[Credential, ...]]


@dataclass(frozen=True)
class Relays:
    """Where relays come from, and how they are run: `load` reads those there are, `note_used` takes down which
    credentials served, `segmented` makes streams of those that only take whole recordings."""

    load: Callable[[], Awaitable[Known]]
    note_used: Callable[[list[UUID]], Awaitable[None]]
    segmented: Callable[[Dispatcher], Dispatcher]
    refresh_s: float
    requests: int
    streams: int


class Registry:
    """Of one process. `own` does not change; `relays` None: there are none."""

    @classmethod
    def only(cls, recogniser: Dispatcher) -> Registry:
        """This as `self_hosted`, and nothing else."""
        return cls([Plug("self_hosted", recogniser)])

    def __init__(self, own: Iterable[Plug], relays: Relays | None = None):
        self._own = {plug.backend: plug for plug in own}
        self._relays = relays
        self._plugs: dict[Key, Plug] = {}
        self._shared: dict[str, Plug] = {}
        self._of_tenants: dict[UUID, dict[str, Plug]] = {}
        self._unusable: set[Key] = set()
        self._budgets: defaultdict[str, RetryBudget] = defaultdict(RetryBudget)
        self._tasks: set[asyncio.Task[None]] = set()  # that close, or ask

    def plugs(self, tenant_id: UUID | None = None) -> Mapping[str, Plug]:
        """By backend, as this tenant has them."""
        mine = self._of_tenants.get(tenant_id, {}) if tenant_id is not None else {}
        return {**self._own, **self._shared, **mine}

    def plug(self, tenant_id: UUID, backend: str) -> Plug | None:
        """None: there is none any more."""
        mine = self._of_tenants.get(tenant_id, {})
        return self._own.get(backend) or mine.get(backend) or self._shared.get(backend)

    def offers(self, tenant_id: UUID | None = None) -> tuple[Offer, ...]:
        """What is plugged in, as the resolver sees it."""
        return tuple(plug.offer() for plug in self.plugs(tenant_id).values())

    @property
    def alone(self) -> bool:
        """Whether there are no relays."""
        return not self._plugs

    @property
    def up(self) -> bool:
        """Whether anything can be asked, on whomever's behalf."""
        return any(plug.up for plug in (*self._own.values(), *self._plugs.values()))

    def budget(self, backend: str) -> RetryBudget:
        return self._budgets[backend]

    # --- relays ---

    async def run(self) -> None:
        """Keeps up with the database, and tries what was down, until cancelled."""
        assert self._relays is not None  # noqa: S101
        while True:
            await asyncio.sleep(self._relays.refresh_s)
            await self.keep_up()
            for plug in self._plugs.values():
                self._begin(self._probe(plug))

    async def keep_up(self) -> None:
        """Plugs in what there is now. Where that cannot be found out, what there was goes on."""
        try:
            await self.refresh()
            await self._note_used()
        except Exception as error:  # noqa: BLE001 — whatever it is, it must not be the last time
            log.warning("relays.not_refreshed", error=type(error).__name__)

    async def refresh(self) -> None:
        """The same. Raises what the database raises."""
        if self._relays is None:
            return
        relays, credentials = await self._relays.load()
        plugs: dict[Key, Plug] = {}
        shared: dict[str, Plug] = {}
        of_tenants: dict[UUID, dict[str, Plug]] = {}
        for relay in relays:
            for credential in _accounts(relay, credentials):
                key = (relay, None if credential is None else credential.id)
                plug = self._plugs.get(key) or self._opened(key, relay, credential)
                if plug is None:
                    continue
                plugs[key] = plug
                tenant_id = None if credential is None else credential.tenant_id
                (shared if tenant_id is None else of_tenants.setdefault(tenant_id, {}))[relay.name] = plug
        former, self._plugs, self._shared, self._of_tenants = self._plugs, plugs, shared, of_tenants
        for key, plug in former.items():
            if key not in plugs:
                self._close(plug)

    async def aclose(self) -> None:
        """Closes the relays; what still uses them has a moment."""
        for plug in self._plugs.values():
            self._close(plug)
        self._plugs, self._shared, self._of_tenants = {}, {}, {}
        if self._tasks:
            _, slow = await asyncio.wait(self._tasks, timeout=CLOSE_S)
            for task in slow:
                task.cancel()
            await asyncio.gather(*slow, return_exceptions=True)

    def tell(self) -> None:
        """Brings the states of backends among the metrics."""
        BACKEND_UP.clear()
        BACKEND_CREDENTIALS.clear()
        for name, plug in self._own.items():
            BACKEND_UP.labels(name).set(plug.up)
        states: dict[str, Counter[str]] = {}
        up: Counter[str] = Counter()
        for plug in self._plugs.values():
            if plug.breaker is not None:
                states.setdefault(plug.backend, Counter())[plug.breaker.state] += 1
                up[plug.backend] += plug.up
        for backend, counts in states.items():
            BACKEND_UP.labels(backend).set(up[backend] > 0)
            for state in STATES:
                BACKEND_CREDENTIALS.labels(backend, state).set(counts[state])

    def _opened(self, key: Key, relay: Relay, credential: Credential | None) -> Plug | None:
        """None, and said once: it cannot be opened as it is written."""
        assert self._relays is not None  # noqa: S101
        if key in self._unusable:
            return None
        try:
            account = PROVIDERS[relay.provider].account(
                backend=relay.name,
                key=NO_KEY if credential is None else credential.key,
                shown=NO_KEY if credential is None else credential.prefix,
                base_url=relay.base_url,
                region=relay.region,
                models=relay.models,
            )
            recogniser = open_relay(relay.provider, account)
        except Exception as error:  # noqa: BLE001 — whatever it is, the others must be plugged in
            self._unusable.add(key)
            log.error("relay.unusable", relay=relay.name, why=error)  # noqa: TRY400 — it names the remedy
            return None
        breaker = Breaker(relay.name)
        guarded = Guarded(recogniser, breaker, requests=self._relays.requests, streams=self._relays.streams)
        log.info("relay.plugged_in", relay=relay.name, provider=relay.provider, credential=account.shown)
        return Plug(
            relay.name,
            guarded,
            kind="relay",
            region=relay.region,
            segmented=self._relays.segmented,
            credential_id=None if credential is None else credential.id,
            breaker=breaker,
        )

    def _close(self, plug: Plug) -> None:
        self._begin(plug.close())

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # the loop itself keeps no task alive
        task.add_done_callback(self._tasks.discard)

    async def _note_used(self) -> None:
        assert self._relays is not None  # noqa: S101
        used = [plug for plug in self._plugs.values() if plug.used and plug.credential_id is not None]
        for plug in used:
            plug.used = False
        if used:
            await self._relays.note_used([plug.credential_id for plug in used if plug.credential_id is not None])

    async def _probe(self, plug: Plug) -> None:
        """Asks one that was down and may be tried, if that costs nothing; else the next request finds out."""
        breaker, guarded = plug.breaker, plug.recogniser
        if breaker is None or breaker.state != "half_open" or not breaker.up or not isinstance(guarded, Guarded):
            return
        with plug.using():
            try:
                asked = await guarded.probe()
            except DispatchError as error:
                BACKEND_PROBES.labels(plug.backend, error.code).inc()
            else:
                if asked:
                    BACKEND_PROBES.labels(plug.backend, "completed").inc()


def _accounts(relay: Relay, credentials: Iterable[Credential]) -> list[Credential | None]:
    """With which credentials a relay is used. A server of the operator's own may need none."""
    mine: list[Credential | None] = [credential for credential in credentials if credential.relay == relay.name]
    provider = PROVIDERS.get(relay.provider)
    if not mine and provider is not None and provider.base_url is None:
        return [None]
    return mine
