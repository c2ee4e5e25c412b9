"""Which engine a piece of work goes to, and which are let out for a while."""

from __future__ import annotations

import socket
from dataclasses import replace
from typing import Any

import pytest

from dispatchers.backends.addresses import is_address, look_up, place
from dispatchers.backends.choice import STICK_S, Ties, best
from dispatchers.backends.member import LOAD_S, Member
from dispatchers.backends.outlier import (
    ENOUGH,
    FAILURES,
    FORGIVEN_S,
    OUT_MOST_S,
    OUT_S,
    Record,
    complaint,
    may_go,
)
from dispatchers.engine.wire import NEVER_HEARD, ModelCard, ModelStatus


class Clock:
    def __init__(self) -> None:
        self.s = 1000.0

    def __call__(self) -> float:
        return self.s


def engine(label: str, *, wait_s: float = 0.0, pace_s: float = 0.1, in_flight: int = 0, **models: ModelStatus) -> Any:
    """One that has said how it is; nothing is ever asked of it."""
    cards = tuple(
        ModelCard(name, "faster-whisper", False, status) for name, status in (models or {"m": "ready"}).items()
    )
    member = Member(label, None, limit=4)  # type: ignore[arg-type]
    member.client._status = replace(NEVER_HEARD, models=cards, wait_s=wait_s, pace_s=pace_s, ready=True)
    member.ready, member.in_flight = True, in_flight
    return member


def lets_out(member: Member) -> None:
    member.record.let_out("failing")


# --- the choice ---------------------------------------------------------------------------------------------------


def test_it_goes_where_it_would_wait_least() -> None:
    busy, quick, slow = engine("busy", wait_s=2.0), engine("quick", wait_s=0.5), engine("slow", wait_s=0.6)
    assert best([busy, quick, slow], "m") is quick
    with quick._counted(), quick._counted():  # what was just sent counts as long as its status does not know of it
        assert best([busy, quick, slow], "m") is slow
    assert best([busy, quick, slow], "m") is quick


def test_of_two_that_are_idle_the_less_burdened_one() -> None:
    fast, slow = engine("fast", pace_s=0.05, in_flight=1), engine("slow", pace_s=0.5, in_flight=1)
    assert best([slow, fast], "m") is fast
    assert best([engine("a", in_flight=1), idle := engine("b")], "m") is idle


def test_only_where_the_model_is() -> None:
    here, loads, broken = engine("a", m="ready"), engine("b", other="cached"), engine("c", broken="failed")
    assert best([here, loads, broken], "other") is loads
    assert best([here, loads, broken], "broken") is None
    assert best([here, loads, broken], "nowhere") is None


def test_a_loaded_model_is_worth_a_wait() -> None:
    loaded, empty = engine("a", wait_s=LOAD_S - 1, m="ready"), engine("b", m="cached")
    assert best([empty, loaded], "m") is loaded
    loaded.client._status = replace(loaded.client._status, wait_s=LOAD_S + 1)
    assert best([empty, loaded], "m") is empty


def test_who_is_away_full_leaving_or_asked_before_gets_nothing() -> None:
    away, leaving, asked, full = (engine(label) for label in ("away", "leaving", "asked", "full"))
    away.ready, leaving.leaving, full.in_flight = False, True, 4
    assert best([away, leaving, asked, full], "m", but=[asked]) is None
    assert best([away, leaving, asked, full], "m") is asked


def test_one_that_was_let_out_is_better_than_none() -> None:
    out, well = engine("out"), engine("well", wait_s=5.0)
    lets_out(out)
    assert best([out, well], "m") is well
    assert best([out, well], "m", but=[well]) is out


# --- partials of one stream ---------------------------------------------------------------------------------------


def test_partials_stay_with_their_engine() -> None:
    ties, first, second = Ties(), engine("first"), engine("second")
    with ties.tied("s", "m", [first, second]) as member:
        assert member is first
        first.client._status = replace(first.client._status, wait_s=60.0)
        with ties.tied("s", "m", [first, second]) as newer:
            assert newer is first  # there it can take the older one's place
    with ties.tied("s", "m", [first, second]) as member:
        assert member is second
    first.client._status = replace(first.client._status, wait_s=0.0)
    second.client._status = replace(second.client._status, wait_s=STICK_S)
    with ties.tied("s", "m", [first, second]) as member:
        assert member is second
    with ties.tied("another", "m", [first, second]) as member:
        assert member is first


@pytest.mark.parametrize("change", ["away", "out", "leaving"])
def test_partials_leave_an_engine_that_is_not_well(change: str) -> None:
    ties, first, second = Ties(), engine("first"), engine("second", wait_s=0.1)
    with ties.tied("s", "m", [first, second]):
        pass
    match change:
        case "away":
            first.ready = False
        case "out":
            lets_out(first)
        case "leaving":
            first.leaving = True
    with ties.tied("s", "m", [first, second]) as member:
        assert member is second


def test_no_engine_for_a_partial() -> None:
    ties, only = Ties(), engine("only")
    with ties.tied("s", "m", [only]):
        only.in_flight = 4
        with ties.tied("s", "m", [only]) as member:
            assert member is None
    only.ready = False
    with ties.tied("s", "m", [only]) as member:
        assert member is None


def test_ties_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dispatchers.backends.choice.MOST_TIES", 3)
    ties, only = Ties(), engine("only")
    for number in range(10):
        with ties.tied(str(number), "m", [only]):
            pass
    assert list(ties._ties) == ["7", "8", "9"]


# --- outliers -----------------------------------------------------------------------------------------------------


def record(clock: Clock, final_s: float = 0.1, finals: int = ENOUGH) -> Record:
    made = Record(clock)
    for _ in range(finals):
        made.succeeded(final_s)
    return made


def test_failures_in_a_row_are_complained_of() -> None:
    one = Record(Clock())
    for _ in range(FAILURES - 1):
        one.failed()
    assert complaint(one, []) is None
    one.succeeded(None)
    for _ in range(FAILURES):
        assert complaint(one, []) is None
        one.failed()
    assert complaint(one, []) == "failing"


@pytest.mark.parametrize(
    ("final_s", "peers_s", "why"),
    [
        (0.3, [0.1, 0.1], None),  # a little slower
        (0.55, [0.1, 0.1], None),  # many times slower, and nobody notices
        (0.7, [0.1, 0.1], "slow"),
        (0.7, [0.1, 0.1, 9.0], "slow"),
        (9.0, [3.0, 3.0], None),
        (13.0, [3.0, 3.0], "slow"),
        (99.0, [], None),  # nobody to compare with
    ],
)
def test_far_slower_than_its_peers(final_s: float, peers_s: list[float], why: str | None) -> None:
    clock = Clock()
    peers = [record(clock, peer_s) for peer_s in peers_s]
    assert complaint(record(clock, final_s), peers) == why
    assert complaint(record(clock, final_s, finals=ENOUGH - 1), peers) is None


def test_each_time_it_is_out_for_twice_as_long() -> None:
    clock = Clock()
    one = Record(clock)
    spans = []
    for _ in range(8):
        for _ in range(FAILURES):
            one.failed()
        spans.append(one.let_out("failing"))
        assert one.out
        assert one.failures == 0  # it begins again
        clock.s += spans[-1]
        assert not one.out
    assert spans[:3] == [OUT_S, 2 * OUT_S, 4 * OUT_S]
    assert spans[-1] == OUT_MOST_S
    clock.s += FORGIVEN_S + 1
    assert one.let_out("slow") == OUT_S


@pytest.mark.parametrize(("engines", "most"), [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2)])
def test_never_more_than_half_are_out(engines: int, most: int) -> None:
    records = [Record(Clock()) for _ in range(engines)]
    for out in range(engines):
        if not may_go(records):
            assert out == most
            break
        records[out].let_out("failing")
    else:
        raise AssertionError


# --- addresses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://engine:8090", ("engine", 8090)),
        ("https://engine.example", ("engine.example", 443)),
        ("http://[::1]:80", ("::1", 80)),
    ],
)
def test_where_an_engine_is(url: str, expected: tuple[str, int]) -> None:
    assert place(url) == expected
    assert is_address(expected[0]) == (":" in expected[0])


async def test_a_name_is_looked_up() -> None:
    assert "127.0.0.1" in await look_up("localhost", 80)
    with pytest.raises(socket.gaierror):
        await look_up("no-such-host.invalid", 80)
