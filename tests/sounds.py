"""Sounds that nobody says anything in."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from dispatchers.interface import SAMPLE_RATE, Samples

SECONDS = 6
SEED = 7

Wave = NDArray[np.float64]
"""Full scale is 1."""

_LENGTH = SECONDS * SAMPLE_RATE
_TIME = np.arange(_LENGTH) / SAMPLE_RATE
_KEYS = {"1": (697, 1209), "5": (770, 1336), "9": (852, 1477), "0": (941, 1336)}
_CHORDS = ((220.0, 277.2, 329.6), (293.7, 370.0, 440.0), (246.9, 311.1, 370.0), (196.0, 246.9, 293.7))


def sounds() -> dict[str, Samples]:
    """Name and samples, the same each time. What is loud is at about -12 dB of full scale, what is soft at -40 dB."""
    chance = np.random.default_rng(SEED)
    white = chance.standard_normal(_LENGTH)
    made: dict[str, Wave] = {
        "digital silence": np.zeros(_LENGTH),
        "near-silence": chance.integers(-3, 4, _LENGTH) / 32768,
        "white noise, loud": 0.25 * _even(white),
        "white noise, soft": 0.01 * _even(white),
        "pink noise, loud": 0.25 * _even(_shaped(white, lambda hz: 1 / np.sqrt(hz))),
        "pink noise, soft": 0.01 * _even(_shaped(white, lambda hz: 1 / np.sqrt(hz))),
        "babble-like noise, loud": 0.25 * _babble(chance),
        "babble-like noise, soft": 0.01 * _babble(chance),
        "hum": 0.2 * sum(np.sin(2 * np.pi * 50 * part * _TIME) / part for part in (1, 2, 3, 5)),
        "tone": 0.25 * np.sin(2 * np.pi * 440 * _TIME),
        "sweep": 0.25 * np.sin(2 * np.pi * (100 + 300 * _TIME) * _TIME),
        "chords": _chords(),
        "beating tone": 0.25 * np.sin(2 * np.pi * 200 * _TIME) * (1 + np.sin(2 * np.pi * 4 * _TIME)) / 2,
        "clicks": _clicks(chance),
        "DTMF": _keys(),
        "breath": 0.05 * _even(_shaped(white, lambda hz: 1 / (1 + (hz / 800) ** 2))) * _swell(0.4),
    }
    return {name: np.round(np.clip(wave, -1, 1) * 32767).astype(np.int16) for name, wave in made.items()}


def _even(noise: Wave) -> Wave:
    """With a peak that is rarely above 1."""
    return noise / (3 * noise.std())


def _shaped(noise: Wave, gain: Callable[[Wave], Wave]) -> Wave:
    """With a spectrum of this shape, by frequency in Hz."""
    hz = np.fft.rfftfreq(len(noise), 1 / SAMPLE_RATE)
    return np.fft.irfft(np.fft.rfft(noise) * gain(np.maximum(hz, 20.0)), len(noise))


def _swell(hz: float) -> Wave:
    return (1 + np.sin(2 * np.pi * hz * _TIME)) / 2


def _babble(chance: np.random.Generator) -> Wave:
    """Noise in the bands of three formants, each swelling at the rate of syllables: what many talkers leave."""
    voices = np.zeros(_LENGTH)
    for centre, width in ((500, 150), (1500, 250), (2500, 350)):
        for _ in range(4):
            noise = chance.standard_normal(_LENGTH)
            band = _shaped(noise, lambda hz, c=centre, w=width: np.exp(-(((hz - c) / w) ** 2)))  # type: ignore[misc]
            voices += _even(band) * (1 + np.sin(2 * np.pi * (chance.uniform(2, 6) * _TIME + chance.random()))) / 2
    return _even(voices)


def _chords() -> Wave:
    """Four chords of plucked strings with overtones, one each half second."""
    made = np.zeros(_LENGTH)
    step = SAMPLE_RATE // 2
    for number, start in enumerate(range(0, _LENGTH, step)):
        time = _TIME[:step]
        for pitch in _CHORDS[number % len(_CHORDS)]:
            for part in range(1, 6):
                made[start : start + step] += np.sin(2 * np.pi * pitch * part * time) * np.exp(-3 * part * time) / part
    return 0.5 * made / np.abs(made).max()


def _clicks(chance: np.random.Generator) -> Wave:
    made = np.zeros(_LENGTH)
    for start in chance.integers(0, _LENGTH - 200, 40):
        made[start : start + 200] += 0.8 * chance.standard_normal(200) * np.exp(-np.arange(200) / 25)
    return made


def _keys() -> Wave:
    """A telephone's keys, 100 ms on and 100 ms off."""
    made = np.zeros(_LENGTH)
    step = SAMPLE_RATE // 5
    for number, start in enumerate(range(0, _LENGTH, step)):
        low, high = _KEYS["1590"[number % 4]]
        time = _TIME[: step // 2]
        made[start : start + step // 2] = 0.25 * (np.sin(2 * np.pi * low * time) + np.sin(2 * np.pi * high * time))
    return made
