"""The versions of tenants' policies."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

from gateway.commands.database import with_doors
from policy import checks, history, policies, tenants
from policy.checks import Problem
from policy.errors import Invalid
from policy.history import Version
from policy.policies import SELF_HOSTED, Policy
from policy.resolve import Offer
from policy.tenants import Tenant
from runtime.database import Database, Transaction
from runtime.settings import Settings

ACTOR = "cli"

T = TypeVar("T")


def show(settings: Settings, slug: str, version: int | None) -> Version:
    """A version; None: the one in force."""
    return _of_tenant(settings, slug, lambda tx, tenant: history.get(tx, tenant.id, version))


def listing(settings: Settings, slug: str) -> list[Version]:
    """The newest versions, newest first."""

    async def work(tx: Transaction, tenant: Tenant) -> list[Version]:
        versions, _ = await history.listing(tx, tenant.id, limit=history.MAX_LIMIT)
        return versions

    return _of_tenant(settings, slug, work)


def put(settings: Settings, slug: str, draft: str, *, since: str | None, newest: int | None) -> Policy:
    """A new version, in force now or since then. Raises `Invalid`, which tells everything that is wrong; `Conflict`."""
    at = _moment(since)

    async def work(tx: Transaction, tenant: Tenant) -> Policy:
        body = checks.require_fit(draft, await _known(tx))
        return await policies.put(tx, tenant.id, body, actor=ACTOR, effective_from=at, newest=newest)

    return _of_tenant(settings, slug, work)


def rollback(settings: Settings, slug: str, version: int, *, since: str | None) -> Policy:
    """A new version with the content of an old one."""
    at = _moment(since)
    return _of_tenant(
        settings,
        slug,
        lambda tx, tenant: history.rollback(tx, tenant.id, version, actor=ACTOR, effective_from=at),
    )


def withdraw(settings: Settings, slug: str, version: int) -> None:
    """Takes a scheduled version back."""
    _of_tenant(settings, slug, lambda tx, tenant: history.withdraw(tx, tenant.id, version, actor=ACTOR))


def diff(settings: Settings, slug: str, before: int | None, after: int | None) -> dict[str, tuple[Any, Any]]:
    """What one version changes of another, by field; None: the one in force."""

    async def work(tx: Transaction, tenant: Tenant) -> dict[str, tuple[Any, Any]]:
        one, other = [await history.get(tx, tenant.id, version) for version in (before, after)]
        return history.difference(one.body, other.body)

    return _of_tenant(settings, slug, work)


def check(settings: Settings, slug: str, draft: str) -> tuple[tuple[Problem, ...], dict[str, tuple[Any, Any]]]:
    """What is wrong with a draft, and what it would change of the policy in force."""

    async def work(tx: Transaction, tenant: Tenant) -> tuple[tuple[Problem, ...], dict[str, tuple[Any, Any]]]:
        body, problems = checks.read(draft)
        if body is None:
            return problems, {}
        current = await policies.current(tx, tenant.id)
        return checks.misfits(body, await _known(tx)), history.difference(current.body, body)

    return _of_tenant(settings, slug, work)


async def _known(tx: Transaction) -> tuple[Offer, ...]:
    """The engine, whose models only a running gateway knows, and the relays."""
    return await checks.known(
        tx, (Offer(SELF_HOSTED, (), words=True, translate=True, streaming=True, languages=None, up=True),)
    )


def _moment(shown: str | None) -> datetime | None:
    """`2026-12-01` or `2026-12-01T08:00+01:00`; without an offset, UTC. Raises `Invalid`."""
    if shown is None:
        return None
    try:
        moment = datetime.fromisoformat(shown)
    except ValueError as error:
        raise Invalid(f"{shown!r} is no moment; write 2026-12-01T08:00Z") from error
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _of_tenant(settings: Settings, slug: str, work: Callable[[Transaction, Tenant], Awaitable[T]]) -> T:
    async def run(database: Database) -> T:
        async with database.across_tenants("a tenant's policies") as tx:
            return await work(tx, await tenants.by_slug(tx, slug))

    return with_doors(settings, run)
