"""What is kept of a session's messages for a client that comes back."""

from __future__ import annotations

import json

import pytest

from dispatchers.audio.live import Encoding, Wire
from gateway.live.intake import Intake
from gateway.live.record import KEPT_CHARACTERS, Record


async def test_messages_are_numbered_and_kept_as_they_are_to_be_told_again() -> None:
    record = Record(keep=True)
    await record.say({"type": "final", "text": "naïve"})
    await record.say({"type": "error"}, again={"type": "warning"})
    assert [json.loads(kept.text) for kept in record.kept] == [
        {"type": "final", "seq": 1, "text": "naïve"},
        {"type": "warning", "seq": 2},
    ]
    assert [record.has_since(seq) for seq in range(-1, 4)] == [False, True, True, True, False]


async def test_only_so_much_is_kept() -> None:
    record = Record(keep=True)
    for _ in range(100):
        await record.say({"type": "final", "text": "x" * 10_000})
    assert sum(len(kept.text) for kept in record.kept) <= KEPT_CHARACTERS
    oldest = record.kept[0].seq
    assert [kept.seq for kept in record.kept] == list(range(oldest, 101))
    assert not record.has_since(oldest - 2)
    assert record.has_since(oldest - 1)


async def test_where_nobody_may_come_back_nothing_is_kept() -> None:
    record = Record(keep=False)
    await record.say({"type": "final", "text": "secret"})
    assert record.kept == ()
    assert record.seq == 1


@pytest.mark.parametrize(
    ("encoding", "rate", "received", "ms", "beyond"),
    [
        ("pcm_s16le", 16_000, 64_001, 1_000, 32_001),  # half a sample has come: its other half is new
        ("pcm_s16le", 22_050, 44_100, 333, 44_100 - 7_342 * 2),
        ("mulaw", 8_000, 8_000, 250, 6_000),
        ("mulaw", 8_000, 100, 250, 0),
    ],
)
async def test_what_is_sent_again_is_known_to_the_byte(
    encoding: Encoding, rate: int, received: int, ms: int, beyond: int
) -> None:
    intake = Intake(Wire(encoding, rate))
    await intake.put(bytes(received))
    assert intake.beyond(ms) == beyond
