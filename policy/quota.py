"""A tenant's limits from moment to moment: how much at once, how often."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from uuid import UUID

import structlog

from policy.errors import ConcurrencyLimited, RateLimited
from policy.policies import PolicyBody
from policy.sessions import Kind
from runtime.beats import beating
from runtime.coordination import Coordination, CoordinationUnavailable

log = structlog.get_logger(__name__)

SEAT_TTL_S = 30.0
RENEW_S = 10.0
RETRY_AFTER_S = 1.0


@asynccontextmanager
async def admitted(
    coordination: Coordination, tenant_id: UUID, session_id: UUID, kind: Kind, limits: PolicyBody, *, seats: int = 1
) -> AsyncIterator[None]:
    """One request within the tenant's limits; a stream or file keeps its seats while inside, a job needs none.

    The seat comes first: a request refused for want of one does not count against the rate. Raises
    `ConcurrencyLimited`, `RateLimited`, `CoordinationUnavailable`.
    """
    async with seated(coordination, tenant_id, session_id, kind, limits, seats=seats):
        await _spend(coordination, tenant_id, limits.requests_per_minute)
        yield


@asynccontextmanager
async def seated(
    coordination: Coordination, tenant_id: UUID, session_id: UUID, kind: Kind, limits: PolicyBody, *, seats: int = 1
) -> AsyncIterator[None]:
    """The same for a session that goes on: its beginning was counted already."""
    if kind == "job":
        yield
        return
    limit = limits.max_streams if kind == "stream" else limits.max_requests
    key = f"seats:{tenant_id.hex}:{kind}"
    async with AsyncExitStack() as taken:
        for number in range(seats):
            await taken.enter_async_context(_seat(coordination, key, f"{session_id.hex}.{number}", limit))
        yield


@asynccontextmanager
async def _seat(coordination: Coordination, key: str, member: str, limit: int) -> AsyncIterator[None]:
    if not await coordination.seat(key, member, limit, SEAT_TTL_S):
        raise ConcurrencyLimited(retry_after_s=RETRY_AFTER_S)

    async def renew() -> None:
        try:
            await coordination.seat(key, member, limit, SEAT_TTL_S)
        except CoordinationUnavailable:
            log.warning("quota.seat_not_renewed")

    try:
        with beating(RENEW_S, renew):
            yield
    finally:
        try:
            await coordination.leave(key, member)
        except CoordinationUnavailable:
            log.warning("quota.seat_not_given_back", expires_in_s=SEAT_TTL_S)


async def _spend(coordination: Coordination, tenant_id: UUID, per_minute: int | None) -> None:
    """A quiet tenant may spend a whole minute's requests at once."""
    if per_minute is None:
        return
    wait_s = await coordination.spend(f"requests:{tenant_id.hex}", 1, per_minute, per_minute)
    if wait_s > 0:
        raise RateLimited(retry_after_s=wait_s)
