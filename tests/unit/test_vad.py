"""The Silero model against speech whose word times are known."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dispatchers.audio.decode import load
from dispatchers.audio.vad import FRAME, SileroVad

SAMPLES = Path(__file__).parents[2] / "dispatchers/engine/micro/samples"


@pytest.fixture(scope="module")
def vad() -> SileroVad:
    return SileroVad.load()


@pytest.fixture(scope="module")
def audio() -> np.ndarray:
    return load(SAMPLES / "long.wav")[: 20 * 16_000]


def test_speech_is_told_from_silence(vad: SileroVad, audio: np.ndarray):
    probabilities = vad.stream().feed(audio)
    assert len(probabilities) == len(audio) // FRAME
    truth = np.zeros(len(probabilities), bool)
    for word in json.loads((SAMPLES / "long.words.json").read_text()):
        truth[int(word["start"] * 16_000) // FRAME : int(word["end"] * 16_000) // FRAME + 1] = True
    assert (probabilities[truth] > 0.5).mean() > 0.9
    assert (probabilities[~truth] > 0.5).mean() < 0.05


def test_pieces_of_any_length_give_the_same(vad: SileroVad, audio: np.ndarray):
    audio = audio[: 5 * 16_000]
    stream, pieces, at = vad.stream(), [], 0
    for size in [1, 511, 512, 513, 0, 1_600, 7, 30_000, 80_000]:
        pieces.append(stream.feed(audio[at : at + size]))
        at += size
    assert np.array_equal(np.concatenate(pieces), vad.stream().feed(audio))


def test_streams_do_not_hear_each_other(vad: SileroVad, audio: np.ndarray):
    quiet, loud = vad.stream(), vad.stream()
    for at in range(0, 3 * 16_000, 1_600):
        loud.feed(audio[at : at + 1_600])
        assert quiet.feed(np.zeros(1_600, np.int16)).max() < 0.2


def test_torch_and_the_package_stay_out():
    code = (
        "import sys; from dispatchers.audio.vad import SileroVad; SileroVad.load(); "
        "sys.exit('torch' in sys.modules or 'silero_vad' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=SAMPLES.parents[3], check=False).returncode == 0
