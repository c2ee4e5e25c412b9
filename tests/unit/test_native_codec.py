"""The native live protocol's frames, to and from our own words; and what stands between a socket and a recogniser."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import pytest
from av import CodecContext, Packet
from starlette.datastructures import QueryParams

from dispatchers.audio.live import ALAW, MULAW, Wire
from dispatchers.interface import (
    Clear,
    Cleared,
    Delta,
    Event,
    Final,
    Flush,
    Flushed,
    Gap,
    Partial,
    Pcm,
    SpeechStarted,
    StreamError,
    Used,
    Word,
)
from gateway.live.codec import Metrics, Ping, Stop, Unknown
from gateway.live.frames import Undecodable
from gateway.live.intake import AHEAD_MS, MESSAGES_AHEAD, Intake
from gateway.live.latency import Latency
from gateway.protocols.native_codec import Native
from policy.errors import Invalid

PLAIN = Wire("pcm_s16le", 16_000)
SECOND = bytes(32_000)


def started(**fields: Any) -> Native:
    codec = Native("req_1")
    codec.setup(json.dumps({"type": "start", **fields}))
    return codec


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (SpeechStarted(1, 40), {"type": "speech_started", "utterance": 1, "start_ms": 40}),
        (
            Partial(1, "he has", 2, 40, 900),
            {"type": "partial", "utterance": 1, "start_ms": 40, "end_ms": 900, "text": "he has", "stable": 2},
        ),
        (
            Delta(1, " has", 40, 900, channel=0),
            {"type": "delta", "utterance": 1, "start_ms": 40, "end_ms": 900, "channel": 0, "text": " has"},
        ),
        (Gap(40, 900, "cleared"), {"type": "gap", "start_ms": 40, "end_ms": 900, "reason": "cleared"}),
        (Flushed(900), {"type": "flushed", "accepted_ms": 900}),
        (Cleared(900), {"type": "cleared", "accepted_ms": 900}),
        (Used(15_000, 15_000), {"type": "usage", "accepted_ms": 15_000, "billed_ms": 15_000}),
        (Used(1, 1, 0), {"type": "usage", "accepted_ms": 1, "billed_ms": 1, "budget_remaining_ms": 0}),
        (
            StreamError("BACKEND_FAILED", "It failed.", True),
            {"type": "error", "code": "BACKEND_FAILED", "message": "It failed.", "retryable": True, "fatal": False},
        ),
    ],
)
def test_events_become_messages(event: Event, message: dict[str, Any]) -> None:
    assert started().event(event) == message


def test_a_final_says_only_what_there_is() -> None:
    final = Final(2, "he has", 40, 900, "en", 0.87654321, (Word("he", 50, 90, 0.99999), Word("has", 91, 120, 0.5)))
    bare = {
        "type": "final",
        "utterance": 2,
        "start_ms": 40,
        "end_ms": 900,
        "text": "he has",
        "language": "en",
        "confidence": 0.8765,
        "revised": False,
    }
    assert started().event(final) == bare
    assert started(words=True).event(final) == bare | {
        "words": [
            {"word": "he", "start_ms": 50, "end_ms": 90, "confidence": 1.0},
            {"word": "has", "start_ms": 91, "end_ms": 120, "confidence": 0.5},
        ]
    }
    assert started(words=True).event(Final(2, "", 40, 900, "en", 0.0)) == bare | {
        "text": "",
        "confidence": 0.0,
        "words": [],
    }
    spoken = Final(2, "he has", 40, 900, "en", 0.87654321, channel=1, speaker="ann")
    assert started().event(spoken) == bare | {"channel": 1, "speaker": "ann"}


@pytest.mark.parametrize(
    ("fields", "partial", "delta", "asked"),
    [
        ({}, True, True, True),
        ({"deltas": True}, True, True, True),
        ({"partials": False}, False, False, False),
        ({"partials": False, "deltas": True}, False, True, True),
    ],
)
def test_partials_and_deltas_as_asked(fields: dict[str, bool], partial: bool, delta: bool, asked: bool) -> None:
    codec = Native("req_1")
    assert codec.setup(json.dumps({"type": "start", **fields})).options.partials is asked
    assert (codec.event(Partial(1, "a", 0, 0, 1)) is not None) is partial
    assert (codec.event(Delta(1, "a", 0, 1)) is not None) is delta


def test_a_start_says_everything() -> None:
    fields = {
        "type": "start",
        "encoding": "pcm_s16le",
        "sample_rate": 44_100,
        "channels": 1,
        "language": "en-GB",
        "model": "micro",
        "backend_preference": "prefer_relay",
        "words": True,
        "prompt": "A call.",
        "hotwords": ["dog"],
        "customer": "acme",
        "metadata": {"call": "7"},
        "vad": {"threshold": 1 / 2, "silence_ms": 100, "min_speech_ms": 2_000, "max_utterance_ms": 1_000},
    }
    setup = Native("req_1").setup(json.dumps(fields))
    assert setup.wire == Wire("pcm_s16le", 44_100)
    demand, options = setup.demand, setup.options
    assert (demand.kind, demand.model, demand.language, demand.request_id) == ("stream", "micro", "en", "req_1")
    assert (demand.backend_preference, demand.features) == ("prefer_relay", {"words"})
    assert (demand.customer, demand.metadata) == ("acme", {"call": "7"})
    assert (options.language, options.prompt, options.hotwords, options.words) == ("en", "A call.", ("dog",), True)
    assert demand.vad == fields["vad"]


def test_the_address_says_the_same() -> None:
    query = QueryParams(
        'token=t&encoding=alaw&words=true&partials=0&hotwords=dog&hotwords=cat&vad={"silence_ms":300}&metadata={"a":"b"}'
    )
    codec = Native("req_1")
    setup = codec.setup_of_query(query, {})
    assert setup is not None
    assert setup.wire == Wire("alaw", 8_000)
    assert (setup.options.words, setup.options.partials, setup.options.hotwords) == (True, False, ("dog", "cat"))
    assert (setup.demand.vad, setup.demand.metadata) == ({"silence_ms": 300}, {"a": "b"})
    assert Native("req_1").setup_of_query(QueryParams("token=t&ticket=u"), {}) is None


def test_the_audio_is_as_said_or_as_its_header_says() -> None:
    def wire(query: str) -> Wire:
        setup = Native("req_1").setup_of_query(QueryParams(query), {})
        assert setup is not None
        return setup.wire

    assert wire("channels=2&sample_rate=48000") == Wire("pcm_s16le", 48_000, 2)
    assert wire("encoding=opus&sample_rate=48000&channels=2") == Wire("opus", None, None)
    with pytest.raises(Invalid, match="mulaw is always of one channel"):
        wire("encoding=mulaw&channels=2")
    with pytest.raises(Invalid, match="channels"):
        wire("channels=3")


def test_commands() -> None:
    codec = started()
    assert codec.command('{"type":"flush"}') == Flush()
    assert codec.command('{"type":"clear"}') == Clear()
    assert codec.command('{"type":"stop"}') == Stop()
    assert codec.command('{"type":"ping","id":[1,"é"]}') == Ping([1, "é"])
    assert codec.command('{"type":"metrics"}') == Metrics()
    assert codec.command('{"type":"dance"}') == Unknown("dance")
    with pytest.raises(Invalid):
        codec.command('{"type":"start"}')
    with pytest.raises(Undecodable):
        codec.command("dance")


# --- audio --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "table"), [("pcm_mulaw", MULAW), ("pcm_alaw", ALAW)])
def test_telephone_samples_are_those_of_the_standard(name: str, table: np.ndarray[Any, np.dtype[np.int16]]) -> None:
    codec: Any = CodecContext.create(name, "r")
    codec.sample_rate, codec.layout = 8_000, "mono"
    frames = codec.decode(Packet(bytes(range(256))))
    assert np.array_equal(np.concatenate([frame.to_ndarray()[0] for frame in frames]), table)


async def test_commands_keep_their_place_in_the_audio() -> None:
    intake = Intake(PLAIN)
    for item in (b"\x01\x00", b"\x02", b"\x00\x03", Flush(), b"\x00", Clear()):
        await intake.put(item)
    intake.end()
    told = [item.samples.tolist() if isinstance(item, Pcm) else item async for item in intake.items()]
    assert told == [[1, 2], Flush(), [3], Clear()]
    assert intake.lag_ms == 0


@pytest.mark.parametrize(("item", "sent"), [(SECOND, 100), (b"\x00\x00", 5_000), (Flush(), 5_000)])
async def test_only_so_much_waits(item: bytes | Flush, sent: int) -> None:
    intake = Intake(PLAIN)
    put = 0

    async def flood() -> None:
        nonlocal put
        while put < sent:
            await intake.put(item)
            put += 1
        intake.end()

    flooding = asyncio.create_task(flood())
    for _ in range(10):
        await asyncio.sleep(0)
    assert put == (AHEAD_MS // 1_000 if item is SECOND else MESSAGES_AHEAD)
    taken = 0
    async for one in intake.items():
        taken += len(one.samples) if isinstance(one, Pcm) else 1
        assert intake.lag_ms <= AHEAD_MS
    await flooding
    assert taken == put * (len(item) // 2 if isinstance(item, bytes) else 1)


def test_latency_counts_from_the_receipt_of_the_audio() -> None:
    latency = Latency()
    for at in range(1, 31):
        latency.received(at * 100, 10.0 + at / 10)  # in real time
    assert latency.note(SpeechStarted(1, 500), 10.9) is None
    assert latency.note(Partial(1, "he", 0, 500, 900), 11.0) == ("first_partial", 500)
    assert latency.note(Partial(1, "he has", 0, 500, 1_200), 11.3) is None
    assert latency.note(Final(1, "he has", 500, 2_000, "en", 1.0), 12.25) == ("final", 250)
    assert latency.note(Final(2, "a", 2_500, 2_990, "en", 1.0), 13.5) == ("final", 500)
    assert list(latency.final) == [250, 500]
    latency.note(Final(3, "b", 2_990, 2_999, "en", 1.0, coalesced=2, dropped=1), 13.6)
    latency.note(Final(4, "c", 2_990, 2_999, "en", 1.0, coalesced=1), 13.6)
    assert (latency.coalesced, latency.dropped) == (3, 1)
    assert latency.sent == {"SpeechStarted": 1, "Partial": 2, "Final": 4}


async def test_of_a_container_so_many_bytes_wait() -> None:
    """By what is usual for speech, as long as nothing is known of it; a header that never ends lets no more in."""
    intake = Intake(Wire.of("opus"))
    put = 0

    async def flood() -> None:
        nonlocal put
        while True:
            await intake.put(bytes(1_000))
            put += 1

    flooding = asyncio.create_task(flood())
    for _ in range(10):
        await asyncio.sleep(0)
    flooding.cancel()
    assert put * 1_000 == AHEAD_MS * Wire.of("opus").bytes_per_s // 1_000


async def test_the_clock_of_a_container_is_that_of_its_audio() -> None:
    header = b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0\x01\0\x01\0\x40\x1f\0\0\x80\x3e\0\0\x02\0\x10\0data\0\0\0\0"
    intake = Intake(Wire.of("wav"))
    await intake.put(header + bytes(16_000 * 3))
    items = intake.items()
    while intake.taken_ms < 2_500:
        await anext(items)
    await intake.put(bytes(16_000))
    assert abs(intake.lag_ms - 1_000) < 20
    assert intake.received_ms == intake.taken_ms + intake.lag_ms
    intake.end()
    assert sum([len(item.samples) async for item in items if isinstance(item, Pcm)]) > 16_000
    assert intake.taken_ms == 4_000
