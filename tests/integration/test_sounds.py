"""What nobody said never leaves: neither of noise, music and silence, nor loops."""

from __future__ import annotations

import io
import wave
import zlib

import numpy as np
import pytest

from dispatchers.audio.decode import load
from dispatchers.interface import Samples
from tests.server import CLIP_TEXT, SAMPLES, Served, post
from tests.sounds import sounds
from tests.streaming import Talk, assert_well_formed, clip, talking

SOUNDS = sounds()
SPOKEN_BEFORE = SOUNDS.keys() - {"beating tone"}  # which the recording's VAD takes for a voice


def repeated() -> Samples:
    """A scrap of speech over and over, of which the model makes `evening meeting evening evening …`."""
    return np.tile(load(SAMPLES / "clip02.wav")[8_000:14_000], 30)[:160_000]


def recording(samples: Samples) -> bytes:
    made = io.BytesIO()
    with wave.open(made, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(samples.tobytes())
    return made.getvalue()


async def streamed(served: Served, token: str, samples: Samples, **fields: object) -> Talk:
    async with talking(served, token) as talk:
        await talk.say("start", language="en", **fields)
        await talk.speak(samples.tobytes())
        await talk.say("stop")
        assert await talk.end() == (1000, "")
    assert_well_formed(talk.events)
    return talk


def told(talk: Talk) -> list[str]:
    return [event["text"] for event in talk.events if event.get("text")]


@pytest.mark.parametrize("name", SOUNDS)
async def test_a_recording_of_no_speech_has_no_text(served: Served, mine: str, name: str) -> None:
    async with served.http(mine) as http:
        response = await post(http, recording(SOUNDS[name]), language="en")
    assert (response.status_code, response.json()["text"]) == (200, "")


@pytest.mark.parametrize("threshold", [0.6, 0.1])
async def test_a_stream_of_no_speech_has_no_text(served: Served, mine: str, threshold: float) -> None:
    """Whatever a client asks of the VAD."""
    talks = {name: await streamed(served, mine, made, vad={"threshold": threshold}) for name, made in SOUNDS.items()}
    assert {name: told(talk) for name, talk in talks.items() if told(talk)} == {}


async def test_loops_never_leave(served: Served, mine: str) -> None:
    for text in told(await streamed(served, mine, repeated())):
        assert len(text) / len(zlib.compress(text.encode())) <= 2.4
    async with served.http(mine) as http:
        response = await post(http, recording(repeated()), language="en")
    assert response.json()["text"] == ""


@pytest.mark.parametrize("name", sorted(SPOKEN_BEFORE))
async def test_a_sound_adds_nothing_to_what_was_said_before(served: Served, mine: str, name: str) -> None:
    samples, said = clip("clip02.wav")
    assert said == CLIP_TEXT
    both = np.concatenate([samples, SOUNDS[name]])
    assert (await streamed(served, mine, both)).text == said
    async with served.http(mine) as http:
        response = await post(http, recording(both), language="en")
    assert response.json()["text"] == said
