"""What is plugged in follows what there is, and takes nothing away from those who use it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from uuid import UUID, uuid4

import asyncpg
import pytest

from dispatchers import registry as module
from dispatchers.backends.scripted import Scripted
from dispatchers.interface import Dispatcher
from dispatchers.registry import Known, Registry, Relays
from policy.relays import Credential, Relay

OURS, THEIRS = uuid4(), uuid4()
GROQ = Relay("groq", "groq")
ODD_ADDRESSES = ("https://999.1.1.1/v1", "https://[v1.a]/v1")
SERVER = Relay("vllm-eu", "vllm", base_url="http://127.0.0.1:9/v1", region="eu", models=("small",))


def credential(relay: str, tenant_id: UUID | None = None) -> Credential:
    return Credential(uuid4(), relay, tenant_id, "gsk_tes…", "gsk_test_0123456789")


@dataclass
class Closing(Scripted):
    """A relay that says when it is closed."""

    closed: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    async def aclose(self) -> None:
        self.closed = True


@dataclass
class There:
    """What the database has, and what was opened for it."""

    known: Known = ((), ())
    opened: list[Closing] = field(default_factory=list)
    used: list[UUID] = field(default_factory=list)

    async def load(self) -> Known:
        return self.known

    async def note_used(self, ids: list[UUID]) -> None:
        self.used += ids

    def open(self, provider: str, account: object) -> Dispatcher:
        self.opened.append(Closing())
        return self.opened[-1]

    def registry(self) -> Registry:
        how = Relays(self.load, self.note_used, lambda within: within, refresh_s=0.01, requests=8, streams=8)
        return Registry([], how)


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> There:
    there = There()
    monkeypatch.setattr(module, "open_relay", there.open)
    return there


async def test_a_tenants_own_account_comes_before_the_shared_one(there: There) -> None:
    shared, own = credential("groq"), credential("groq", OURS)
    there.known = ((GROQ,), (shared, own))
    registry = there.registry()
    await registry.refresh()
    assert [registry.plugs(tenant)["groq"].credential_id for tenant in (OURS, THEIRS, None)] == [
        own.id,
        shared.id,
        shared.id,
    ]
    there.known = ((GROQ,), (own,))
    await registry.refresh()
    assert (len(registry.plugs(OURS)), len(registry.plugs(THEIRS)), registry.plug(THEIRS, "groq")) == (1, 0, None)


async def test_what_has_not_changed_stays(there: There) -> None:
    there.known = ((GROQ,), (credential("groq"),))
    registry = there.registry()
    await registry.refresh()
    (before,) = registry.plugs().values()
    await registry.refresh()
    assert registry.plugs()["groq"] is before
    there.known = ((replace(GROQ, region="us"),), there.known[1])
    await registry.refresh()
    assert registry.plugs()["groq"] is not before
    assert len(there.opened) == 2


async def test_an_old_account_is_closed_when_nobody_uses_it_any_more(there: There) -> None:
    first, second = credential("groq"), credential("groq")
    there.known = ((GROQ,), (first,))
    registry = there.registry()
    await registry.refresh()
    with registry.plugs()["groq"].using():
        there.known = ((GROQ,), (second,))
        await registry.refresh()
        assert registry.plugs()["groq"].credential_id == second.id
        await asyncio.sleep(0.02)
        assert not there.opened[0].closed
    await asyncio.sleep(0.02)
    assert (there.opened[0].closed, there.opened[1].closed) == (True, False)
    await registry.aclose()
    assert there.opened[1].closed


async def test_a_server_of_ones_own_may_need_no_key(there: There) -> None:
    there.known = ((GROQ, SERVER), ())
    registry = there.registry()
    await registry.refresh()
    assert set(registry.plugs()) == {"vllm-eu"}
    (offer,) = registry.offers()
    assert (offer.kind, offer.region, offer.streaming) == ("relay", "eu", True)


async def test_an_address_that_nobody_understands_is_left_out() -> None:
    odd = replace(SERVER, name="odd", base_url="https://1.2.3.999/v1")
    there = There(known=((odd, SERVER), ()))
    registry = there.registry()
    await registry.refresh()
    assert set(registry.plugs()) == {"vllm-eu"}
    await registry.aclose()


@pytest.mark.parametrize(
    "relay", [Relay("odd", "no-such-provider"), Relay("nowhere", "vllm", models=("small",)), Relay("bare", "vllm")]
)
async def test_what_cannot_be_opened_is_left_out(there: There, relay: Relay) -> None:
    there.known = ((relay, SERVER), (credential(relay.name),))
    registry = there.registry()
    await registry.refresh()
    assert set(registry.plugs()) == {"vllm-eu"}


async def test_an_address_that_is_none_keeps_no_other_out() -> None:
    """Opened in earnest: what reads URLs has its own view of them."""
    nowhere = [Relay(f"odd-{at}", "vllm", base_url=url, models=("small",)) for at, url in enumerate(ODD_ADDRESSES)]
    there = There(known=((*nowhere, SERVER), ()))
    registry = there.registry()
    await registry.refresh()
    assert set(registry.plugs()) == {"vllm-eu"}
    await registry.aclose()


async def test_the_accounts_used_are_noted_once(there: There) -> None:
    one, other = credential("groq"), credential("groq", OURS)
    there.known = ((GROQ,), (one, other))
    registry = there.registry()
    await registry.refresh()
    with registry.plugs()["groq"].using():
        pass
    await registry.keep_up()
    await registry.keep_up()
    assert there.used == [one.id]


@pytest.mark.parametrize("why", [ConnectionRefusedError(), asyncpg.CannotConnectNowError(), ValueError()])
async def test_a_database_that_is_away_changes_nothing(there: There, why: Exception) -> None:
    there.known = ((GROQ,), (credential("groq"),))
    registry = there.registry()
    await registry.refresh()

    async def away() -> Known:
        raise why

    object.__setattr__(registry._relays, "load", away)
    await registry.keep_up()
    assert set(registry.plugs()) == {"groq"}
