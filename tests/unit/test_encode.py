"""Samples into files and back."""

from __future__ import annotations

import io
import wave
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from dispatchers.audio.encode import Form, encoder, unpacked
from dispatchers.interface import Samples


def noise(size: int, seed: int = 0) -> Samples:
    return np.random.default_rng(seed).integers(-32_768, 32_768, size, np.int16)


def made(form: Form, samples: Samples, step: int, *, total: int | None) -> bytes:
    one = encoder(form, total)
    pieces = [one.feed(samples[at : at + step]) for at in range(0, len(samples), step)]
    return b"".join([*pieces, one.end()])


def read_back(data: bytes) -> NDArray[Any]:
    with av.open(io.BytesIO(data)) as container:
        return np.concatenate([frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)])


@pytest.mark.parametrize("size", [1, 1_000, 4_608, 100_001])
@pytest.mark.parametrize("step", [777, 200_000])
def test_flac_is_what_it_was(size: int, step: int) -> None:
    samples = noise(size)
    for total in (None, size):
        data = made("flac", samples, step, total=total)
        pieces = list(unpacked(data, 10_000))
        assert np.array_equal(np.concatenate(pieces), samples)
        assert all(10_000 <= len(piece) < 20_000 for piece in pieces[:-1])
        assert np.array_equal(read_back(data), samples)
        with av.open(io.BytesIO(data)) as container:
            told = container.duration
        assert total is None or told == pytest.approx(total / 0.016, abs=1)


@pytest.mark.parametrize("size", [0, 1, 50_000])
def test_wav_is_what_it_was_and_says_its_length(size: int) -> None:
    samples = noise(size)
    data = made("wav", samples, 1_234, total=size)
    assert len(data) == 44 + 2 * size
    with wave.open(io.BytesIO(data)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate(), file.getnframes()) == (
            1,
            2,
            16_000,
            size,
        )
        assert file.readframes(size) == samples.tobytes()


def test_a_wav_longer_than_its_header_can_say_has_the_longest() -> None:
    header = encoder("wav", 3 * 2**30).feed(noise(0))
    assert header[4:8] == header[40:44] == b"\xff\xff\xff\xff"


def test_wav_wants_its_length() -> None:
    with pytest.raises(ValueError, match="length"):
        encoder("wav")


def test_mp3_sounds_the_same() -> None:
    time = np.arange(80_000) / 16_000
    tone = (8_000 * np.sin(2 * np.pi * 440 * time)).astype(np.int16)
    data = made("mp3", tone, 5_000, total=len(tone))
    assert len(data) == pytest.approx(5 * 8_000, rel=0.05)  # 64 kbit/s
    heard = read_back(data)
    assert len(tone) <= len(heard) < len(tone) + 4_000
    spectrum = np.abs(np.fft.rfft(heard[16_000:32_000]))
    assert int(spectrum.argmax()) == 440
