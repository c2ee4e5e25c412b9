"""Seamless resampling of live audio."""

from itertools import pairwise

import numpy as np
import pytest

from dispatchers.audio.resample import Resampler
from dispatchers.errors import UnsupportedAudio

RATES = [8_000, 11_025, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000]


def tone(rate: int, seconds: float = 1.3) -> np.ndarray:
    at = np.arange(int(seconds * rate))
    return (9_000 * np.sin(2 * np.pi * 300 * at / rate)).astype(np.int16)


def whole(resampler: Resampler, *messages: bytes) -> np.ndarray:
    return np.concatenate([*(resampler.feed(message) for message in messages), resampler.flush()])


@pytest.mark.parametrize("rate", RATES)
def test_length_and_sound(rate: int):
    heard = whole(Resampler(rate), tone(rate).tobytes())
    assert heard.dtype == np.int16
    assert abs(len(heard) - len(tone(rate)) * 16_000 / rate) <= 1
    wanted = tone(16_000)
    middle = slice(200, min(len(heard), len(wanted)) - 200)
    assert np.corrcoef(heard[middle], wanted[middle])[0, 1] > 0.999


@pytest.mark.parametrize("rate", RATES)
def test_messages_of_any_length_give_the_same(rate: int):
    data = tone(rate).tobytes()
    chance = np.random.default_rng(rate)
    cuts = [0, *sorted(chance.integers(0, len(data), 60)), len(data)]
    messages = [data[start:end] for start, end in pairwise(cuts)]
    assert any(len(message) % 2 for message in messages)
    assert np.array_equal(whole(Resampler(rate), *messages), whole(Resampler(rate), data))


def test_sixteen_kilohertz_passes_through():
    data = tone(16_000)
    assert np.array_equal(Resampler(16_000).feed(data.tobytes()), data)


@pytest.mark.parametrize("rate", [8_000, 16_000, 48_000])
def test_single_bytes_and_a_half_sample(rate: int):
    resampler = Resampler(rate)
    assert len(resampler.feed(b"")) == 0
    assert len(resampler.feed(b"\x01")) == 0
    resampler.flush()
    again = whole(resampler, tone(rate).tobytes())
    assert np.array_equal(again, whole(Resampler(rate), tone(rate).tobytes()))


@pytest.mark.parametrize("rate", [0, -1, 7_999, 48_001])
def test_rates_outside_are_refused(rate: int):
    with pytest.raises(UnsupportedAudio):
        Resampler(rate)
