"""Which failures move on to the next leg."""

import numpy as np
import pytest

from dispatchers.adapters.fallback import Fallback
from dispatchers.backends.scripted import Scripted
from dispatchers.errors import BackendFailed, BackendRefused, BackendUnavailable, UnsupportedOption
from dispatchers.interface import Options, Segment

AUDIO = np.zeros(16_000 * 4, np.int16)
GOOD = Scripted(["second"], word_ms=400)


async def test_the_first_that_works_answers():
    transcript = await Fallback([Scripted(["first"]), GOOD]).transcribe(AUDIO, Options())
    assert transcript.text.split()[0] == "first"


async def test_a_retryable_failure_moves_on():
    heard: list[Segment] = []
    transcript = await Fallback([Scripted(fail=BackendUnavailable), GOOD]).transcribe(AUDIO, Options(), heard.append)
    assert set(transcript.text.split()) == {"second"}
    assert tuple(heard) == transcript.segments


async def test_a_refusal_does_not():
    with pytest.raises(BackendRefused):
        await Fallback([Scripted(fail=BackendRefused), GOOD]).transcribe(AUDIO, Options())


async def test_nothing_is_said_twice():
    heard: list[Segment] = []
    with pytest.raises(BackendFailed):
        await Fallback([Scripted(fail=BackendFailed, fail_after=1), GOOD]).transcribe(AUDIO, Options(), heard.append)
    assert len(heard) == 1


async def test_the_last_error_is_the_answer():
    legs = [Scripted(fail=BackendFailed), Scripted(fail=BackendUnavailable)]
    with pytest.raises(BackendUnavailable):
        await Fallback(legs).transcribe(AUDIO, Options())


async def test_a_stream_needs_a_leg_that_streams():
    async def silence():
        return
        yield

    with pytest.raises(UnsupportedOption):
        async with Fallback([GOOD]).stream(silence(), Options()) as events:
            await anext(events)


def test_it_promises_what_every_leg_keeps():
    assert Fallback([GOOD, GOOD]).capabilities == GOOD.capabilities
    with pytest.raises(ValueError, match="at least one"):
        Fallback([])
