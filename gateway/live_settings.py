"""The settings of a running gateway: the environment's, but for what the operator changed since."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal, TypeAlias

import structlog

from policy import overrides
from policy.outage import ledger_reachable
from policy.overrides import Overrides
from runtime.resources import Resources
from runtime.settings import Settings
from runtime.telemetry import set_log_level

log = structlog.get_logger()

POLL_S = 5.0

Source: TypeAlias = Literal["default", "environment", "override"]


class LiveSettings:
    """Whoever asks `current` at the moment of use follows every change. It is replaced as a whole."""

    def __init__(self, resources: Resources):
        self.current: Settings = resources.settings
        self._own = resources.settings
        self._database = resources.database
        self._overrides: Overrides = {}
        self._overridden: frozenset[str] = frozenset()
        self._turn = asyncio.Lock()  # a poll must not bring back what a change has just replaced

    def source(self, name: str) -> Source:
        """Where the setting's value comes from."""
        if name in self._overridden:
            return "override"
        return "environment" if name in self._own.model_fields_set else "default"

    async def change(self, changes: Overrides, *, actor: str, request_id: str | None) -> None:
        """For every gateway on this database, here at once. Raises `Invalid`, `SettingFixed`, `LedgerUnavailable`."""
        async with self._turn:
            with ledger_reachable():
                async with self._database.across_tenants("change settings") as tx:
                    changed = await overrides.put(tx, changes, actor=actor, request_id=request_id)
            self._adopt(changed)

    async def refresh(self) -> None:
        """Takes over what other gateways and the command line changed. While Postgres is away all stays as it is."""
        async with self._turn:
            async with self._database.across_tenants("read changed settings") as tx:
                changed = await overrides.read(tx)
            self._adopt(changed)

    def _adopt(self, changed: Overrides) -> None:
        if changed == self._overrides:
            return
        former = self.current
        self._overrides = changed
        self.current, self._overridden = overrides.applied(self._own, changed)
        if self.current.log_level != former.log_level:
            set_log_level(self.current.log_level)
        log.info("settings.changed", overridden=sorted(self._overridden))


@asynccontextmanager
async def live_settings(resources: Resources, *, poll_s: float = POLL_S) -> AsyncIterator[LiveSettings]:
    """This process's settings, kept up to date. Without its Postgres a gateway starts with the environment's."""
    settings = LiveSettings(resources)
    await _refreshed(settings)
    following = asyncio.create_task(_follow(settings, poll_s))
    try:
        yield settings
    finally:
        following.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await following


async def _follow(settings: LiveSettings, poll_s: float) -> None:
    while True:
        await asyncio.sleep(poll_s)
        await _refreshed(settings)


async def _refreshed(settings: LiveSettings) -> None:
    try:
        await settings.refresh()
    except Exception as exc:  # noqa: BLE001 — whatever the driver raises: the last known values stand
        log.warning("settings.unread", error=type(exc).__name__)
