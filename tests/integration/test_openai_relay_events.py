"""A provider's text as it finds it: events become sentences."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dispatchers.backends.openai import OpenAIRelay
from dispatchers.errors import (
    BackendError,
    BackendFailed,
    BackendTimeout,
    BadAnswer,
)
from dispatchers.interface import Options, Segment
from tests.openai_relays import SAID, SECONDS_5, tells_nothing
from tests.providers.http import Answer, Fault
from tests.providers.openai import OpenAIServer


async def test_sentences_are_told_as_they_come(provider: OpenAIServer, relay: OpenAIRelay) -> None:
    heard: list[Segment] = []
    answer = await relay.transcribe(SECONDS_5, Options(model="gpt-transcribe"), heard.append)
    assert [segment.text for segment in heard] == ["The quick brown fox jumps, and the dog sleeps.", "The quick brown"]
    assert (answer.text, answer.language, answer.segments) == (SAID, "en", tuple(heard))
    assert [(segment.start_ms, segment.end_ms) for segment in heard] == [(0, 0), (0, 5_000)]
    assert provider.asked[-1].one("stream") == "true"
    provider.http.fault = Fault(piece_bytes=7)  # cut anywhere
    assert (await relay.transcribe(SECONDS_5, Options(model="gpt-transcribe"), heard.append)) == answer


def sse(*events: dict[str, Any] | str) -> Fault:
    lines = [event if isinstance(event, str) else f"data: {json.dumps(event)}\n\n" for event in events]
    return Fault(answer=Answer(pieces=tuple(line.encode() for line in lines), media_type="text/event-stream"))


def delta(text: str) -> dict[str, Any]:
    return {"type": "transcript.text.delta", "delta": text}


DONE = {"type": "transcript.text.done", "text": "Hello there. Bye."}


@pytest.mark.parametrize(
    ("fault", "texts"),
    [
        (sse(": ping\n\n", "event: x\r\n", delta("Hello there."), delta(" Bye."), DONE), ["Hello there.", "Bye."]),
        (sse(DONE), ["Hello there. Bye."]),
        (sse(delta("你好。再见。"), DONE), ["你好。", "再见。"]),
        (sse(delta("3.5 a 4."), DONE, delta("after the end")), ["3.5 a 4."]),
        (sse(delta("word " * 150), DONE), [("word " * 100).strip(), ("word " * 50).strip()]),
        (sse({"type": "transcript.text.delta"}, {"type": "new"}, delta("a\x00b"), DONE), ["ab"]),
        (Fault(answer=Answer(b'{"text":"Whole."}')), ["Whole."]),  # it does not stream, whatever was asked
    ],
)
async def test_events_become_sentences(
    provider: OpenAIServer, relay: OpenAIRelay, fault: Fault, texts: list[str]
) -> None:
    provider.http.fault = fault
    heard: list[Segment] = []
    answer = await relay.transcribe(np.zeros(60 * 16_000, np.int16), Options(model="gpt-transcribe"), heard.append)
    assert [segment.text for segment in heard] == texts
    assert answer.segments == tuple(heard)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (sse(delta("Hello. "), delta("and")), BadAnswer),
        (sse(delta("Hello. "), {"error": {"message": "the-secret"}}), BackendFailed),
        (sse(delta("Hello. "), "data: the-secret\n\n"), BadAnswer),
        (sse(delta("Hello. "), delta("the-secret" * 2_000)), BadAnswer),
        (sse(*[delta("")] * 90_000), BadAnswer),
        (sse("data: " + "a" * 5_000_000), BadAnswer),
        (replace(sse(delta("Hello. "), DONE), most_bytes=80), BackendFailed),
        (replace(sse(delta("Hello. "), DONE), most_bytes=80, ending="silence"), BackendTimeout),
    ],
)
async def test_events_that_go_wrong(
    provider: OpenAIServer, relay: OpenAIRelay, fault: Fault, error: type[BackendError]
) -> None:
    provider.http.fault = fault
    with pytest.raises(BackendError) as failed:
        await relay.transcribe(SECONDS_5, Options(model="gpt-transcribe"), lambda _: None)
    assert type(failed.value) is error
    tells_nothing(failed.value)
