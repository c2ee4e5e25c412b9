"""What providers hear that have no recogniser: the words of a script, where they stand, if there is any sound there."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TypeAlias

import numpy as np

from dispatchers.audio.decode import load
from dispatchers.interface import SAMPLE_RATE, Samples

LOUD = 50
"""Samples beyond this are sound."""

Said: TypeAlias = tuple[str, float, float]
"""A word as written, and when it begins and ends, in seconds."""

SENTENCES = "Tell me more. And then, where did it go?"


def said(text: str = SENTENCES, *, word_s: float = 0.4, pause_s: float = 1.2, start_s: float = 0.4) -> tuple[Said, ...]:
    """A script: each sentence after a pause."""
    script, at = [], start_s
    for word in text.split():
        script.append((word, round(at, 3), round(at + word_s, 3)))
        at += word_s + (pause_s if word[-1] in ".?!" else 0.0)
    return tuple(script)


def sound(seconds: float) -> Samples:
    """Audio in which every word of a script is heard."""
    return np.full(round(seconds * SAMPLE_RATE), 1000, np.int16)


def heard_of(audio: Samples, script: tuple[Said, ...]) -> tuple[Said, ...]:
    """The words of the script that begin in this audio and can be heard."""
    length = len(audio) / SAMPLE_RATE
    return tuple((word, start, min(end, length)) for word, start, end in script if _audible(audio, start, end))


def _audible(audio: Samples, start: float, end: float) -> bool:
    there = audio[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)]
    return bool(len(there)) and bool((np.abs(there.astype(np.int32)) > LOUD).any())


def decoded(body: bytes) -> Samples:
    """The samples of a file. Raises `AudioError`."""
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(body)
        return load(Path(file.name))
